"""Frozen configuration dataclasses and presets."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from polygrad_fast.errors import InputError


def _check(config: Any, condition: bool, name: str, wanted: str) -> None:
    if not condition:
        raise InputError(
            f"{type(config).__name__}.{name} must be {wanted}, got {getattr(config, name)!r}"
        )


def _check_choices(config: Any, **choices: tuple) -> None:
    for name, allowed in choices.items():
        _check(config, getattr(config, name) in allowed, name, f"one of {list(allowed)}")


@dataclass(frozen=True)
class SamplerConfig:
    """Options of policy-guided trajectory diffusion (Algorithm 2). Build one with `official()` or
    `paper()`."""

    prediction_type: Literal["sample", "epsilon"] = "sample"
    """What the denoiser predicts: the clean trajectory or the noise."""
    action_update: Literal["score", "sample", "none"] = "score"
    """Follow the policy's score; draw anew from the policy each step; leave the random actions
    (section 5.4)."""
    clip_std: float | None = 3.0
    """Keep actions within this many policy standard deviations of its mean; None: no clipping."""
    clip_order: Literal["before", "after"] = "before"
    """Clip before the score step (released code) or after it (equation 11)."""
    clip_final_actions: bool = True
    """Clip the actions once more in the last step (released code); the paper leaves them as they
    are."""
    policy_input: Literal["denoised", "posterior_mean", "noisy"] = "denoised"
    """Which estimate of the states the policy reads."""
    update_states: bool = False
    """Move the estimated observations along the policy's score too (appendix C.4)."""
    clip_state_change: float | None = 0.25
    """Largest change per entry of the posterior mean in the last `clip_state_change_steps` steps;
    None: no limit."""
    clip_state_change_steps: int = 11
    variance_type: Literal["posterior", "beta"] = "posterior"
    """Variance of the noise added to states and actions: the DDPM posterior's, none in the last
    step (released code), or
    beta_i (equations 1 and 11)."""
    scale_actions: bool = True
    """Multiply the denoiser's actions by sqrt(alphabar_i) (released code), in training and
    sampling."""
    denoiser_actions: Literal["raw", "clipped"] = "raw"
    """Whether the denoiser sees actions as they are or clipped to the environment's bounds."""
    max_guidance: float | None = None
    """Upper bound of guidance_scale / sigma^2, the share of the way to the mean in one step; None:
    no bound."""

    def __post_init__(self) -> None:
        _check_choices(
            self,
            prediction_type=("sample", "epsilon"),
            action_update=("score", "sample", "none"),
            clip_order=("before", "after"),
            policy_input=("denoised", "posterior_mean", "noisy"),
            variance_type=("posterior", "beta"),
            denoiser_actions=("raw", "clipped"),
        )
        for name in ("clip_std", "clip_state_change", "max_guidance"):
            value = getattr(self, name)
            _check(self, value is None or value > 0, name, "None or a positive number")
        _check(self, self.clip_state_change_steps >= 0, "clip_state_change_steps", "at least 0")
        if self.update_states and self.action_update != "score":
            raise InputError(
                f"update_states=True needs action_update='score', got {self.action_update!r}"
            )

    @classmethod
    def official(cls, **overrides: Any) -> SamplerConfig:
        """Return the released code's sampler, with keyword overrides."""
        return _replace(cls(), overrides)

    @classmethod
    def paper(cls, **overrides: Any) -> SamplerConfig:
        """Return Algorithm 2 with equation 11 as the paper prints them, with keyword overrides."""
        config = cls(
            prediction_type="epsilon",
            clip_order="after",
            clip_final_actions=False,
            clip_state_change=None,
            variance_type="beta",
            scale_actions=False,
        )
        return _replace(config, overrides)


@dataclass(frozen=True)
class ScheduleConfig:
    """Diffusion process (table 4)."""

    num_train_timesteps: int = 128
    tau: float = 1.0


