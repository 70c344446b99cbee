"""Is imagination true? Statistics of imagined actions, and the imagined policy gradient against the
simulator's."""
