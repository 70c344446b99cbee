"""Are imagined actions drawn from the policy? Statistics of z = (a - mu(s)) / sigma(s)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import policy_moments, reads_normalized
from polygrad_fast.terminals import alive_steps

PRIOR_R2 = 0.1
"""What the ridge expects of all features together: its penalty is their number over this, so that
features without any effect cost little R2 also in small batches."""


@dataclass(frozen=True)
class OnPolicyStatistics:
    """Of n standardized actions; on-policy ones have r2 0, std 1, ks about ks_floor and
    autocorrelation 0."""

    r2: float
    """Share of z's mean square that a ridge regression on the action's own state explains, in the
    quarter of the trajectories that it has not seen; slightly negative where there is nothing."""
    std: float
    """Mean over action dimensions of the standard deviation."""
    ks: float
    """Largest difference between the distribution of all entries of z and N(0, 1)."""
    ks_floor: float
    """Mean of `ks` for as many independent draws of N(0, 1): sqrt(pi / 2) log 2 / sqrt(n)."""
    autocorrelation: float
    """Correlation of z at one step and the next."""


@torch.no_grad()
def on_policy_statistics(
    policy: nn.Module,
    normalizer: Normalizer,
    observations: Tensor,
    actions: Tensor,
    terminals: Tensor,
) -> OnPolicyStatistics:
    """Measure the actions of at least 4 trajectories against the policy.

    The actions up to the first terminal step count; of the last step of the horizon, which the
    policy does not learn from, too.

    Args:
        observations, actions: normalized [B, H, S] and [B, H, A].
        terminals: 0/1 [B, H].
    """
    z = standardized_actions(policy, normalizer, observations, actions)
    alive = alive_steps(terminals)
    features = _features(policy, normalizer, observations)
    held_out = torch.arange(len(z), device=z.device) % 4 == 3
    of_training = alive & ~held_out.unsqueeze(1)
    of_test = alive & held_out.unsqueeze(1)
    z_alive = z[alive].double()
    pairs = alive[:, :-1] & alive[:, 1:]
    now, following = z[:, :-1][pairs].flatten(), z[:, 1:][pairs].flatten()
    return OnPolicyStatistics(
        r2=_ridge_r2(features[of_training], z[of_training], features[of_test], z[of_test]),
        std=z_alive.std(dim=0).mean().item(),
        ks=kolmogorov_smirnov(z_alive.flatten()),
        ks_floor=math.sqrt(math.pi / 2) * math.log(2) / math.sqrt(z_alive.numel()),
        autocorrelation=_correlation(now, following),
    )


@torch.no_grad()
def standardized_actions(
    policy: nn.Module, normalizer: Normalizer, observations: Tensor, actions: Tensor
) -> Tensor:
    """Return z = (a - mu(s)) / sigma(s) [B, H, A] of normalized actions at normalized
    observations."""
    mean, std = policy_moments(policy, normalizer, observations, normalized=True)
    return (normalizer.unnormalize(actions, "actions") - mean) / std


def kolmogorov_smirnov(values: Tensor) -> float:
    """Return the largest difference between the distribution of values [n] and N(0, 1)."""
    values, _ = values.double().flatten().sort()
    n = len(values)
    below = torch.special.ndtr(values)
    steps = torch.arange(n + 1, device=values.device, dtype=torch.float64) / n
    return torch.maximum(steps[1:] - below, below - steps[:-1]).max().item()


def _features(policy: nn.Module, normalizer: Normalizer, observations: Tensor) -> Tensor:
    """Return what z is predicted from: the state, and what the policy's last layer reads, where its
    `network` is a sequence of modules."""
    network = getattr(policy, "network", None)
    if not isinstance(network, nn.Sequential) or len(network) < 2:
        return observations
    inputs = observations
    if not reads_normalized(policy):
        inputs = normalizer.unnormalize(observations, "observations")
    return torch.cat([observations, network[:-1](inputs).to(observations.dtype)], dim=-1)


def _ridge_r2(features: Tensor, z: Tensor, new_features: Tensor, new_z: Tensor) -> float:
    """Fit z [n, A] by features [n, F] and return the share of the mean square of `new_z` that the
    fit explains."""
    features, z, new_features, new_z = (x.double() for x in (features, z, new_features, new_z))
    mean, scale = features.mean(dim=0), features.std(dim=0) + 1e-6

    def design(x: Tensor) -> Tensor:
        return torch.cat([(x - mean) / scale, torch.ones_like(x[:, :1])], dim=1)

    x = design(features)
    penalty = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) * (x.shape[1] / PRIOR_R2)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ z)
    errors = new_z - design(new_features) @ weights
    return 1.0 - (errors.square().mean() / new_z.square().mean().clamp(min=1e-12)).item()


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two vectors; 0 where one is constant or there is no pair."""
    if len(a) < 2:
        return 0.0
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms > 0 else 0.0
