"""Everything a run needs, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from polygrad_fast.config.edm import EDMConfig
from polygrad_fast.config.groups import (
    A2CConfig,
    DenoiserConfig,
    GuidanceConfig,
    NormalizerConfig,
    PolicyConfig,
    SamplerConfig,
    ScheduleConfig,
)
from polygrad_fast.config.options import Options
from polygrad_fast.config.world_models import (
    AutoregressiveConfig,
    AutoregressiveDiffusionConfig,
    EnsembleConfig,
    TransformerModelConfig,
)
from polygrad_fast.errors import InputError


@dataclass(frozen=True)
class TrainConfig(Options):
    """Everything a run of Algorithm 3 needs besides the environment, seed and device."""

    world_model: Literal[
        "trajectory_diffusion",
        "autoregressive",
        "ensemble",
        "transformer",
        "autoregressive_diffusion",
    ] = "trajectory_diffusion"
    """What imagines: policy-guided trajectory diffusion, or, step by step, a plain network, an
    ensemble of probabilistic ones, a transformer, or a diffusion of every step; each has a group of
    options of its name. Options of the others have no effect: schedule, sampler, denoiser,
    guidance, engine and dtype are those of trajectory diffusion."""
    horizon: int = 10
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    autoregressive: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    transformer: TransformerModelConfig = field(default_factory=TransformerModelConfig)
    autoregressive_diffusion: AutoregressiveDiffusionConfig = field(
        default_factory=AutoregressiveDiffusionConfig
    )
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    a2c: A2CConfig = field(default_factory=A2CConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    total_timesteps: int = 1_000_000
    """Environment steps of the command line's run, the prefill included."""
    imagined_batch_size: int = 1024
    """Imagined trajectories per policy update."""
    newest_start_states: int = 20_000
    """How many start states count as the newest."""
    share_of_newest: float = 0.0
    """Share of the imagined trajectories that start in one of these; the others, and in the
    released code all, start anywhere in the data."""
    policy_updates_per_env_step: float = 0.25
    learning_starts: int = 5000
    """Environment steps with random actions before any training."""
    policy_delay_steps: int = 1000
    """Environment steps after the prefill before the first policy update."""
    replay_capacity: int = 1_000_000
    num_envs: int = 1
    """Training environments, which take turns: environment step n is taken in number n mod
    num_envs. Everything else still counts single environment steps. Processes of torchrun have
    equal parts of them, one each at least."""
    env_processes: bool = False
    """Let every training environment step in a process of its own while the updates run; an action
    then comes from the policy as it was before the updates due after the last num_envs steps."""
    rescale_actions: bool = True
    """Let the policy act in [-1, 1] where the action space is bounded."""
    eval_interval: int = 10_000
    """Environment steps between two evaluations."""
    eval_episodes: int = 10
    eval_processes: int = 0
    """Processes that play the evaluation's episodes, the same ones as without; 0: played here. Pays
    where a step of the environment takes longer than to hand it over, about 0.05 ms."""
    log_interval: int = 1000
    """Environment steps between two rows of metrics.csv."""
    checkpoint_interval: int = 10_000
    keep_checkpoints: int = 2
    diagnostics_interval: int = 0
    """Policy updates between two measurements of whether imagined actions are drawn from the policy
    (columns on_policy/ of metrics.csv); 0: never."""
    gradient_trajectories: int = 0
    """Trajectories per gradient by which every evaluation compares the imagined policy gradient
    with the simulator's, as `polygrad-fast gradient` does (columns gradient/); 0: never. Costs 4
    simulated steps per trajectory and step of the horizon, at least 4,000 for the critic, and
    imagining 256 trajectories of 2.3 / (1 - a2c.gamma) steps."""
    engine: Literal["auto", "reference", "torch", "triton"] = "auto"
    """Sampling engine of trajectory diffusion."""
    dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = "auto"
    """Arithmetic of trajectory diffusion's denoiser in sampling."""
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
            "num_envs",
            "eval_interval",
            "eval_episodes",
            "log_interval",
            "checkpoint_interval",
            "keep_checkpoints",
        )
        self._check(self.horizon >= 2, "horizon", "at least 2 to train (A2C needs a next value)")
        steps = self.horizon * self.num_envs
        each = f" times num_envs, {self.num_envs}" if self.num_envs > 1 else ""
        for name in ("learning_starts", "replay_capacity"):
            why = f"at least the horizon, {self.horizon}{each} (training needs a whole window)"
            self._check(getattr(self, name) >= steps, name, why)
        self._check_at_least(
            0,
            "eval_processes",
            "policy_delay_steps",
            "policy_updates_per_env_step",
            "diagnostics_interval",
        )
        asked = self.gradient_trajectories
        self._check(asked == 0 or asked >= 8, "gradient_trajectories", "0 or at least 8")
        self._check_at_least(1, "newest_start_states")
        if self.world_model == "trajectory_diffusion" and self.denoiser.kind == "rollout":
            self._check_rollout()
        self._check(0 <= self.share_of_newest <= 1, "share_of_newest", "in [0, 1]")
        self._check_positive("cpu_threads")
        self._check(
            self.diagnostics_interval == 0 or self.imagined_batch_size >= 4,
            "imagined_batch_size",
            "at least 4 with diagnostics_interval (R2 is measured on every fourth trajectory)",
        )

    def _check_rollout(self) -> None:
        """Raise InputError where the sampler's options do not suit a denoiser of kind "rollout"."""
        for option, wanted in (("prediction_type", "sample"), ("scale_actions", False)):
            got = getattr(self.sampler, option)
            if got != wanted:
                raise InputError(
                    f"sampler.{option} must be {wanted!r} for a denoiser of kind 'rollout', "
                    f"got {got!r}"
                )
        name, num_steps = "sampler.num_inference_steps", self.sampler.num_inference_steps
        if num_steps is None:
            name = "schedule.num_train_timesteps"
            num_steps = self.schedule.num_train_timesteps
        if num_steps <= self.horizon:
            raise InputError(
                f"{name} must be above the horizon, {self.horizon}, for a denoiser of kind "
                f"'rollout', whose states and actions agree on one more step in each, got "
                f"{num_steps}"
            )

    @property
    def world_model_training(
        self,
    ) -> (
        DenoiserConfig
        | AutoregressiveConfig
        | EnsembleConfig
        | TransformerModelConfig
        | AutoregressiveDiffusionConfig
    ):
        """The options of the world model in use that say how often and on how much it trains:
        batch_size, updates_per_env_step, pretrain_updates."""
        groups = {"trajectory_diffusion": "denoiser"}
        return getattr(self, groups.get(self.world_model, self.world_model))

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
    def from_preset(cls, name: str) -> TrainConfig:
        """Return a preset.

        "default": the released code's settings. "paper": the paper's text, whose predicted noise
        goes wrong until the denoiser is well trained (`learn` warns of it). "laptop": locomotion on
        a CPU. "quick": minutes on a CPU, tuned on Pendulum-v1 and InvertedPendulum-v5. Each is one
        configuration for all environments.

        Raises:
            InputError: unknown preset.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise InputError(f"preset must be one of {list(PRESETS)}, got {name!r}")
        return PRESETS[name]()


def _environment(env_id: str) -> str:
    """Return an environment id without module and namespace: "ale:ns/Hopper-v5" -> "Hopper-v5"."""
    return env_id.rsplit(":")[-1].rsplit("/")[-1]


def _paper() -> TrainConfig:
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


def _small_transformer(pretrain_updates: int) -> TransformerModelConfig:
    return TransformerModelConfig(
        hidden_dim=64,
        num_layers=2,
        learning_rate=1e-3,
        batch_size=32,
        pretrain_updates=pretrain_updates,
    )


def _small_autoregressive_diffusion(pretrain_updates: int) -> AutoregressiveDiffusionConfig:
    return AutoregressiveDiffusionConfig(
        hidden_dim=128,
        num_layers=3,
        sampler=EDMConfig.paper(num_inference_steps=32),
        learning_rate=1e-3,
        batch_size=32,
        pretrain_updates=pretrain_updates,
    )


def _quick() -> TrainConfig:
    """Small enough for one CPU core and minutes; tuned on Pendulum-v1 and InvertedPendulum-v5, one
    configuration for all environments.

    As in "laptop" actions are exactly on-policy, the denoiser rolls one step's network out, what
    ends a trajectory counts, and updates become small towards the end of the run: where every
    imagined trajectory survives, advantages are noise. Saturated policies lost what they had learnt
    (InvertedPendulum-v5, full force in turns), or stayed at the bottom (Pendulum-v1), hence
    `saturation_coef`.

    Unlike in the released settings, the target critic is fast (its lag, not its network, bounded
    how fast values grew), the learning rates are large and learned quickly, and the moments stay as
    they were after the prefill, so that networks keep what they learnt.
    """
    return TrainConfig(
        horizon=5,
        schedule=ScheduleConfig(num_train_timesteps=12, tau=1.0),
        sampler=SamplerConfig.official(
            action_update="exact",
            clip_state_change=None,
            denoiser_actions="clipped",
            scale_actions=False,
        ),
        denoiser=DenoiserConfig(
            kind="rollout",
            hidden_dim=128,
            num_layers=2,
            batch_size=32,
            learning_rate=1e-3,
            ema_decay=0.9,
            ema_start=0,
            updates_per_env_step=0.5,
            pretrain_updates=600,
        ),
        autoregressive=AutoregressiveConfig(pretrain_updates=600),
        ensemble=EnsembleConfig(pretrain_updates=600),
        transformer=_small_transformer(pretrain_updates=600),
        autoregressive_diffusion=_small_autoregressive_diffusion(pretrain_updates=600),
        policy=PolicyConfig(hidden_dim=64, init_std=0.7, min_std=0.2, normed_inputs=True),
        a2c=A2CConfig(
            actor_learning_rate=3e-3,
            actor_learning_rate_lr=0.03,
            critic_learning_rate=2e-3,
            target_critic_decay=0.95,
            target_update=0.02,
            final_target_update=0.002,
            line_search_tolerance=0.4,
            terminal_step_weight=1.0,
            advantage_moments="counted",
            saturation_coef=0.03,
            reward_rms=0.1,
        ),
        normalizer=NormalizerConfig(refresh="prefill", min_std_rewards=0.1, min_std_terminals=0.1),
        total_timesteps=5000,
        imagined_batch_size=128,
        policy_updates_per_env_step=0.5,
        learning_starts=1000,
        policy_delay_steps=0,
        replay_capacity=200_000,
        eval_interval=500,
        log_interval=100,
        checkpoint_interval=2000,
        cpu_threads=1,
    )


def _laptop() -> TrainConfig:
    """Locomotion on two CPU cores: one configuration for all environments.

    Actions are exactly on-policy (action update "exact"), the denoiser rolls one step's
    network out, half of the imagined trajectories start in the newest states, moments are
    refreshed without a change of policy and values, the step that ends a trajectory counts and what
    follows it does not, the policy gradient is pathwise where the world model allows it, and
    updates become smaller towards the end of the run. The numbers are chosen for pathwise gradients
    of an autoregressive model; by the score function more trajectories and a smaller lambda were
    better (256 and 0.7). One policy update falls on four environment steps, not on two, so that the
    model has seen more before the policy moves on.
    """
    return TrainConfig(
        horizon=10,
        schedule=ScheduleConfig(num_train_timesteps=16, tau=1.0),
        sampler=SamplerConfig.official(
            action_update="exact",
            clip_state_change=None,
            denoiser_actions="clipped",
            scale_actions=False,
            num_inference_steps=11,
        ),
        denoiser=DenoiserConfig(
            kind="rollout",
            hidden_dim=256,
            num_layers=3,
            batch_size=32,
            learning_rate=1e-3,
            ema_decay=0.95,
            ema_start=0,
            updates_per_env_step=0.5,
            pretrain_updates=1000,
        ),
        autoregressive=AutoregressiveConfig(batch_size=32, pretrain_updates=1000),
        ensemble=EnsembleConfig(batch_size=32, pretrain_updates=1000),
        transformer=_small_transformer(pretrain_updates=1000),
        autoregressive_diffusion=_small_autoregressive_diffusion(pretrain_updates=1000),
        policy=PolicyConfig(hidden_dim=64, init_std=0.6, min_std=0.15, normed_inputs=True),
        a2c=A2CConfig(
            gradient_estimator="auto",
            gamma=0.995,
            gae_lambda=0.9,
            actor_learning_rate=3e-3,
            actor_learning_rate_lr=0.03,
            critic_learning_rate=1e-3,
            target_critic_decay=0.98,
            target_update=0.02,
            final_target_update=0.002,
            line_search_tolerance=0.4,
            terminal_step_weight=1.0,
            advantage_moments="counted",
            reward_rms=0.1,
        ),
        normalizer=NormalizerConfig(
            preserve_functions=True, min_std_rewards=0.1, min_std_terminals=0.1
        ),
        total_timesteps=120_000,
        imagined_batch_size=128,
        share_of_newest=0.5,
        policy_updates_per_env_step=0.25,
        learning_starts=2000,
        policy_delay_steps=0,
        replay_capacity=500_000,
        eval_interval=5000,
        cpu_threads=1,
    )


PRESETS = {"default": TrainConfig, "laptop": _laptop, "paper": _paper, "quick": _quick}
