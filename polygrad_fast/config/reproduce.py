"""Sizes of the experiments that `polygrad-fast reproduce` repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from polygrad_fast.config.options import Options
from polygrad_fast.errors import InputError


class Scale(Options):
    """Sizes of experiments. The defaults are for a CPU."""

    @classmethod
    def from_scale(cls, name: str) -> Self:
        """Return the sizes of a scale: "quick" (a CPU) or "paper".

        Raises:
            InputError: unknown scale.
        """
        scales = {"quick": cls, "paper": _PAPER[cls]}
        if name not in scales:
            raise InputError(f"scale must be one of {list(scales)}, got {name!r}")
        return scales[name]()


@dataclass(frozen=True)
class PGDScale(Scale):
    """Sizes of the experiments of policy-guided diffusion. The defaults are for a CPU."""

    env_ids: tuple[str, ...] = ("Hopper-v5", "HalfCheetah-v5")
    recipes: tuple[str, ...] = ("medium-replay", "medium")
    """Of the datasets, see `data collect --recipe`."""
    dataset_steps: int = 30_000
    """Of a dataset; medium-replay is as long as its policy's training."""
    behaviour_seed: int = 0
    """Of the behaviour policies, the same for all seeds."""
    agents: tuple[str, ...] = ("td3_bc", "iql")
    data: tuple[str, ...] = ("real", "unguided", "guided")
    """Kinds of data that agents learn from (pgd-returns); "ensemble" is another."""
    preset: Literal["quick", "released", "paper"] = "quick"
    """Of diffusion models, ensembles and agents; the options below replace its own."""
    diffusion_updates: int | None = 5000
    """None: as many as the preset has, likewise below."""
    ensemble_updates: int | None = 4000
    agent_updates: int | None = 5000
    lifetime: int | None = 1250
    """Updates on a synthetic set."""
    num_trajectories: int | None = 1024
    """Of a synthetic set."""
    test_episodes: int = 20
    """Fresh episodes of each agent that is compared."""
    coefficients: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """Of guidance (pgd-likelihood, pgd-error)."""
    lengths: tuple[int, ...] = (16, 32)
    """Rows of the trajectories whose error is measured (pgd-error)."""
    targets: tuple[str, ...] = ("random", "medium-replay", "medium")
    """Target policies (pgd-likelihood, pgd-error): IQL on real data of these recipes, or an
    untrained one, "random"."""
    model_recipe: str = "medium"
    """Dataset of the models that target policies guide."""
    measured_trajectories: int = 256
    """Sampled with each coefficient, length and target."""

    def _check_ranges(self) -> None:
        for name in ("env_ids", "recipes", "agents", "data", "coefficients", "lengths", "targets"):
            self._check(len(getattr(self, name)) > 0, name, "at least one")
        self._check_at_least(1, "dataset_steps", "test_episodes", "measured_trajectories")
        self._check_at_least(0, "behaviour_seed")
        self._check(min(self.lengths) >= 2, "lengths", "at least 2 each")
        self._check(min(self.coefficients) >= 0, "coefficients", "at least 0 each")
        for name in ("diffusion_updates", "ensemble_updates", "agent_updates", "lifetime"):
            self._check_positive(name)
        self._check_positive("num_trajectories")


