"""Offline reinforcement learning with synthetic trajectories."""
