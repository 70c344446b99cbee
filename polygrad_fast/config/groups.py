"""Options of the parts: sampler, denoiser, policy, A2C and what tunes them."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, replace
from typing import Any, Literal

from polygrad_fast.config.options import Options, replace_options
from polygrad_fast.errors import InputError


@dataclass(frozen=True)
class SamplerConfig(Options):
    """Options of policy-guided trajectory diffusion (Algorithm 2). Build one with `official()` or
    `paper()`."""

    prediction_type: Literal["sample", "epsilon"] = "sample"
    """What the denoiser predicts: the clean trajectory or the noise."""
    action_update: Literal["score", "sample", "exact", "none"] = "score"
    """Follow the policy's score; draw anew from the policy each step; draw one standard normal xi
    per action and keep u = mean + sigma xi in every step, at last at the final states, so that
    actions are exactly the policy's at the states returned, without anything to tune (clip_std,
    clip_final_actions, max_guidance and the guidance scale play no part); leave the random actions
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
    step (released code), or beta_i (equations 1 and 11)."""
    scale_actions: bool = True
    """Multiply the denoiser's actions by sqrt(alphabar_i) (released code), in training and
    sampling."""
    denoiser_actions: Literal["raw", "clipped"] = "raw"
    """Whether the denoiser sees actions as they are or clipped to the environment's bounds; clipped
    ones are also what the replay buffer keeps, for every world model."""
    max_guidance: float | None = None
    """Upper bound of guidance_scale / sigma^2, the share of the way to the mean in one step; None:
    no bound."""
    num_inference_steps: int | None = None
    """Diffusion steps of a sample, evenly spaced among those of training (respaced DDPM); None:
    all of them."""

    def _check_ranges(self) -> None:
        self._check_positive("clip_std", "clip_state_change", "max_guidance")
        self._check_at_least(0, "clip_state_change_steps")
        if self.num_inference_steps is not None:
            self._check_at_least(1, "num_inference_steps")
        if self.update_states and self.action_update != "score":
            raise InputError(
                f"SamplerConfig.action_update must be 'score' with update_states=True, got "
                f"{self.action_update!r}"
            )
        if self.update_states and self.policy_input == "noisy":
            raise InputError(
                "SamplerConfig.policy_input must be 'denoised' or 'posterior_mean' with "
                "update_states=True, which moves these estimates, got 'noisy'"
            )

    @classmethod
    def official(cls, **overrides: Any) -> SamplerConfig:
        """Return the released code's sampler, with keyword overrides."""
        return replace_options(cls(), overrides)

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
        return replace_options(config, overrides)


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
class ScheduleConfig(Options):
    """Diffusion process (table 4)."""

    num_train_timesteps: int = 128
    tau: float | None = None
    """Temperature of the cosine schedule; None: the paper's 0.1 for Hopper with the residual MLP, 1
    otherwise."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "num_train_timesteps")
        self._check_positive("tau")


@dataclass(frozen=True)
class DenoiserConfig(Options):
    """Denoising network and its training (tables 2 and 3)."""

    kind: Literal["residual_mlp", "transformer", "rollout"] = "residual_mlp"
    """The paper's two, or one step's network rolled out over the horizon: it predicts clean states
    ("sample") from actions as they are (`sampler.scale_actions` False), and of chance, with
    `process_noise`, what is Gaussian."""
    hidden_dim: int | None = None
    """None: the paper's 1024 (horizon up to 10) or 2048 for the residual MLP, 312 for the
    transformer; 256 for the rollout."""
    num_layers: int = 6
    num_heads: int = 4
    """Attention heads; the transformer only."""
    process_noise: bool = False
    """Imagine chance too: every step adds Gaussian noise, as large as the data scatter around the
    network's predictions; the rollout only."""
    step_conditioning: Literal["input", "layer", "learned", None] = "input"
    """"input": the released code's; "layer" (residual MLP), "learned" (transformer): the paper's;
    None: that of the two that the kind has. The rollout has "input" only."""
    learning_rate: float | None = None
    """None: the paper's 3e-4 for the residual MLP, 1e-4 for the transformer; 3e-4 for the
    rollout."""
    batch_size: int = 256
    ema_decay: float = 0.99
    ema_interval: int = 10
    """Updates between two EMA updates."""
    ema_start: int = 2000
    """Updates up to which the EMA copy is overwritten instead of averaged."""
    updates_per_env_step: float = 1.0
    pretrain_updates: int = 0
    """Updates right after the prefill."""
    train_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the products in training; "bfloat16" rounds their inputs, while weights, their
    averages and the optimizer stay in float32."""

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
        fits = self.kind == "rollout" or not self.process_noise
        self._check(fits, "process_noise", f"False for kind {self.kind!r}")

    def _paper_step_conditioning(self) -> str:
        return {"residual_mlp": "layer", "transformer": "learned", "rollout": "input"}[self.kind]

    def resolved(self, horizon: int) -> DenoiserConfig:
        """Return the configuration with the paper's values in place of None."""
        transformer = self.kind == "transformer"
        width = {"transformer": 312, "rollout": 256}.get(self.kind, 1024 if horizon <= 10 else 2048)
        rate = 1e-4 if transformer else 3e-4
        return replace(
            self,
            hidden_dim=width if self.hidden_dim is None else self.hidden_dim,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            step_conditioning=self.step_conditioning or self._paper_step_conditioning(),
        )


