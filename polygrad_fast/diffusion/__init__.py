"""Diffusion processes: schedules, losses, trainers."""
