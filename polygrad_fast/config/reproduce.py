"""Sizes of the experiments that `polygrad-fast reproduce` repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polygrad_fast.config.options import Options
from polygrad_fast.errors import InputError


@dataclass(frozen=True)
class PGDScale(Options):
    """Sizes of the experiments of policy-guided diffusion. The defaults are for a CPU."""

    env_ids: tuple[str, ...] = ("Hopper-v5", "HalfCheetah-v5")
    recipes: tuple[str, ...] = ("medium-replay", "medium")
    """Of the datasets, see `data collect --recipe`."""
    dataset_steps: int = 30_000
    """Of a dataset; medium-replay is as long as its policy's training."""
    behaviour_seed: int = 0
    """Of the behaviour policies, the same for all seeds."""
    agents: tuple[str, ...] = ("td3_bc", "iql")
    data: tuple[str, ...] = ("real", "unguided", "guided", "ensemble")
    """Kinds of data that agents learn from (pgd-returns)."""
    preset: Literal["quick", "released", "paper"] = "quick"
    """Of diffusion models, ensembles and agents; the options below replace its own."""
    diffusion_updates: int | None = 20_000
    """None: as many as the preset has, likewise below."""
    ensemble_updates: int | None = 4000
    agent_updates: int | None = 6000
    lifetime: int | None = 1500
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

    @classmethod
    def from_scale(cls, name: str) -> PGDScale:
        """Return the sizes of a scale: "quick" (a CPU) or "paper".

        Raises:
            InputError: unknown scale.
        """
        if name not in PGD_SCALES:
            raise InputError(f"scale must be one of {list(PGD_SCALES)}, got {name!r}")
        return PGD_SCALES[name]()


def _paper() -> PGDScale:
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


PGD_SCALES = {"quick": PGDScale, "paper": _paper}
