"""Are imagined actions the policy's, whatever its standard deviation? (figures 3 and 13 to 16)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.diagnostics.on_policy import (
    OnPolicyStatistics,
    on_policy_statistics,
    standardized_actions,
)
from polygrad_fast.diagnostics.rollouts import imagine
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.terminals import alive_steps
from polygrad_fast.world_models import WorldModel


@dataclass(frozen=True)
class ActionReport:
    """Standardized actions imagined under the policy with one standard deviation."""

    sigma: float
    statistics: OnPolicyStatistics
    mean: float
    """Of all entries of z; 0 on-policy."""
    kurtosis: float
    """Mean over action dimensions of E[(z - E z)^4] / Var[z]^2; 3 on-policy."""
    beyond_3: float
    """Share of the entries of z beyond 3 in magnitude; 0.0027 on-policy."""
    values: np.ndarray
    """All entries of z that count, [n]."""

    def summary(self) -> dict[str, float]:
        """Return everything but the values as numbers by name."""
        numbers = {name: getattr(self, name) for name in ("mean", "kurtosis", "beyond_3")}
        return {"sigma": self.sigma, **vars(self.statistics), **numbers, "num": len(self.values)}


def action_report(
    world_model: WorldModel,
    policy: GaussianPolicy,
    normalizer: Normalizer,
    observations: Tensor,
    sigma: float,
    seed: int = 0,
    batch_size: int = 1024,
    progress: bool = False,
) -> ActionReport:
    """Imagine a trajectory from each raw observation [N, S] under the policy's means with the
    standard deviation sigma in every action, and standardize its actions.

    Args:
        world_model, policy, normalizer: of the run; nothing of them changes.
        seed: of imagination; the same for all sigmas gives them the same noise.
        batch_size: trajectories imagined at a time.
        progress: show a progress bar.

    Raises:
        InputError: sigma is not a positive finite number, or fewer than 4 observations.
        NonFiniteError: something imagined is not finite.
    """
    if len(observations) < 4:
        raise InputError(
            f"observations must be at least 4 (R2 is measured on every fourth trajectory), got "
            f"{len(observations)}"
        )
    changed = policy.with_std(sigma)
    batch = imagine(
        world_model,
        changed,
        normalizer.normalize(observations, "observations"),
        torch.Generator(observations.device).manual_seed(as_integer(seed, "seed", 0)),
        batch_size,
        progress=progress,
    )
    flags = (normalizer.unnormalize(batch.terminals, "terminals") > 0.5).to(batch.rewards.dtype)
    z = standardized_actions(changed, normalizer, batch.observations, batch.actions)
    z = z[alive_steps(flags)].double()
    centred = z - z.mean(dim=0)
    variance = centred.square().mean(dim=0)
    return ActionReport(
        sigma=float(sigma),
        statistics=on_policy_statistics(
            changed, normalizer, batch.observations, batch.actions, flags
        ),
        mean=z.mean().item(),
        kurtosis=(centred.pow(4).mean(dim=0) / variance.square().clamp(min=1e-24)).mean().item(),
        beyond_3=(z.abs() > 3).double().mean().item(),
        values=z.flatten().cpu().numpy(),
    )


def action_table(reports: Sequence[ActionReport]) -> str:
    """Return reports as lines of text."""
    columns = ("sigma", "mean", "std", "kurtosis", "ks", "ks_floor", "beyond_3", "r2")
    lines = ["".join(f"{name:>10}" for name in columns) + f"{'autocorrelation':>17}"]
    for report in reports:
        numbers = report.summary()
        cells = [f"{numbers['sigma']:>10g}"]
        cells += [f"{numbers[name]:>10.4f}" for name in columns[1:]]
        lines.append("".join(cells) + f"{numbers['autocorrelation']:>17.4f}")
    normal = {"mean": 0, "std": 1, "kurtosis": 3, "beyond_3": 0.0027, "r2": 0}
    cells = [f"{normal[name]:>10g}" if name in normal else " " * 10 for name in columns[1:]]
    lines.append(f"{'on-policy':>10}" + "".join(cells) + f"{0:>17}")
    return "\n".join(lines)
