"""Evaluation: returns of a policy, learning curves."""
