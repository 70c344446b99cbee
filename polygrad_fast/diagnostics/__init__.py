"""Is imagination true? Imagined trajectories and the imagined policy gradient against the
simulator's, and statistics of imagined actions."""
