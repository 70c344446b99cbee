"""Options of policy-guided diffusion (arXiv 2404.06356): network, EDM, its training, guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polygrad_fast.config.options import Options, replace_options


@dataclass(frozen=True)
class TemporalUNetConfig(Options):
    """The U-Net. The sizes are those of paper and released code."""

    features: int = 1024
    """Width of the first level; each further one has twice that."""
    num_levels: int = 3
    norm_over: Literal["row", "window"] = "row"
    """What GroupNorms take their moments over besides a group's channels: each row alone, as
    released, or all rows of the window. With few channels in a group the first hides how large the
    inputs of a row are."""

    def _check_ranges(self) -> None:
        self._check_at_least(16, "features")
        self._check(self.features % 8 == 0, "features", "a multiple of 8")
        self._check_at_least(1, "num_levels")


@dataclass(frozen=True)
class EDMConfig(Options):
    """Noise levels and stochastic sampler of EDM (Karras et al. 2022, arXiv 2206.00364, equation 5
    and algorithm 2). The defaults are the released code's of policy-guided diffusion."""

    num_inference_steps: int = 256
    """N, of which each but the last evaluates the denoiser twice."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 1.0
    s_churn: float = 80.0
    """Amount of noise added anew, over all steps; 0: a deterministic sampler."""
    s_tmin: float = 0.05
    """Noise levels below this, or above `s_tmax`, get no noise anew."""
    s_tmax: float = 50.0
    s_noise: float = 1.003
    """Standard deviation of that noise."""
    second_order: bool = True
    """Heun's method; False: Euler's."""
    euler_from: Literal["trajectory", "churned"] = "trajectory"
    """Where Euler's step starts: at the trajectory before noise was added anew (released code) or
    after (Karras et al., algorithm 2). Heun's correction starts after it in both. With few steps
    and much churn the former widens the samples: on a linear system with s_churn = 80 to 1.6 to
    2.3 times the latter's standard deviation by N = 20, to 1.05 times by N = 256."""

    def _check_ranges(self) -> None:
        self._check_at_least(2, "num_inference_steps")
        self._check_positive("sigma_min", "rho", "sigma_data")
        self._check(self.sigma_max > self.sigma_min, "sigma_max", f"above {self.sigma_min}")
        self._check_at_least(0, "s_churn", "s_tmin", "s_noise")
        self._check(self.s_tmax >= self.s_tmin, "s_tmax", f"at least s_tmin, {self.s_tmin}")

    @classmethod
    def paper(cls, **overrides: Any) -> EDMConfig:
        """Return algorithm 2 of Karras et al. with the paper's constants, with keyword
        overrides."""
        return replace_options(cls(euler_from="churned"), overrides)


@dataclass(frozen=True)
class EDMTrainingConfig(Options):
    """Training of the denoiser. The defaults are the released code's."""

    p_mean: float = -1.2
    """Mean and standard deviation of the logarithm of the noise levels of a batch."""
    p_std: float = 1.2
    learning_rate: float = 2e-3
    """The highest one; see `polygrad_fast.diffusion.edm.learning_rate`."""
    warmup_fraction: float = 0.1
    """Share of the updates in which the learning rate rises from a tenth."""
    batch_size: int = 32
    num_epochs: int = 10_000
    ema_decay: float = 0.995
    ema_interval: int = 10
    """Updates between two of the average's."""

    def _check_ranges(self) -> None:
        self._check_positive("p_std", "learning_rate")
        self._check(0 <= self.warmup_fraction < 1, "warmup_fraction", "in [0, 1)")
        self._check_at_least(1, "batch_size", "num_epochs", "ema_interval")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")

    @classmethod
    def paper(cls, **overrides: Any) -> EDMTrainingConfig:
        """Return the paper's batches and epochs, with keyword overrides; where it names nothing
        (warm-up, averaging), the released code's."""
        return replace_options(cls(batch_size=16, num_epochs=250), overrides)


@dataclass(frozen=True)
class PolicyGuidanceConfig(Options):
    """Guidance by the target policy's score. The defaults are the released code's command line's,
    which do not guide."""

    coefficient: float = 0.0
    """lambda; 0: no guidance."""
    cosine_coefficient: float = 0.3
    """beta, the weight of the half sine wave over the steps."""
    delay_steps: int = 0
    """First steps without guidance; the last step never has any."""
    normalize: bool = False
    """Follow the score's direction: its length over a whole trajectory becomes 1."""
    denoised: bool = False
    """Take the score at the denoised trajectory instead of the noisy one."""
    schedule: Literal["linear", "paper"] = "linear"
    """lambda_i: "linear" falls with the steps (released code), "paper" with sigma (equation
    14); see `polygrad_fast.sampling.policy_score.guidance_weights`."""

    def _check_ranges(self) -> None:
        self._check_at_least(0, "coefficient", "cosine_coefficient", "delay_steps")

    @classmethod
    def paper(cls, **overrides: Any) -> PolicyGuidanceConfig:
        """Return equations 12 to 14 with the paper's coefficients, with keyword overrides.

        Equation 14 multiplies by the noise level: with sigma_max = 80 its weights are 80 times
        those of "linear" at first.
        """
        config = cls(coefficient=1.0, normalize=True, denoised=True, schedule="paper")
        return replace_options(config, overrides)
