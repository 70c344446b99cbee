"""Frozen configuration dataclasses and presets."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal

from polygrad_fast.errors import InputError


def _matches(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an option's type; numbers must be finite."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is types.UnionType:
        return any(_matches(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _plain(value: Any) -> Any:
    """Return a numpy scalar as the Python value it holds, which JSON can express."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {list(typing.get_args(hint))}"
    if typing.get_origin(hint) is types.UnionType:
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    return {float: "a finite number", int: "an integer", types.NoneType: "None"}.get(
        hint, f"a {hint.__name__}"
    )


class _Options:
    """Check every option's type when a configuration is built, then its range; numpy's numbers are
    stored as Python's."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _plain(getattr(self, name)))
            self._check(_matches(getattr(self, name), hint), name, _describe(hint))
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raise InputError for a value out of range; types are right already."""

    def _check(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(
                f"{type(self).__name__}.{name} must be {wanted}, got {getattr(self, name)!r}"
            )

    def _check_at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            self._check(getattr(self, name) >= minimum, name, f"at least {minimum}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            optional = _matches(None, typing.get_type_hints(type(self))[name])
            wanted = "None or a positive number" if optional else "positive"
            self._check(value is None or value > 0, name, wanted)


@dataclass(frozen=True)
class SamplerConfig(_Options):
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

    def _check_ranges(self) -> None:
        self._check_positive("clip_std", "clip_state_change", "max_guidance")
        self._check_at_least(0, "clip_state_change_steps")
        if self.update_states and self.action_update != "score":
            raise InputError(
                f"update_states=True needs action_update='score', got {self.action_update!r}"
            )
        if self.update_states and self.policy_input == "noisy":
            raise InputError(
                "update_states=True moves the estimated observations, which policy_input='noisy' "
                "does not use; wanted 'denoised' or 'posterior_mean'"
            )

    @classmethod
    def official(cls, **overrides: Any) -> SamplerConfig:
        """Return the released code's sampler, with keyword overrides."""
        return _replace(cls(), overrides)

    @classmethod
    def paper(cls, **overrides: Any) -> SamplerConfig:
        """Return Algorithm 2 with equation 11 as the paper prints them, with keyword overrides.

        Its predicted noise goes wrong until the denoiser is well trained: the first reverse step of
        a cosine schedule multiplies its error by 32 (`NoiseSchedule.epsilon_error_gain`);
        prediction_type="sample" avoids it.
        """
        config = cls(
            prediction_type="epsilon",
            clip_order="after",
            clip_final_actions=False,
            clip_state_change=None,
            variance_type="beta",
            scale_actions=False,
        )
        return _replace(config, overrides)


_CHOICES = {
    name: typing.get_args(hint)
    for name, hint in typing.get_type_hints(SamplerConfig).items()
    if typing.get_origin(hint) is Literal
}


def check_choices(config: Any) -> None:
    """Raise InputError where an option of `SamplerConfig` that has names for values holds another
    one; `config` need not have all of them.

    A configuration is checked when it is built. This is for code that branches on the names, so
    that none falls through to the last branch.
    """
    for name, known in _CHOICES.items():
        value = getattr(config, name, known[0])
        if value not in known:
            raise InputError(f"SamplerConfig.{name} must be one of {list(known)}, got {value!r}")


@dataclass(frozen=True)
class ScheduleConfig(_Options):
    """Diffusion process (table 4)."""

    num_train_timesteps: int = 128
    tau: float | None = None
    """Temperature of the cosine schedule; None: the paper's 0.1 for Hopper with the residual MLP, 1
    otherwise."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "num_train_timesteps")
        self._check_positive("tau")


@dataclass(frozen=True)
class DenoiserConfig(_Options):
    """Denoising network and its training (tables 2 and 3)."""

    kind: Literal["residual_mlp", "transformer"] = "residual_mlp"
    hidden_dim: int | None = None
    """None: the paper's 1024 (horizon up to 10) or 2048 for the residual MLP, 312 for the
    transformer."""
    num_layers: int = 6
    num_heads: int = 4
    """Attention heads; the transformer only."""
    step_conditioning: Literal["input", "layer", "learned", None] = "input"
    """"input": the released code's; "layer" (residual MLP), "learned" (transformer): the paper's;
    None: that of the two that the kind has."""
    learning_rate: float | None = None
    """None: the paper's 3e-4 for the residual MLP, 1e-4 for the transformer."""
    batch_size: int = 256
    ema_decay: float = 0.99
    ema_interval: int = 10
    """Updates between two EMA updates."""
    ema_start: int = 2000
    """Updates up to which the EMA copy is overwritten instead of averaged."""
    updates_per_env_step: float = 1.0
    pretrain_updates: int = 0
    """Updates right after the prefill."""

    def _check_ranges(self) -> None:
        paper_style = self._paper_step_conditioning()
        self._check(
            self.step_conditioning in ("input", paper_style, None),
            "step_conditioning",
            f"'input', {paper_style!r} or None for kind {self.kind!r}",
        )
        self._check_at_least(1, "num_layers", "num_heads", "batch_size", "ema_interval")
        self._check_at_least(0, "ema_start", "updates_per_env_step", "pretrain_updates")
        self._check_positive("hidden_dim", "learning_rate")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")

    def _paper_step_conditioning(self) -> str:
        return {"residual_mlp": "layer", "transformer": "learned"}[self.kind]

    def resolved(self, horizon: int) -> DenoiserConfig:
        """Return the configuration with the paper's values in place of None."""
        transformer = self.kind == "transformer"
        width = 312 if transformer else (1024 if horizon <= 10 else 2048)
        rate = 1e-4 if transformer else 3e-4
        return replace(
            self,
            hidden_dim=width if self.hidden_dim is None else self.hidden_dim,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            step_conditioning=self.step_conditioning or self._paper_step_conditioning(),
        )


@dataclass(frozen=True)
class AutoregressiveConfig(_Options):
    """The autoregressive world model's network and its training."""

    hidden_dim: int = 256
    num_layers: int = 3
    learning_rate: float = 1e-3
    batch_size: int = 64
    """Windows per update; each holds as many transitions as it has steps, less one."""
    ema_decay: float = 0.95
    ema_interval: int = 1
    updates_per_env_step: float = 0.5
    pretrain_updates: int = 0
    """Updates right after the prefill."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "hidden_dim", "num_layers", "batch_size", "ema_interval")
        self._check_at_least(0, "updates_per_env_step", "pretrain_updates")
        self._check_positive("learning_rate")
        self._check(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]")


@dataclass(frozen=True)
class A2CConfig(_Options):
    """Advantage actor-critic in imagination (table 1). The defaults are the released settings."""

    gamma: float = 0.99
    gae_lambda: float = 0.9
    entropy_coef: float = 1e-5
    saturation_coef: float = 0.0
    """Weight of the mean squared input of the policy mean's tanh: where that saturates, the
    gradient vanishes and the policy stays as it is. 0 in the released code."""
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

    def _check_ranges(self) -> None:
        for name in ("gamma", "gae_lambda", "target_critic_decay"):
            self._check(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        self._check_positive(
            "actor_learning_rate",
            "critic_learning_rate",
            "max_grad_norm",
            "target_update",
            "final_target_update",
            "line_search_tolerance",
            "actor_learning_rate_lr",
            "reward_rms",
        )
        self._check(0 < self.line_search_ratio < 1, "line_search_ratio", "in (0, 1)")
        self._check_at_least(1, "line_search_max_steps")
        self._check_at_least(0, "saturation_coef")


@dataclass(frozen=True)
class PolicyConfig(_Options):
    """Policy and value networks."""

    hidden_dim: int = 256
    num_layers: int = 2
    init_std: float = 1.0
    min_std: float = 0.1
    normed_inputs: bool = False
    """Whether the networks read normalized observations; rewards are then normalized too, unless
    `reward_rms` is set."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "hidden_dim", "num_layers")
        self._check_at_least(0, "min_std")
        self._check(self.init_std > self.min_std, "init_std", f"above min_std, {self.min_std}")


@dataclass(frozen=True)
class GuidanceConfig(_Options):
    """Tuning of the guidance scale delta towards standardized actions of unit spread."""

    initial: float = 0.005
    rule: Literal["log", "linear", "none"] = "log"
    """"log": log delta += lr (spread - 1) (released code); "linear": delta += lr (spread - 1)
    (equation 10)."""
    learning_rate: float | None = None
    """None: 3e-3 for "log" (released code), 1e-4 for "linear" (ours: the paper gives none)."""
    statistic: Literal["std", "mean_abs"] = "std"
    """Spread of the standardized actions: their standard deviation, or E|z| / sqrt(2 / pi), which
    heavy tails move less."""
    minimum: float = 1e-6
    maximum: float = 10.0

    def _check_ranges(self) -> None:
        self._check_positive("initial", "learning_rate", "minimum")
        self._check(self.minimum < self.maximum, "minimum", f"below maximum, {self.maximum}")
        self._check(
            self.minimum <= self.initial <= self.maximum,
            "initial",
            f"in [minimum, maximum] = [{self.minimum}, {self.maximum}]",
        )

    def resolved(self) -> GuidanceConfig:
        """Return the configuration with the rule's learning rate in place of None."""
        rate = 1e-4 if self.rule == "linear" else 3e-3
        return self if self.learning_rate is not None else replace(self, learning_rate=rate)


@dataclass(frozen=True)
class NormalizerConfig(_Options):
    """When the moments are measured, and lower bounds of the standard deviations."""

    refresh: Literal["episode", "prefill"] = "episode"
    """After each episode (released code), or only once, after the prefill: networks that read
    normalized observations then keep their meaning while the data change."""
    min_std_observations: float = 1e-3
    min_std_actions: float = 1e-3
    min_std_rewards: float = 1e-3
    min_std_terminals: float = 1e-2

    def _check_ranges(self) -> None:
        self._check_at_least(
            0, "min_std_observations", "min_std_actions", "min_std_rewards", "min_std_terminals"
        )

    def min_std(self) -> dict[str, float]:
        """Return field -> lower bound, as `Normalizer.update` takes it."""
        return {
            f.name.removeprefix("min_std_"): getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name.startswith("min_std_")
        }


@dataclass(frozen=True)
class TrainConfig(_Options):
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
    learning_starts: int = 5000
    """Environment steps with random actions before any training."""
    policy_delay_steps: int = 1000
    """Environment steps after the prefill before the first policy update."""
    replay_capacity: int = 1_000_000
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
    """Sampling engine."""
    dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = "auto"
    """Arithmetic of the denoiser in sampling."""
    cpu_threads: int | None = None
    """PyTorch's threads while learning on a CPU; None: as they are. Small networks gain nothing
    from more than one, and lose much where other processes need the cores."""

    def _check_ranges(self) -> None:
        self._check_at_least(
            1,
            "horizon",
            "total_timesteps",
            "imagined_batch_size",
            "learning_starts",
            "replay_capacity",
            "eval_interval",
            "eval_episodes",
            "log_interval",
            "checkpoint_interval",
            "keep_checkpoints",
        )
        self._check(self.horizon >= 2, "horizon", "at least 2 to train (A2C needs a next value)")
        self._check(
            self.learning_starts >= self.horizon,
            "learning_starts",
            f"at least the horizon, {self.horizon} (training needs a whole window)",
        )
        self._check_at_least(0, "policy_delay_steps", "policy_updates_per_env_step")
        self._check_positive("cpu_threads")

    def resolved(self, env_id: str) -> TrainConfig:
        """Return the configuration with the value in place of every None that stands for one."""
        hopper = _environment(env_id).startswith("Hopper") and self.denoiser.kind == "residual_mlp"
        schedule = self.schedule
        if schedule.tau is None:
            schedule = replace(schedule, tau=0.1 if hopper else 1.0)
        return replace(
            self,
            schedule=schedule,
            denoiser=self.denoiser.resolved(self.horizon),
            guidance=self.guidance.resolved(),
        )

    @classmethod
    def from_preset(cls, name: str, env_id: str = "") -> TrainConfig:
        """Return a preset.

        "default": the released code's settings. "paper": the paper's text, whose predicted noise
        goes wrong until the denoiser is well trained (`learn` warns of it). "quick": CPU-sized,
        tuned on two environments: horizon, the policy's init_std and min_std, a2c's
        saturation_coef, actor_learning_rate, target_critic_decay and final_target_update, and
        eval_episodes differ between Pendulum and all others, which get the settings tuned on
        InvertedPendulum-v5.

        Args:
            name: the preset.
            env_id: the environment; only "quick" looks at it, at whether its name starts with
                "Pendulum".

        Raises:
            InputError: unknown preset.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise InputError(f"unknown preset {name!r}, wanted one of {list(PRESETS)}")
        return PRESETS[name](env_id)


def _replace(config: Any, overrides: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in known:
            raise InputError(
                f"{type(config).__name__} has no option {name!r}, wanted one of {sorted(known)}"
            )
    return replace(config, **overrides)


def _environment(env_id: str) -> str:
    """Return an environment id without module and namespace: "ale:ns/Hopper-v5" -> "Hopper-v5"."""
    return env_id.rsplit(":")[-1].rsplit("/")[-1]


def _default(env_id: str) -> TrainConfig:
    return TrainConfig()


def _paper(env_id: str) -> TrainConfig:
    """The paper's text: Algorithm 2 with equations 1 and 11 as printed, equation 10, the denoisers
    of appendix A, and tables 1 to 4, which are the defaults.

    What the paper does not print is the released code's: the denoiser's averaged weights, gradient
    norm limit, target critic, normalized advantages, learned actor learning rate, the policy's
    networks, terminal flags, normalizer, prefill, and the 0.005 that the guidance scale starts
    from. So is AdamW for actor and critic, where the paper has Adam. The learning rate of equation
    10 and the bounds of the guidance scale are this library's.

    The printed algorithm predicts noise, and its first reverse step multiplies the denoiser's error
    by 32 (`NoiseSchedule.epsilon_error_gain`). After 5,000 updates at width 256 on
    InvertedPendulum-v5, whose rewards are 0 and 1, it imagines rewards from -11 to 11; with
    `SamplerConfig.paper(prediction_type="sample")` from -0.9 to 1.6. `PolyGRAD.learn` warns; more
    numbers are in polygrad_fast/compat/README.md.
    """
    return TrainConfig(
        sampler=SamplerConfig.paper(),
        denoiser=DenoiserConfig(step_conditioning=None),
        guidance=GuidanceConfig(rule="linear"),
    )


def _quick(env_id: str) -> TrainConfig:
    """Small enough for one CPU core and minutes; tuned on Pendulum-v1 and InvertedPendulum-v5.

    Eight options switch on whether the environment's name starts with "Pendulum":
    `horizon` 10 or 5, `policy.init_std` 1 or 0.5, `policy.min_std` 0.3 or 0.1,
    `a2c.saturation_coef` 0.03 or 0, `a2c.actor_learning_rate` 3e-3 or 1e-2,
    `a2c.target_critic_decay` 0.98 or 0.95, `a2c.final_target_update` 0.01 or 0.005, and
    `eval_episodes` 32 or 10. Every environment but Pendulum gets the second values, tuned on
    InvertedPendulum-v5 and not for itself.

    Unlike in the released settings, the target critic is fast (its lag, not its network, bounded
    how fast values grew), the learning rates are large and learned quickly, and the moments stay as
    they were after the prefill, so that networks keep what they learnt. On Pendulum the policy's
    tanh saturated around the bottom on some seeds, hence `saturation_coef`.
    """
    pendulum = _environment(env_id).startswith("Pendulum")
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
            min_std=0.3 if pendulum else 0.1,
            normed_inputs=True,
        ),
        a2c=A2CConfig(
            saturation_coef=0.03 if pendulum else 0.0,
            actor_learning_rate=3e-3 if pendulum else 1e-2,
            actor_learning_rate_lr=0.03,
            critic_learning_rate=2e-3,
            target_critic_decay=0.98 if pendulum else 0.95,
            target_update=0.02,
            final_target_update=0.01 if pendulum else 0.005,
            reward_rms=0.1,
        ),
        guidance=GuidanceConfig(
            initial=0.05, learning_rate=1e-2, statistic="mean_abs", maximum=0.5
        ),
        normalizer=NormalizerConfig(refresh="prefill", min_std_rewards=0.1, min_std_terminals=0.1),
        total_timesteps=8000,
        imagined_batch_size=128,
        policy_updates_per_env_step=0.5,
        learning_starts=1000,
        policy_delay_steps=0,
        replay_capacity=200_000,
        eval_interval=500,
        eval_episodes=32 if pendulum else 10,
        log_interval=100,
        checkpoint_interval=2000,
        cpu_threads=1,
    )


PRESETS = {"default": _default, "paper": _paper, "quick": _quick}


def from_dict(data: dict[str, Any], cls: type = TrainConfig) -> Any:
    """Rebuild a configuration from `dataclasses.asdict` (read back from JSON).

    Raises:
        InputError: an option is unknown or its value is not allowed.
    """
    if not isinstance(data, dict):
        raise InputError(f"{cls.__name__} must be a dictionary of options, got {data!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints), key=str)
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{cls.__name__} has no option {unknown[0]!r}{hint}")
    values = {
        name: from_dict(value, hints[name]) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in data.items()
    }
    return cls(**values)
