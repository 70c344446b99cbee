"""Denoising diffusion: the noise schedule and the denoising loss (Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.config import SamplerConfig
from polygrad_fast.errors import InputError


@dataclass(frozen=True)
class NoiseSchedule:
    """Constants of a diffusion process with K steps, one float32 tensor [K] each, index 0 = least
    noise.

    The paper counts steps i = K..1; index k here is i - 1.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor

    @classmethod
    def cosine(cls, num_train_timesteps: int = 128, tau: float = 1.0) -> NoiseSchedule:
        """Build the cosine schedule of Chen 2023 (arXiv 2301.10972, Algorithm 1), start 0, end 1.

        gamma(s) = (v_end - cos(s pi/2)^(2 tau)) / (v_end - v_start)
        beta_i = 1 - gamma(s_i) / gamma(s_{i-1}), clipped to [0, 0.999]

        Args:
            num_train_timesteps: number of diffusion steps K, at least 1.
            tau: temperature, > 0. 1 in the paper, 0.1 for Hopper with the residual MLP.

        Raises:
            InputError: K < 1 or tau not a positive finite number, or a table cannot be represented
                in float32 (K too large, or tau extreme).
        """
        if not isinstance(num_train_timesteps, (int, np.integer)) or num_train_timesteps < 1:
            raise InputError(
                f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}"
            )
        if not (isinstance(tau, (int, float, np.number)) and 0 < tau < np.inf):
            raise InputError(f"tau must be a positive finite number, got {tau!r}")
        s = np.linspace(0.0, 1.0, int(num_train_timesteps) + 1)
        v_start, v_end = np.cos(0.0) ** (2 * tau), np.cos(np.pi / 2) ** (2 * tau)
        with np.errstate(invalid="ignore", divide="ignore"):  # reported below
            gamma = (v_end - np.cos(s * np.pi / 2) ** (2 * tau)) / (v_end - v_start)
            betas = np.clip(1.0 - gamma[1:] / gamma[:-1], 0.0, 0.999)
        schedule = cls._derive(torch.tensor(betas, dtype=torch.float32))
        if not schedule._is_finite():
            raise InputError(
                f"num_train_timesteps must be smaller or tau nearer to 1 for tables that are "
                f"finite in float32, got num_train_timesteps {num_train_timesteps} with tau {tau}"
            )
        return schedule

    @classmethod
    def from_betas(cls, betas: Tensor | np.ndarray | Sequence[float]) -> NoiseSchedule:
        """Derive every table from the variances beta [K], each in (0, 1).

        Args:
            betas: a tensor of float32 or float64, whose dtype and device the tables get, or an
                array or a list of numbers (float32).

        Raises:
            InputError: no numbers, not one axis of at least one, a beta outside (0, 1), or betas so
                small, or so large together, that a table is not finite.
        """
        if not torch.is_tensor(betas):
            try:
                betas = torch.from_numpy(np.array(betas, dtype=np.float32))
            except (TypeError, ValueError):
                raise InputError(
                    f"betas must be numbers, a tensor, an array or a list of them, got {betas!r}"
                ) from None
        if betas.dtype not in (torch.float32, torch.float64):
            raise InputError(f"betas must be float32 or float64, got {betas.dtype}")
        if betas.ndim != 1 or len(betas) < 1:
            raise InputError(
                f"betas must be of shape [K] with K at least 1, got shape {tuple(betas.shape)}"
            )
        wrong = ~((betas > 0) & (betas < 1))  # NaN too
        if wrong.any():
            k = int(wrong.nonzero()[0])
            raise InputError(f"betas[{k}] must be in (0, 1), got {betas[k].item()}")
        schedule = cls._derive(betas)
        if not schedule._is_finite():
            wanted = "larger" if schedule.alphas_cumprod[0] == 1 else "smaller or fewer"
            raise InputError(
                f"betas must be {wanted} or of float64 for tables that are finite, got "
                f"{len(betas)} of {betas.dtype} from {betas.min().item()} to {betas.max().item()}"
            )
        return schedule

    def respaced(self, num_inference_steps: int | None) -> NoiseSchedule:
        """Return the schedule of a subset of the steps, for sampling in fewer of them (Nichol and
        Dhariwal 2021, arXiv 2102.09672, section 4).

        Kept are the steps nearest to n evenly spaced points from the first to the last, both
        included ("linspace" in diffusers); of one step, the last. With alphabar_j those that are
        kept, beta_j = 1 - alphabar_j / alphabar_{j-1}, and every table follows from these betas,
        in float64. The denoiser is asked at the original steps, `timesteps`. All steps, or None,
        are the schedule itself.

        Raises:
            InputError: not an integer from 1 to the number of steps, or so few that a table is not
                finite.
        """
        n, num_steps = num_inference_steps, self.num_train_timesteps
        if n is None or n == num_steps:
            return self
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or not 1 <= n <= num_steps:
            raise InputError(
                f"num_inference_steps must be from 1 to num_train_timesteps {num_steps}, got {n!r}"
            )
        kept = np.linspace(0, num_steps - 1, n).round().astype(int).tolist()
        if n == 1:
            kept = [num_steps - 1]  # the first to be sampled, from pure noise
        alphas_cumprod = (1.0 - self.betas.double()).cumprod(dim=0)[kept]
        previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
        exact = self._derive(1.0 - alphas_cumprod / previous, alphas_cumprod / previous)
        tables = vars(exact.to(self.betas.dtype))
        schedule = RespacedSchedule(**tables, kept=tuple(self.timesteps[k] for k in kept))
        if not schedule._is_finite():
            raise InputError(
                f"num_inference_steps must be larger for tables that are finite in "
                f"{self.betas.dtype}, got {n}"
            )
        return schedule

    def _is_finite(self) -> bool:
        return all(torch.isfinite(getattr(self, name)).all() for name in TABLES)

    @staticmethod
    def _derive(betas: Tensor, alphas: Tensor | None = None) -> NoiseSchedule:
        """Derive every table from beta and, where 1 - beta would lose its digits, alpha."""
        alphas = 1.0 - betas if alphas is None else alphas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = torch.cat([torch.ones_like(betas[:1]), alphas_cumprod[:-1]])
        posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        return NoiseSchedule(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=alphas_cumprod_prev,
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=torch.log(posterior_variance.clamp(min=1e-20)),
            posterior_mean_coef1=betas * alphas_cumprod_prev.sqrt() / (1.0 - alphas_cumprod),
            posterior_mean_coef2=(1.0 - alphas_cumprod_prev)
            * alphas.sqrt()
            / (1.0 - alphas_cumprod),
            sqrt_recip_alphas_cumprod=torch.sqrt(1.0 / alphas_cumprod),
            sqrt_recipm1_alphas_cumprod=torch.sqrt(1.0 / alphas_cumprod - 1),
        )

    @property
    def num_train_timesteps(self) -> int:
        """Number of diffusion steps K; of a respaced schedule, of those kept."""
        return self.betas.shape[0]

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The steps of training that index 0 .. K-1 stands for, which a denoiser is asked at."""
        return tuple(range(self.num_train_timesteps))

    @property
    def epsilon_error_gain(self) -> Tensor:
        """By how much each reverse step multiplies an error of eps_hat, [K]: equation 1's
        beta_i / (sqrt(1 - alphabar_i) sqrt(1 - beta_i))."""
        alphas = 1.0 - self.betas.double()  # in float32, 1 - alphabar loses its first digits
        gain = (1.0 - alphas) / ((1.0 - alphas.cumprod(dim=0)) * alphas).sqrt()
        return gain.to(self.betas.dtype)

    def step_coefficients(self, variance_type: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return what one reverse step x <- a x0_hat + b x + c z needs: a, b and c, [K] each.

        a x0_hat + b x is the DDPM posterior mean, which equals equation 1's
        (x - beta / sqrt(1 - alphabar) eps_hat) / sqrt(1 - beta) for the noise eps_hat that x0_hat
        implies. "posterior": the released code's float32 tables and the posterior's standard
        deviation, 0 in the last step. "beta": equation 1, with a and b from float64 (in float32
        cancellation makes a[0] 1.0002 instead of 1 at K = 128), and c = sqrt(beta).

        Raises:
            InputError: another variance_type.
        """
        if variance_type == "posterior":
            noise_std = torch.exp(0.5 * self.posterior_log_variance_clipped)
            noise_std[0] = 0.0
            return self.posterior_mean_coef1, self.posterior_mean_coef2, noise_std
        if variance_type != "beta":
            raise InputError(f"variance_type must be 'posterior' or 'beta', got {variance_type!r}")
        exact = self._derive(self.betas.double())
        coefficients = (exact.posterior_mean_coef1, exact.posterior_mean_coef2)
        return *(c.to(self.betas.dtype) for c in coefficients), self.betas.sqrt()

    def to(self, *args, **kwargs) -> NoiseSchedule:
        """Return the same schedule on another device or in another dtype."""
        tables = {name: getattr(self, name).to(*args, **kwargs) for name in TABLES}
        return replace(self, **tables)


