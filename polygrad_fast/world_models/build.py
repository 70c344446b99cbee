"""The world model that a configuration asks for."""

from __future__ import annotations

import torch
from torch import nn

from polygrad_fast.config import TrainConfig
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import check_denoiser
from polygrad_fast.world_models.autoregressive import Autoregressive
from polygrad_fast.world_models.autoregressive_diffusion import AutoregressiveDiffusion
from polygrad_fast.world_models.base import WorldModel
from polygrad_fast.world_models.ensemble import Ensemble
from polygrad_fast.world_models.trajectory_diffusion import TrajectoryDiffusion
from polygrad_fast.world_models.transformer import Transformer

STEPWISE = {
    "autoregressive": Autoregressive,
    "ensemble": Ensemble,
    "transformer": Transformer,
    "autoregressive_diffusion": AutoregressiveDiffusion,
}


def build_world_model(
    config: TrainConfig,
    normalizer: Normalizer,
    action_bounds: tuple,
    device: torch.device,
    denoiser: nn.Module | None = None,
) -> WorldModel:
    """Return a new world model.

    Args:
        config: resolved; `world_model` names it.
        normalizer: shared moments of the data, of its dimensions.
        action_bounds: (low, high) of the policy's actions, [A] each.
        device: of everything.
        denoiser: a network of the user's own, moved to the device.

    Raises:
        InputError: the denoiser cannot be used, or this world model has none.
    """
    if config.world_model == "trajectory_diffusion":
        if denoiser is not None:
            _check_own_denoiser(denoiser, config, normalizer, device)
        return TrajectoryDiffusion(config, normalizer, action_bounds, device, denoiser)
    if denoiser is not None:
        raise InputError(
            f"world_model must be 'trajectory_diffusion' with a denoiser of your own, got "
            f"{config.world_model!r}"
        )
    options = config.world_model_training
    return STEPWISE[config.world_model](options, config.horizon, normalizer, action_bounds, device)


def _check_own_denoiser(
    denoiser: nn.Module, config: TrainConfig, normalizer: Normalizer, device: torch.device
) -> None:
    """Raise InputError unless this is a denoiser for the environment and configuration."""
    if isinstance(denoiser, nn.Module):
        denoiser.to(device)
    check_denoiser(denoiser, config.schedule.num_train_timesteps, device, trained=True)
    for name, wanted, source in (
        ("observation_dim", normalizer.observation_dim, "environment"),
        ("action_dim", normalizer.action_dim, "environment"),
        ("horizon", config.horizon, "config"),
    ):
        got = getattr(denoiser, name)
        if got != wanted:
            raise InputError(
                f"denoiser {type(denoiser).__name__}: {name} must be the {source}'s {wanted}, got "
                f"{got}"
            )