@dataclass(frozen=True)
class A2CConfig(Options):
    """Advantage actor-critic in imagination (table 1). The defaults are the released settings."""

    gamma: float = 0.99
    gae_lambda: float = 0.9
    gradient_estimator: Literal["score", "pathwise", "auto"] = "score"
    """Of the policy gradient: by the score function, advantages times grad log pi, as in the paper,
    or pathwise, by derivatives of rewards, terminals and values through the world model's steps,
    which varies less; for world models with one network for all steps. "auto": pathwise for these,
    the score function for others. Pathwise gradients have no advantages to standardize: they are in
    the unit of the returns, beside which `entropy_coef` and `saturation_coef` stand."""
    entropy_coef: float = 1e-5
    saturation_coef: float = 0.0
    """Weight of the mean squared input of the policy mean's tanh: where that saturates, the
    gradient vanishes and the policy stays as it is. 0 in the released code."""
    actor_learning_rate: float = 3e-5
    """Start and upper bound of the learned actor learning rate."""
    critic_learning_rate: float = 3e-4
    terminal_step_weight: float = 0.0
    """Weight in the losses of the step that ends a trajectory, whose reward and missing future the
    policy answers for; 0 in the released code, where only the steps before it count."""
    max_grad_norm: float | None = 0.1
    """Gradient norm limit, for actor and critic each; None: no clipping."""
    normalize_advantages: bool = True
    """Divide advantages, less their mean, by their standard deviation."""
    advantage_moments: Literal["all", "counted"] = "all"
    """Steps whose advantages give that mean and deviation: all, those after a terminal step
    included (released code), or each by its weight in the loss. After a terminal step a return is
    wanted that is not there, so a few of them move both far."""
    target_critic_decay: float = 0.995
    bootstrap: Literal["target", "lesser"] = "target"
    """Values of what follows: the target critic's (released code), or in each state the lesser of
    its and the critic's, which fall as soon as the critic knows and rise as slowly as the target
    moves, so that a policy is not drawn to where an imagined future looks better than it was."""
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
        for name in ("gamma", "gae_lambda", "target_critic_decay", "terminal_step_weight"):
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
class PolicyConfig(Options):
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
class GuidanceConfig(Options):
    """The guidance scale delta of action update "score", tuned towards standardized actions of unit
    spread; without effect on other action updates."""

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
class NormalizerConfig(Options):
    """When the moments are measured, and lower bounds of the standard deviations."""

    refresh: Literal["episode", "prefill"] = "episode"
    """After each episode (released code), or only once, after the prefill: networks that read
    normalized observations then keep their meaning while the data change."""
    preserve_functions: bool = False
    """Fold every refresh into the first layers of policy and value function, so that they stay the
    same functions of raw observations; without effect on networks that read raw ones."""
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