TABLES = tuple(field.name for field in fields(NoiseSchedule))
"""Names of a schedule's tables, the released diffusion model's buffers."""


@dataclass(frozen=True)
class RespacedSchedule(NoiseSchedule):
    """Some of the steps of another schedule; see `NoiseSchedule.respaced`."""

    kept: tuple[int, ...]

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The steps of training that are kept."""
        return self.kept


LARGEST_EPSILON_ERROR_GAIN = 3.0
"""Largest `NoiseSchedule.epsilon_error_gain` for which noise is predicted without a warning.

States have a standard deviation of about 1 in every step, and denoisers are trained on those only.
After some thousand updates they err by 0.2 or more (root mean square). Times the gain that
displaces the next step's states: by 0.6 at this limit, by 6 in the first step of a cosine schedule,
whose beta ends at 0.999 for every K and tau. So far out a denoiser hardly corrects the error, and
later steps multiply it on.
"""


def warn_of_amplified_errors(
    schedule: NoiseSchedule, config: SamplerConfig, stacklevel: int = 2
) -> None:
    """Warn where a denoiser's error is multiplied beyond what later steps correct."""
    schedule = schedule.respaced(config.num_inference_steps)
    gain = schedule.epsilon_error_gain.max().item()
    if config.prediction_type == "epsilon" and gain > LARGEST_EPSILON_ERROR_GAIN:
        warnings.warn(
            f"prediction_type 'epsilon' with this noise schedule multiplies the denoiser's error "
            f"by {gain:.0f} in one diffusion step, so imagined states and rewards are far off "
            f"until the denoiser is well trained: prediction_type 'sample' "
            f"(--sampler.prediction-type sample) or the preset 'default' avoids it",
            stacklevel=stacklevel + 1,
        )


