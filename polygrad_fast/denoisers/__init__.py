"""Denoising networks: eps_theta(x | i, u), and EDM's F_theta(x, c)."""

from polygrad_fast.denoisers.residual_mlp import ResidualMLPDenoiser
from polygrad_fast.denoisers.rollout import RolloutDenoiser
from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.denoisers.transformer import TransformerDenoiser

__all__ = ["ResidualMLPDenoiser", "RolloutDenoiser", "TemporalUNet", "TransformerDenoiser"]
