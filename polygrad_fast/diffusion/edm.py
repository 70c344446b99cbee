"""EDM (Karras et al. 2022, arXiv 2206.00364): noise levels, preconditioning, loss, trainer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.config import AutoregressiveDiffusionConfig, EDMConfig, EDMTrainingConfig
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.errors import InputError

Network = Callable[[Tensor, Tensor], Tensor]
"""F_theta(c_in x, c_noise): [B, L, D], [B] -> [B, L, D]; `TemporalUNet`, for instance."""


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels of a sampler with N steps, computed in float64.

    Attributes:
        sigma: sigma_0 > ... > sigma_{N-1} > sigma_N = 0, in normalized units.
        gamma: by which share step i raises the noise level before it lowers it, N numbers.
    """

    sigma: tuple[float, ...]
    gamma: tuple[float, ...]

    @classmethod
    def of(cls, config: EDMConfig) -> NoiseLevels:
        """Compute them (equation 5 and algorithm 2).

        sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
        gamma_i = min(s_churn / N, sqrt(2) - 1) where s_tmin <= sigma_i <= s_tmax, else 0
        """
        c, n = config, config.num_inference_steps
        first, last = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
        sigma = [(first + i / (n - 1) * (last - first)) ** c.rho for i in range(n)]
        gamma = min(c.s_churn / n, math.sqrt(2.0) - 1.0)
        gammas = [gamma if c.s_tmin <= s <= c.s_tmax else 0.0 for s in sigma]
        return cls((*sigma, 0.0), tuple(gammas))

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.gamma)

    @functools.cached_property
    def sigma_hat(self) -> tuple[float, ...]:
        """Raised noise levels sigma_i (1 + gamma_i), N numbers."""
        return tuple(s * (1.0 + g) for s, g in zip(self.sigma, self.gamma, strict=False))


class Preconditioning(NamedTuple):
    """Factors of EDM's denoiser, in the shape and dtype of sigma.

    D(x; sigma) = c_skip x + c_out F_theta(c_in x, c_noise)
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """Return c_skip = sd^2 / (sigma^2 + sd^2), c_out = sigma sd / sqrt(sigma^2 + sd^2),
    c_in = 1 / sqrt(sigma^2 + sd^2) and c_noise = ln(sigma) / 4 (table 1), sd = sigma_data.

    Args:
        sigma: positive noise levels, floating point of any shape.
        sigma_data: standard deviation of the data.
    """
    variance = sigma.square() + sigma_data**2
    root = variance.sqrt()
    return Preconditioning(
        sigma_data**2 / variance, sigma * sigma_data / root, 1.0 / root, sigma.log() / 4.0
    )


def denoise(network: Network, trajectory: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Return D(x; sigma), the expected clean trajectory: [B, L, D], [B] -> [B, L, D].

    The factors are computed in the trajectory's dtype, and the network is called in it.
    """
    c = preconditioning(sigma, sigma_data)
    c_skip, c_out, c_in = (factor.view(-1, 1, 1) for factor in (c.c_skip, c.c_out, c.c_in))
    return c_skip * trajectory + c_out * network(c_in * trajectory, c.c_noise)


def training_sigma(
    sigma_normal: Tensor, config: EDMTrainingConfig | AutoregressiveDiffusionConfig
) -> Tensor:
    """Return the noise levels exp(p_mean + p_std n) of standard normals n, [B] -> [B]."""
    return torch.exp(config.p_mean + config.p_std * sigma_normal)


