"""What learns a policy from trajectories, one file each."""