def _paper_pgd() -> PGDScale:
    """The paper's networks and numbers of updates, on datasets of a million steps that are made
    here."""
    return PGDScale(
        env_ids=("HalfCheetah-v5", "Walker2d-v5", "Hopper-v5"),
        dataset_steps=1_000_000,
        preset="paper",
        diffusion_updates=None,
        ensemble_updates=None,
        agent_updates=None,
        lifetime=None,
        num_trajectories=None,
        test_episodes=100,
        coefficients=(0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
        lengths=(16, 32, 64, 128),
        measured_trajectories=2048,
    )


@dataclass(frozen=True)
class WorldModelScale(Scale):
    """Sizes of PolyGRAD's experiments with world models. The defaults are for a CPU."""

    env_ids: tuple[str, ...] = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
    policies: str = ""
    """Folder of behaviour policies, ENV_ID.safetensors each, as those in benchmarks/policies;
    without one they are trained first."""
    medium_return: float | None = None
    """Mean return from which on a behaviour policy will do; None: as `data collect` has it."""
    dataset_steps: int = 30_000
    """Of an environment's dataset, recipe mixed-noise."""
    behaviour_seed: int = 0
    """Of the behaviour policy, whose actions are imagined too, and the dataset; of all seeds."""
    held_out: float = 0.1
    """Share of the episodes that no model trains on, whose states trajectories start from."""
    models: tuple[str, ...] = (
        "official",
        "paper",
        "exact",
        "rollout",
        "autoregressive",
        "ensemble",
        "transformer",
        "autoregressive_diffusion",
    )
    """World models: trajectory diffusion by the released code, by the paper's text, with exact
    actions, or with exact actions and a denoiser of kind rollout; one step at a time."""
    horizons: tuple[int, ...] = (10, 50)
    """Steps of the trajectories; trajectory diffusion is trained for each, the others once, on
    windows of the first."""
    diffusion_steps: tuple[int, ...] = (128, 16)
    """Of a sample of trajectory diffusion; the largest is also what it is trained with."""
    preset: Literal["quick", "laptop", "default", "paper"] = "laptop"
    """Of the networks' sizes and their training."""
    denoiser: Literal["residual_mlp", "transformer"] = "residual_mlp"
    """Of trajectory diffusion but for "rollout"."""
    model_updates: int = 2000
    """Of each world model."""
    model_batch_size: int | None = 32
    """Windows per update; None: as many as the preset has for each model."""
    measured_trajectories: int = 256
    """Of each world model."""
    tuning_samples: int = 30
    """After which the guidance scale of "official" and "paper" stays."""
    tuning_trajectories: int = 32
    """Of each of these."""
    sigmas: tuple[float, ...] = (0.8, 0.4, 0.2, 0.1, 0.06, 0.02)
    """Standard deviations of the policy (fig3), whose trajectories have the first horizon."""
    timed_trajectories: int = 256
    """Imagined at a time for the computation time (fig4)."""

    def _check_ranges(self) -> None:
        lists = ("env_ids", "models", "horizons", "diffusion_steps", "sigmas")
        for name in lists:
            self._check(len(getattr(self, name)) > 0, name, "at least one")
        self._check_at_least(1, "dataset_steps", "model_updates", "tuning_samples")
        self._check_at_least(1, "timed_trajectories")
        self._check_at_least(2, "tuning_trajectories")
        self._check_at_least(4, "measured_trajectories")
        self._check_at_least(0, "behaviour_seed")
        self._check(0 < self.held_out < 1, "held_out", "in (0, 1)")
        self._check(min(self.horizons) >= 3, "horizons", "at least 3 each")
        self._check(min(self.diffusion_steps) >= 1, "diffusion_steps", "at least 1 each")
        self._check(min(self.sigmas) > 0, "sigmas", "positive")
        for name in ("horizons", "diffusion_steps", "sigmas"):
            values = getattr(self, name)
            self._check(len(set(values)) == len(values), name, "different ones")
        self._check_positive("model_batch_size")


def _paper_world_models() -> WorldModelScale:
    """The paper's networks and numbers of updates (appendix C.1), on datasets of a million steps
    that are made here."""
    return WorldModelScale(
        dataset_steps=1_000_000,
        horizons=(10, 50, 200),
        diffusion_steps=(128, 16),
        preset="default",
        denoiser="transformer",
        model_updates=1_000_000,
        model_batch_size=None,
        measured_trajectories=500,
        tuning_samples=200,
        tuning_trajectories=256,
        timed_trajectories=1000,
    )


@dataclass(frozen=True)
class TrainingScale(Scale):
    """Sizes of PolyGRAD's experiments with trainings. The defaults are for a CPU."""

    env_ids: tuple[str, ...] = ("InvertedPendulum-v5", "Pendulum-v1")
    preset: Literal["quick", "laptop", "default", "paper"] = "quick"
    total_timesteps: int | None = None
    """Environment steps of every algorithm; None: the preset's."""
    algorithms: tuple[str, ...] = ("trajectory_diffusion", "autoregressive", "ppo", "sac")
    """World models, as the preset has them, and algorithms of `baseline` (fig6)."""
    ablations: tuple[str, ...] = (
        "base",
        "random_actions",
        "policy_sampling",
        "no_clipping",
        "state_update",
        "noisy_states",
        "exact",
    )
    """Of section 5.4; "exact" is none of the paper's (fig8)."""
    smoothing: int = 1
    """Newest evaluations that a point of a learning curve is the mean of."""

    def _check_ranges(self) -> None:
        for name in ("env_ids", "algorithms", "ablations"):
            self._check(len(getattr(self, name)) > 0, name, "at least one")
        self._check_at_least(1, "smoothing")
        self._check_positive("total_timesteps")


def _paper_trainings() -> TrainingScale:
    """The paper's networks and environment steps (appendix C.2)."""
    return TrainingScale(
        env_ids=("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"),
        preset="default",
        algorithms=("trajectory_diffusion", "autoregressive", "ppo", "a2c", "trpo", "sac"),
        smoothing=10,
    )


_PAPER: dict[type[Scale], Callable[[], Scale]] = {
    PGDScale: _paper_pgd,
    WorldModelScale: _paper_world_models,
    TrainingScale: _paper_trainings,
}