def edm_loss(
    network: Network,
    batch: Tensor,
    sigma: Tensor,
    noise: Tensor,
    sigma_data: float,
    entry_weights: Tensor | None = None,
) -> Tensor:
    """Return the denoising loss, a scalar (equations 2 and 7, table 1).

    mean over all entries of (sigma^2 + sd^2) / (sigma sd)^2 (D(y + sigma n; sigma) - y)^2

    Args:
        network: called once, in the mode it is in.
        batch: clean normalized trajectories y, [B, L, D].
        sigma: one noise level per trajectory, [B].
        noise: standard normals n, [B, L, D].
        sigma_data: standard deviation of the data.
        entry_weights: how much each entry counts in the mean, [B, L, D]; None: all alike.
    """
    level = sigma.view(-1, 1, 1)
    denoised = denoise(network, batch + level * noise, sigma, sigma_data)
    weight = (level.square() + sigma_data**2) / (level * sigma_data).square()
    errors = weight * (denoised - batch).square()
    if entry_weights is None:
        return errors.mean()
    return (errors * entry_weights).sum() / entry_weights.sum().clamp(min=1.0)


def num_training_updates(num_windows: int, config: EDMTrainingConfig) -> int:
    """Return T, the updates of all epochs: (windows // batch) epochs.

    Raises:
        InputError: fewer windows than a batch holds.
    """
    if num_windows < config.batch_size:
        raise InputError(
            f"batch_size must be at most the number of windows, {num_windows}, got "
            f"{config.batch_size}"
        )
    return num_windows // config.batch_size * config.num_epochs


def epoch_batches(
    num_windows: int, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield the indices of an epoch's batches, int64 [batch_size] each: a permutation whose first
    (windows mod batch) entries are left out, as released."""
    order = torch.randperm(num_windows, generator=generator)
    yield from order[num_windows % batch_size :].view(-1, batch_size)


def learning_rate(update: int, num_updates: int, config: EDMTrainingConfig) -> float:
    """Return the learning rate of update 0, 1, ..: from a tenth of the highest, linearly up to it
    in the first w = int(warmup_fraction T) updates, then half a cosine down to 0 at update T.

    Args:
        update: its number, from 0.
        num_updates: T.
        config: highest rate and warm-up.
    """
    warmup = int(config.warmup_fraction * num_updates)
    highest = config.learning_rate
    if update < warmup:
        return highest * (0.1 + 0.9 * update / warmup)
    share = min((update - warmup) / max(num_updates - warmup, 1), 1.0)
    return highest * 0.5 * (1.0 + math.cos(math.pi * share))


class EDMTrainer(AveragedTrainer):
    """Adam on EDM's loss, and the averaged copy that is used for sampling.

    Args:
        model: F_theta; its weights change in place.
        total_updates: T, of the whole training, for the learning rate; see `num_training_updates`.
        config: noise levels, learning rate and averaging.
        sigma_data: standard deviation of the data, that of the sampler.

    Raises:
        InputError: T is less than 1, or the network cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        total_updates: int,
        config: EDMTrainingConfig | None = None,
        sigma_data: float = 1.0,
    ):
        self.config = c = config or EDMTrainingConfig()
        self.total_updates = as_integer(total_updates, "total_updates", 1)
        self.sigma_data = sigma_data
        super().__init__(
            model, c.learning_rate, c.ema_decay, c.ema_interval, average_at_start=False
        )

    def update(
        self,
        batch: Tensor,
        generator: torch.Generator | None = None,
        sigma_normal: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor | float]:
        """Take one gradient step on normalized trajectories.

        Args:
            batch: [B, L, D].
            generator: source of the normals that are not given; default torch's.
            sigma_normal: standard normals of the noise levels, [B].
            noise: standard normals of the entries, [B, L, D].

        Returns:
            The detached loss, a scalar, and the learning rate.
        """
        options = {"generator": generator, "device": batch.device, "dtype": batch.dtype}
        if sigma_normal is None:
            sigma_normal = torch.randn(len(batch), **options)
        if noise is None:
            noise = torch.randn(batch.shape, **options)
        rate = learning_rate(self.num_updates, self.total_updates, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sigma = training_sigma(sigma_normal, self.config)
        loss = edm_loss(self.model, batch, sigma, noise, self.sigma_data)
        self.minimize(loss)
        return {"loss": loss.detach(), "learning_rate": rate}
