"""What a run leaves on the disk: directory, checkpoints, metrics, versions."""
