"""Options of the world models without trajectory diffusion: one group each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from polygrad_fast.config.edm import EDMConfig
from polygrad_fast.config.options import Options


@dataclass(frozen=True)
class AutoregressiveConfig(Options):
    """The autoregressive world model's network and its training."""

    hidden_dim: int = 256
    num_layers: int = 3
    process_noise: bool = False
    """Imagine chance too, as `DenoiserConfig.process_noise`."""
    learning_rate: float = 1e-3
    batch_size: int = 64
    """Windows per update; each holds as many transitions as it has steps, less one."""
    ema_decay: float = 0.95
    ema_interval: int = 1
    updates_per_env_step: float = 0.5
    pretrain_updates: int = 0
    """Updates right after the prefill."""
    train_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the products in training; "bfloat16" rounds their inputs, while weights, their
    averages and the optimizer stay in float32."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "hidden_dim", "num_layers", "batch_size", "ema_interval")
        self._check_at_least(0, "updates_per_env_step", "pretrain_updates")
        self._check_positive("learning_rate")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")


@dataclass(frozen=True)
class EnsembleConfig(Options):
    """The ensemble's probabilistic networks and their training. Sizes, elites, the weights of the
    bounds and of the decay are MBPO's (arXiv 1906.08253)."""

    num_members: int = 7
    num_elites: int = 5
    """Members that imagine: those with the least error on held-out steps."""
    hidden_dim: int = 200
    num_layers: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 64
    """Windows per update, or transitions of a dataset; each member trains on a bootstrap of
    them."""
    holdout_fraction: float = 0.1
    """Share of all steps that is never trained on."""
    holdout_decay: float = 0.99
    """Of earlier errors on held-out steps, per update."""
    bound_weight: float = 0.01
    """Pulls the learned bounds of log variances together."""
    weight_decay: float = 5e-5
    """Weight of half the squared weights, for each member."""
    ema_decay: float = 0.95
    ema_interval: int = 1
    updates_per_env_step: float = 0.5
    pretrain_updates: int = 0
    """Updates right after the prefill."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "num_elites", "hidden_dim", "num_layers", "batch_size")
        self._check_at_least(1, "num_members", "ema_interval")
        self._check_at_least(0, "updates_per_env_step", "pretrain_updates", "bound_weight")
        self._check_at_least(0, "weight_decay")
        self._check_positive("learning_rate")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")
        self._check(0 <= self.holdout_decay < 1, "holdout_decay", "in [0, 1)")
        members = self.num_members
        self._check(self.num_elites <= members, "num_elites", f"at most num_members, {members}")
        chooses = self.num_elites < members
        least = "in (0, 1) to choose elites" if chooses else "in [0, 1)"
        allowed = 0 < self.holdout_fraction < 1 if chooses else 0 <= self.holdout_fraction < 1
        self._check(allowed, "holdout_fraction", least)


@dataclass(frozen=True)
class TransformerModelConfig(Options):
    """The autoregressive transformer and its training; sizes and learning rate are the paper's
    (table 3 and appendix C.3)."""

    context: int = 15
    """The most steps that it reads. It trains on as many of each window, so that a longer horizon
    of imagination than the windows' has positions that were never trained."""
    hidden_dim: int = 312
    num_layers: int = 6
    num_heads: int = 4
    learning_rate: float = 1e-4
    batch_size: int = 256
    """Windows per update."""
    ema_decay: float = 0.95
    ema_interval: int = 1
    updates_per_env_step: float = 0.5
    pretrain_updates: int = 0
    """Updates right after the prefill."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "context", "hidden_dim", "num_layers", "num_heads")
        self._check_at_least(1, "batch_size", "ema_interval")
        self._check_at_least(0, "updates_per_env_step", "pretrain_updates")
        self._check_positive("learning_rate")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")
        fits = self.hidden_dim % self.num_heads == 0
        self._check(fits, "hidden_dim", f"a multiple of num_heads, {self.num_heads}")


@dataclass(frozen=True)
class AutoregressiveDiffusionConfig(Options):
    """Diffusion of single steps: SynthER's denoiser (arXiv 2303.06614) and its sampler, conditioned
    on observation and action."""

    hidden_dim: int = 1024
    num_layers: int = 6
    sampler: EDMConfig = field(default_factory=lambda: EDMConfig.paper(num_inference_steps=128))
    """Of each imagined step."""
    p_mean: float = -1.2
    """Mean and standard deviation of the logarithm of the noise levels in training."""
    p_std: float = 1.2
    learning_rate: float = 3e-4
    batch_size: int = 64
    """Windows per update; each holds as many transitions as it has steps."""
    ema_decay: float = 0.99
    ema_interval: int = 1
    updates_per_env_step: float = 0.5
    pretrain_updates: int = 0
    """Updates right after the prefill."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "hidden_dim", "num_layers", "batch_size", "ema_interval")
        self._check_at_least(0, "updates_per_env_step", "pretrain_updates")
        self._check_positive("learning_rate", "p_std")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")
