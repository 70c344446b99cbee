"""The guidance scale that a policy needs, found outside of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.learners.advantages import spread
from polygrad_fast.world_models import WorldModel


@torch.no_grad()
def tune_guidance(
    world_model: WorldModel,
    policy: Any,
    draw: Callable[[torch.Generator], Tensor],
    generator: torch.Generator,
    num_samples: int,
) -> None:
    """Let a world model that has a guidance scale find the one for a policy, as training does
    (equation 10): by the spread of standardized actions but for the last of each trajectory.

    Args:
        world_model: its scale is changed.
        policy: called at raw observations.
        draw: returns raw starts [B, S] of a sample.
        generator: of starts and imagination.
        num_samples: after each of which the scale moves.
    """
    for _ in range(num_samples):
        batch = world_model.imagine(draw(generator), policy, generator)
        mean, std = policy(batch.observations)
        z = ((batch.actions - mean) / std)[:, :-1]
        names = {"action_std": "std", "action_mean_abs": "mean_abs"}
        world_model.feedback({name: spread(z, kind) for name, kind in names.items()})
