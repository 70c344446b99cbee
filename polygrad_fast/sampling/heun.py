"""The stochastic Heun sampler (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from polygrad_fast.config import EDMConfig
from polygrad_fast.diffusion.edm import NoiseLevels
from polygrad_fast.errors import InputError

Denoise = Callable[[Tensor, float], Tensor]
"""D(x; sigma): [B, L, D] -> a new [B, L, D], at one noise level of the sampler's."""
SIGMA_OFFSET = 1e-9
"""Added to the divisor of the second slope, as released."""


@dataclass(frozen=True)
class Step:
    """Where a sampler stands when it calls its guidance.

    Attributes:
        index: i, 0 at the highest noise level.
        levels: all noise levels; this step is at `levels.sigma[index]`.
        denoise: D(x; sigma_i) at this step's noise level, [B, L, D] -> [B, L, D]. Costs one
            evaluation of the network.
    """

    index: int
    levels: NoiseLevels
    denoise: Callable[[Tensor], Tensor]


class Guidance(Protocol):
    """What moves the trajectories at the start of every step."""

    def __call__(self, trajectories: Tensor, step: Step) -> Tensor:
        """Return the moved trajectories x_i, [B, L, D], normalized and as noisy as before; the
        argument stays as it is."""


@dataclass(frozen=True, eq=False)
class FixedEntries:
    """Entries that are known: at the start, after guidance, after every Euler point and step, they
    get their values.

    The noise that a step adds is added to them too, so that its first evaluation sees noisy ones,
    as in DyDiff's released code.

    Args:
        mask: bool, which entries are known, [L, D] or [B, L, D].
        values: normalized, of the mask's shape or broadcast with it to [B, L, D].
    """

    mask: Tensor
    values: Tensor

    def __call__(self, trajectories: Tensor) -> Tensor:
        """Return the trajectories [B, L, D] with the known entries put in."""
        return torch.where(self.mask, self.values.to(trajectories.dtype), trajectories)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise InputError unless they fit trajectories of that shape, [B, L, D]."""
        try:
            both = torch.broadcast_shapes(self.mask.shape, self.values.shape)
            fits = tuple(torch.broadcast_shapes(both, shape)) == tuple(shape)
        except RuntimeError:
            fits = False
        if not fits or self.mask.dtype != torch.bool:
            raise InputError(
                f"conditions must be a bool mask and values that broadcast to {tuple(shape)}, got "
                f"a mask of {self.mask.dtype} and shape {tuple(self.mask.shape)}, values of shape "
                f"{tuple(self.values.shape)}"
            )


class StepResult(NamedTuple):
    """What one step computes, [B, L, D] each."""

    guided: Tensor  # x_i after guidance
    churned: Tensor  # x_i with noise added, at sigma_hat
    denoised: Tensor  # D(churned; sigma_hat)
    euler: Tensor  # the Euler point
    trajectories: Tensor  # x_{i+1}


def heun_step(
    trajectories: Tensor,
    index: int,
    levels: NoiseLevels,
    config: EDMConfig,
    denoise: Denoise,
    noise: Tensor | None,
    guidance: Guidance | None = None,
    conditions: FixedEntries | None = None,
) -> StepResult:
    """Take step i from sigma_i to sigma_{i+1} (algorithm 2, lines 4 to 11).

    x^ = x + sqrt(sigma^2 (1 + gamma)^2 - sigma^2) s_noise noise; d = (x^ - D(x^)) / sigma^;
    Euler point = x or x^ (`euler_from`) + (sigma' - sigma^) d; d' = (Euler point - D) / sigma';
    x' = x^ + (sigma' - sigma^) (d + d') / 2, or the Euler point where sigma' = 0.

    Args:
        trajectories: x_i, normalized [B, L, D]; stays as it is.
        index: i.
        levels, config: noise levels, and the options of the step.
        denoise: D(x; sigma).
        noise: standard normals [B, L, D]; None where gamma_i is 0, which needs none.
        guidance: called once, before noise is added.
        conditions: known entries.
    """
    sigma, sigma_next = levels.sigma[index], levels.sigma[index + 1]
    sigma_hat, gamma = levels.sigma_hat[index], levels.gamma[index]
    x = trajectories
    if guidance is not None:
        x = guidance(x, Step(index, levels, lambda y: denoise(y, sigma)))
        x = x if conditions is None else conditions(x)

    x_hat = x
    if gamma > 0.0:
        x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * config.s_noise * noise

    denoised = denoise(x_hat, sigma_hat)
    slope = (x_hat - denoised) / sigma_hat
    start = x if config.euler_from == "trajectory" else x_hat
    euler = start + (sigma_next - sigma_hat) * slope
    euler = euler if conditions is None else conditions(euler)

    result = euler
    if config.second_order and sigma_next > 0.0:
        second_slope = (euler - denoise(euler, sigma_next)) / (sigma_next + SIGMA_OFFSET)
        result = x_hat + (sigma_next - sigma_hat) * (slope + second_slope) / 2
        result = result if conditions is None else conditions(result)
    return StepResult(x, x_hat, denoised, euler, result)


def heun_sample(
    initial_noise: Tensor,
    step_noise: Iterable[Tensor | None],
    config: EDMConfig,
    denoise: Denoise,
    guidance: Guidance | None = None,
    conditions: FixedEntries | None = None,
    return_chain: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sample trajectories (algorithm 2): x_0 = sigma_0 noise, then N steps.

    Args:
        initial_noise: standard normals [B, L, D].
        step_noise: N standard normals [B, L, D], in order; None where gamma_i is 0.
        config: noise levels and options.
        denoise: D(x; sigma); called 2 N - 1 times, and by the guidance.
        guidance, conditions: see `heun_step`.
        return_chain: also return x after every step.

    Returns:
        Normalized trajectories [B, L, D], and the chain [N, B, L, D] or None.
    """
    levels = NoiseLevels.of(config)
    x = levels.sigma[0] * initial_noise
    x = x if conditions is None else conditions(x)
    chain = []
    for index, noise in zip(range(levels.num_steps), step_noise, strict=True):
        x = heun_step(x, index, levels, config, denoise, noise, guidance, conditions).trajectories
        if return_chain:
            chain.append(x)
    return x, torch.stack(chain) if return_chain else None