@dataclass(frozen=True)
class DenoiserConfig:
    """Denoising network and its training (tables 2 and 3)."""

    kind: Literal["residual_mlp", "transformer"] = "residual_mlp"
    hidden_dim: int = 1024
    num_layers: int = 6
    num_heads: int = 4
    """Attention heads; the transformer only."""
    step_conditioning: Literal["input", "layer", "learned"] = "input"
    """"input": the released code's; "layer" (residual MLP), "learned" (transformer): the
    paper's."""
    learning_rate: float = 3e-4
    batch_size: int = 256
    ema_decay: float = 0.99
    ema_interval: int = 10
    """Updates between two EMA updates."""
    ema_start: int = 2000
    """Updates up to which the EMA copy is overwritten instead of averaged."""
    updates_per_env_step: float = 1.0
    pretrain_updates: int = 0
    """Updates right after the prefill."""

    def __post_init__(self) -> None:
        _check_choices(self, kind=("residual_mlp", "transformer"))
        paper_style = {"residual_mlp": "layer", "transformer": "learned"}[self.kind]
        _check_choices(self, step_conditioning=("input", paper_style))
        for name in ("hidden_dim", "num_layers", "num_heads", "batch_size", "ema_interval"):
            _check(self, getattr(self, name) >= 1, name, "at least 1")
        _check(self, self.learning_rate > 0, "learning_rate", "positive")
        _check(self, 0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")
        _check(self, self.updates_per_env_step >= 0, "updates_per_env_step", "at least 0")
        _check(self, self.pretrain_updates >= 0, "pretrain_updates", "at least 0")


@dataclass(frozen=True)
class A2CConfig:
    """Advantage actor-critic in imagination (table 1). The defaults are the released settings."""

    gamma: float = 0.99
    gae_lambda: float = 0.9
    entropy_coef: float = 1e-5
    actor_learning_rate: float = 3e-5
    """Start and upper bound of the learned actor learning rate."""
    critic_learning_rate: float = 3e-4
    max_grad_norm: float | None = 0.1
    """Gradient norm limit, for actor and critic each; None: no clipping."""
    normalize_advantages: bool = True
    target_critic_decay: float = 0.995
    target_update: float = 0.01
    """Wanted mean |log pi_new - log pi_old| of one update."""
    final_target_update: float | None = None
    """Value `target_update` falls to, linearly over training; None: constant."""
    line_search: bool = True
    line_search_tolerance: float = 0.2
    line_search_ratio: float = 0.8
    line_search_max_steps: int = 50
    learn_actor_learning_rate: bool = True
    actor_learning_rate_lr: float = 3e-4
    """Learning rate of the log of the actor's learning rate."""
    reward_rms: float | None = None
    """Divide rewards so that their root mean square in the data becomes this; None: rewards as
    they are."""

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda", "target_critic_decay"):
            _check(self, 0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        for name in (
            "actor_learning_rate",
            "critic_learning_rate",
            "target_update",
            "line_search_tolerance",
            "actor_learning_rate_lr",
        ):
            _check(self, getattr(self, name) > 0, name, "positive")
        for name in ("max_grad_norm", "reward_rms", "final_target_update"):
            value = getattr(self, name)
            _check(self, value is None or value > 0, name, "None or a positive number")
        _check(self, 0 < self.line_search_ratio < 1, "line_search_ratio", "in (0, 1)")
        _check(self, self.line_search_max_steps >= 1, "line_search_max_steps", "at least 1")


@dataclass(frozen=True)
class PolicyConfig:
    """Policy and value networks."""

    hidden_dim: int = 256
    num_layers: int = 2
    init_std: float = 1.0
    min_std: float = 0.1
    normed_inputs: bool = False
    """Whether the networks read normalized observations; rewards are then normalized too, unless
    `reward_rms` is set."""


@dataclass(frozen=True)
class GuidanceConfig:
    """Tuning of the guidance scale delta towards standardized actions of unit spread."""

    initial: float = 0.005
    rule: Literal["log", "linear", "none"] = "log"
    """"log": log delta += lr (spread - 1) (released code); "linear": delta += lr (spread - 1)
    (equation 10)."""
    learning_rate: float = 3e-3
    statistic: Literal["std", "mean_abs"] = "std"
    """Spread of the standardized actions: their standard deviation, or E|z| / sqrt(2 / pi), which
    heavy tails move less."""
    minimum: float = 1e-6
    maximum: float = 10.0

    def __post_init__(self) -> None:
        _check_choices(self, rule=("log", "linear", "none"), statistic=("std", "mean_abs"))
        _check(self, 0 < self.minimum < self.maximum, "minimum", "positive and below maximum")
        _check(self, self.initial > 0, "initial", "positive")
        _check(self, self.learning_rate > 0, "learning_rate", "positive")


@dataclass(frozen=True)
class NormalizerConfig:
    """When the moments are measured, and lower bounds of the standard deviations."""

    refresh: Literal["episode", "prefill"] = "episode"
    """After each episode (released code), or only once, after the prefill: networks that read
    normalized observations then keep their meaning while the data change."""
    min_std_observations: float = 1e-3
    min_std_actions: float = 1e-3
    min_std_rewards: float = 1e-3
    min_std_terminals: float = 1e-2

    def __post_init__(self) -> None:
        _check_choices(self, refresh=("episode", "prefill"))

    def min_std(self) -> dict[str, float]:
        """Return field -> lower bound, as `Normalizer.update` takes it."""
        return {
            f.name.removeprefix("min_std_"): getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name.startswith("min_std_")
        }


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run of Algorithm 3 needs besides the environment, seed and device."""

    horizon: int = 10
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    a2c: A2CConfig = field(default_factory=A2CConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    total_timesteps: int = 1_000_000
    """Environment steps of the command line's run, the prefill included."""
    imagined_batch_size: int = 1024
    """Imagined trajectories per policy update."""
    policy_updates_per_env_step: float = 0.25
    prefill_steps: int = 5000
    """Environment steps with random actions before any training."""
    policy_delay_steps: int = 1000
    """Environment steps after the prefill before the first policy update."""
    replay_capacity: int = 2_000_000
    rescale_actions: bool = True
    """Let the policy act in [-1, 1] where the action space is bounded."""
    eval_interval: int = 10_000
    """Environment steps between two evaluations."""
    eval_episodes: int = 10
    log_interval: int = 1000
    """Environment steps between two rows of metrics.csv."""
    checkpoint_interval: int = 10_000
    keep_checkpoints: int = 2
    engine: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        for name in (
            "horizon",
            "total_timesteps",
            "imagined_batch_size",
            "prefill_steps",
            "replay_capacity",
            "eval_interval",
            "eval_episodes",
            "log_interval",
            "checkpoint_interval",
            "keep_checkpoints",
        ):
            _check(self, getattr(self, name) >= 1, name, "at least 1")
        _check(self, self.horizon >= 2, "horizon", "at least 2 to train (A2C needs a next value)")
        _check(self, self.policy_delay_steps >= 0, "policy_delay_steps", "at least 0")
        _check(self, self.policy_updates_per_env_step >= 0, "policy_updates_per_env_step", ">= 0")

    @classmethod
    def from_preset(cls, name: str, env_id: str = "") -> TrainConfig:
        """Return a preset: "default" (released code), "paper" (the paper's text) or "quick"
        (CPU-sized).

        Args:
            name: the preset.
            env_id: the environment; Hopper gets tau = 0.1 (table 4), and "quick" knows settings
                for Pendulum.

        Raises:
            InputError: unknown preset.
        """
        try:
            build = PRESETS[name]
        except KeyError:
            raise InputError(f"unknown preset {name!r}, wanted one of {list(PRESETS)}") from None
        return build(env_id)


def _replace(config: Any, overrides: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in known:
            raise InputError(
                f"{type(config).__name__} has no option {name!r}, wanted one of {sorted(known)}"
            )
    return replace(config, **overrides)


def _default(env_id: str) -> TrainConfig:
    tau = 0.1 if env_id.startswith("Hopper") else 1.0
    return TrainConfig(schedule=ScheduleConfig(tau=tau))


def _paper(env_id: str) -> TrainConfig:
    return replace(
        _default(env_id),
        sampler=SamplerConfig.paper(),
        denoiser=DenoiserConfig(step_conditioning="layer"),
        guidance=GuidanceConfig(rule="linear", learning_rate=1e-4),
    )


def _quick(env_id: str) -> TrainConfig:
    """Small enough for one CPU core and minutes; chosen by measurement on other seeds than the
    README's. Unlike the released settings, the target critic is fast (its lag, not its network,
    bounded how fast values grew), the learning rates are large and learned quickly, and the moments
    stay as they were after the prefill, so that networks keep what they learnt."""
    pendulum = env_id.startswith("Pendulum")
    return TrainConfig(
        horizon=10 if pendulum else 5,
        schedule=ScheduleConfig(num_train_timesteps=12),
        sampler=SamplerConfig.official(
            clip_state_change=None, denoiser_actions="clipped", max_guidance=0.5
        ),
        denoiser=DenoiserConfig(
            hidden_dim=128,
            num_layers=3,
            learning_rate=1e-3,
            ema_decay=0.9,
            ema_start=0,
            updates_per_env_step=0.5,
            pretrain_updates=600,
        ),
        policy=PolicyConfig(
            hidden_dim=64,
            init_std=1.0 if pendulum else 0.5,
            min_std=0.2 if pendulum else 0.1,
            normed_inputs=True,
        ),
        a2c=A2CConfig(
            actor_learning_rate=1e-2,
            actor_learning_rate_lr=0.03,
            critic_learning_rate=2e-3,
            target_critic_decay=0.98 if pendulum else 0.95,
            target_update=0.03 if pendulum else 0.02,
            final_target_update=0.005,
            reward_rms=0.1,
        ),
        guidance=GuidanceConfig(
            initial=0.05, learning_rate=1e-2, statistic="mean_abs", maximum=0.5
        ),
        normalizer=NormalizerConfig(refresh="prefill", min_std_rewards=0.1, min_std_terminals=0.1),
        total_timesteps=12_000 if pendulum else 8000,
        imagined_batch_size=128,
        policy_updates_per_env_step=0.5,
        prefill_steps=1000,
        policy_delay_steps=0,
        replay_capacity=200_000,
        eval_interval=500,
        eval_episodes=16 if pendulum else 10,
        log_interval=100,
        checkpoint_interval=2000,
    )


PRESETS = {"default": _default, "paper": _paper, "quick": _quick}


def from_dict(data: dict[str, Any], cls: type = TrainConfig) -> Any:
    """Rebuild a configuration from `dataclasses.asdict` (read back from JSON).

    Raises:
        InputError: an option is unknown or its value is not allowed.
    """
    types = typing.get_type_hints(cls)
    unknown = set(data) - set(types)
    if unknown:
        raise InputError(f"{cls.__name__} has no option {min(unknown)!r}, got {sorted(data)}")
    values = {
        name: from_dict(value, types[name]) if dataclasses.is_dataclass(types[name]) else value
        for name, value in data.items()
    }
    return cls(**values)
