"""The denoiser that a configuration asks for."""

from __future__ import annotations

from torch import nn

from polygrad_fast.config import DenoiserConfig
from polygrad_fast.denoisers import ResidualMLPDenoiser, RolloutDenoiser, TransformerDenoiser


def build_denoiser(
    config: DenoiserConfig,
    observation_dim: int,
    action_dim: int,
    horizon: int,
    num_train_timesteps: int,
) -> nn.Module:
    """Return the configured denoising network with fresh weights.

    Args:
        config: kind and sizes; what is None gets the paper's value for the horizon.
        observation_dim, action_dim, horizon: S, A and H.
        num_train_timesteps: K.
    """
    config = config.resolved(horizon)
    arguments = {
        "observation_dim": observation_dim,
        "action_dim": action_dim,
        "horizon": horizon,
        "hidden_dim": config.hidden_dim,
        "num_layers": config.num_layers,
    }
    if config.kind == "rollout":
        return RolloutDenoiser(**arguments, process_noise=config.process_noise)
    arguments |= {
        "step_conditioning": config.step_conditioning,
        "num_train_timesteps": num_train_timesteps,
    }
    if config.kind == "transformer":
        return TransformerDenoiser(**arguments, num_heads=config.num_heads)
    return ResidualMLPDenoiser(**arguments)
