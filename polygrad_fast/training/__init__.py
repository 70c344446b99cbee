"""Algorithm 3: its loop, what acts in it, and what a user sees of it."""