def denoising_loss(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    trajectory: Tensor,
    actions: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    config: SamplerConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the denoising loss with the first observation given (Algorithm 1, line 6).

    x_i = sqrt(alphabar_i) x + sqrt(1 - alphabar_i) eps

    The clean first observation is put back into x_i and into the prediction; the loss is the
    prediction's mean squared error against eps or x.

    Args:
        denoiser: called once, in the mode it is in.
        trajectory: clean, normalized [B, H, D].
        actions: normalized [B, H, A], already clipped if the model is to see clipped actions.
        timesteps: 0-based steps [B].
        noise: standard normals [B, H, D].
        schedule: of K steps.
        config: what is predicted, and whether actions are scaled.

    Returns:
        The scalar loss, and detached scalars for observations, rewards and terminals.
    """
    observation_dim = trajectory.shape[-1] - 2
    alphas_cumprod = schedule.alphas_cumprod[timesteps].view(-1, 1, 1)
    noisy = alphas_cumprod.sqrt() * trajectory + (1.0 - alphas_cumprod).sqrt() * noise
    noisy[:, 0, :observation_dim] = trajectory[:, 0, :observation_dim]
    if config.scale_actions:
        actions = alphas_cumprod.sqrt() * actions
    prediction = denoiser(noisy, actions.clone(), timesteps).to(trajectory.dtype, copy=True)
    prediction[:, 0, :observation_dim] = trajectory[:, 0, :observation_dim]
    target = noise if config.prediction_type == "epsilon" else trajectory
    squared_error = (prediction - target).square()
    with torch.no_grad():
        parts = {
            "observation_loss": squared_error[..., :observation_dim].mean(),
            "reward_loss": squared_error[..., -2].mean(),
            "terminal_loss": squared_error[..., -1].mean(),
        }
    return squared_error.mean(), parts
