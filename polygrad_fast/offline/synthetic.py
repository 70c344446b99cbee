"""Synthetic sets that an agent learns from: where they come from, and which are in use."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.config import OfflineTrainConfig
from polygrad_fast.data.windows import to_transitions
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.offline.diffusion import DiffusionModel
from polygrad_fast.offline.ensemble import EnsembleModel, as_distribution
from polygrad_fast.offline.generation import generate
from polygrad_fast.offline.task import OfflineTask
from polygrad_fast.sampling.edm_sampler import EDMSampler
from polygrad_fast.sampling.policy_score import PolicyGuidance
from polygrad_fast.terminals import alive_steps
from polygrad_fast.transitions import Transitions


class Source(Protocol):
    """What synthetic sets are sampled from.

    Attributes:
        least: transitions that every set holds at least.
        first_guided: whether a policy takes part in the first sets too.
    """

    least: int
    first_guided: bool

    def sample(self, policy: nn.Module | None, seed: int, folder: Path | None) -> Transitions:
        """Return a set, the same for the same arguments on one machine.

        Args:
            policy: whose trajectories they are to be; None: nobody's.
            seed: of what is drawn.
            folder: where parts of it may be kept and are found again; None: nowhere.
        """


def check_model(task: OfflineTask, stored: Mapping[str, Any], kind: str) -> None:
    """Raise InputError unless a model is of a task's environment.

    Args:
        task: dataset and environment.
        stored: config.json of the model's run.
        kind: the model's, for the message.
    """
    identity = task.identity
    for name in ("observation_dim", "action_low", "action_high"):
        if identity[name] != stored[name]:
            raise InputError(
                f"{name} of the dataset must be {stored[name]}, that of the {kind}'s "
                f"({stored['dataset']}), got {identity[name]}"
            )
    ours, theirs = identity["dataset_env_id"], stored["dataset_env_id"]
    if ours and theirs and ours != theirs:
        raise InputError(
            f"the dataset's environment must be {theirs}, that of the {kind}'s "
            f"({stored['dataset']}), got {ours}"
        )


def trajectory_rows(config: OfflineTrainConfig, window_length: int) -> int:
    """Return how many rows a synthetic trajectory has, with a model of such windows."""
    return window_length + 1 if config.trajectory_rows is None else config.trajectory_rows


class DiffusionSource:
    """Trajectories of a diffusion model, unguided or guided by a policy.

    Args:
        task: dataset and environment.
        model: of the task's, on the device.
        config: sampler, guidance and sizes are read.
        device: where sets go.
        progress: show a progress bar while sampling.

    Raises:
        InputError: a model of another task, or one that cannot be sampled from with `config`.
    """

    def __init__(
        self,
        task: OfflineTask,
        model: DiffusionModel,
        config: OfflineTrainConfig,
        device: torch.device,
        progress: bool = False,
    ):
        check_model(task, model.stored, "diffusion model")
        if config.sampler.sigma_data != model.config.sigma_data:
            raise InputError(
                f"sampler.sigma_data must be {model.config.sigma_data}, with which the diffusion "
                f"model was trained, got {config.sampler.sigma_data}"
            )
        self.config, self.normalizer = config, model.normalizer
        self.rows = trajectory_rows(config, model.config.window_length)
        shortest = model.network.min_length
        if self.rows < shortest:
            raise InputError(
                f"trajectory_rows must be at least {shortest} for the diffusion model, got "
                f"{self.rows}"
            )
        self.least = config.num_trajectories * (self.rows - 1)
        self.first_guided = not config.first_unguided
        self.sampler = EDMSampler(
            model.network, config.sampler, config.engine, config.dtype, device
        )
        self._device, self._progress = device, progress

    def sample(self, policy: nn.Module | None, seed: int, folder: Path | None) -> Transitions:
        """Return a set; batches are files in the folder, see `generate`."""
        guidance = None
        if policy is not None:
            guidance = PolicyGuidance(policy, self.normalizer, self.config.guidance)

        def sample() -> Tensor:
            return generate(
                self.sampler,
                self.config.num_trajectories,
                self.rows,
                seed,
                folder,
                self.config.sampling_batch_size,
                guidance,
                self._progress,
            )

        try:
            trajectories = sample()
        except CheckpointError as error:
            # damaged, or begun on another device: nothing is lost but the time to sample it
            warnings.warn(f"a synthetic set is sampled again: {error}", stacklevel=2)
            shutil.rmtree(folder)
            trajectories = sample()
        return to_transitions(self.normalizer.unnormalize(trajectories.to(self._device)))


class EnsembleSource:
    """Trajectories of a policy rolled out in a dynamics ensemble from the dataset's states.

    Args:
        task: dataset and environment.
        model: of the task's, on the device.
        config: sizes are read.
        device: where sets go.

    Raises:
        InputError: a model of another task.
    """

    first_guided = True

    def __init__(
        self,
        task: OfflineTask,
        model: EnsembleModel,
        config: OfflineTrainConfig,
        device: torch.device,
    ):
        check_model(task, model.stored, "ensemble")
        self.config, self.model, self._device = config, model.model, device
        self.rows = trajectory_rows(config, model.config.window_length)
        self.least = config.num_trajectories  # each may end with its first step
        self._starts = task.dataset.transitions().observations.to(device)

    def sample(self, policy: nn.Module, seed: int, folder: Path | None) -> Transitions:
        """Return a set, which is too quickly sampled to be kept in the folder.

        Raises:
            NonFiniteError: an imagined number is NaN or infinite.
        """
        generator = torch.Generator(self._device).manual_seed(seed)
        left, parts = self.config.num_trajectories, []
        while left:
            count = min(left, self.config.sampling_batch_size)
            parts.append(self._roll_out(policy, count, generator))
            left -= count
        return Transitions.concatenate(parts)

    def _roll_out(self, policy: nn.Module, count: int, generator: torch.Generator) -> Transitions:
        picks = torch.randint(len(self._starts), (count,), generator=generator, device=self._device)
        batch = self.model.imagine(
            self._starts[picks], as_distribution(policy), generator, horizon=self.rows
        )
        taken = alive_steps(batch.terminals)[:, :-1]
        found = Transitions.from_parts(
            batch.observations[:, :-1][taken],
            batch.actions[:, :-1][taken].clamp(-1.0, 1.0),  # as the ensemble saw them
            batch.rewards[:, :-1][taken],
            batch.observations[:, 1:][taken],
            batch.terminals[:, :-1][taken],
        )
        if not torch.isfinite(found.rows).all():
            raise NonFiniteError("a trajectory imagined by the ensemble holds NaN or infinity")
        return found


class SyntheticSets:
    """The m sets in use, of which the oldest is replaced; each is that of its number, the seed and
    the policy as it was when the set was due.

    Sets are sampled when they are first needed. Numbers count from 0; those below m are there at
    the beginning.

    Args:
        source: what they are sampled from.
        policy: of the agent.
        is_guided: whether policies take part: in the first m sets only if the source's do.
        num_sets: m.
        seed: of the sets.
        folder: where they are kept while they are used; None: in memory only.

    Attributes:
        numbers: of the sets in use, by place.
        guides: the policy as it was for each of them.
    """

    def __init__(
        self,
        source: Source,
        policy: nn.Module,
        is_guided: bool,
        num_sets: int,
        seed: int,
        folder: Path | None,
    ):
        self.source, self._is_guided, self._seed, self._folder = source, is_guided, seed, folder
        self.numbers = list(range(num_sets))
        self.guides = [copy.deepcopy(policy).requires_grad_(False) for _ in self.numbers]
        self.tables: list[Transitions | None] = [None] * num_sets

    def batch(self, size: int, generator: torch.Generator) -> list[Transitions]:
        """Draw `size` rows without replacement, as evenly from all sets as that divides, the newest
        giving one more: a part for each set, the oldest first."""
        number = len(self.numbers)
        parts = []
        for age, place in enumerate(np.argsort(self.numbers)):
            count = (size + age) // number  # of which they are one more from size % number on
            if count:
                parts.append(self.table(int(place)).sample(count, generator))
        return parts

    def table(self, place: int) -> Transitions:
        """Return the set in a place, sampled if it is not there yet."""
        if self.tables[place] is None:
            self.tables[place] = self._sample(place)
        return self.tables[place]

    def renew(self, policy: nn.Module) -> None:
        """Let go of the oldest set; a new one of the policy as it is now takes its place."""
        place = int(np.argmin(self.numbers))
        self.numbers[place], self.tables[place] = max(self.numbers) + 1, None
        self.guides[place].load_state_dict(policy.state_dict())

    def guide(self, place: int) -> nn.Module | None:
        """Return the policy that takes part in the set in a place, None where none does."""
        first = self.numbers[place] < len(self.numbers) and not self.source.first_guided
        return self.guides[place] if self._is_guided and not first else None

    def _sample(self, place: int) -> Transitions:
        """Sample a set, or read what is there of it; those no longer in use are deleted."""
        number, folder = self.numbers[place], None
        if self._folder is not None:
            folder = self._folder / f"set_{number:05d}"
            used = {f"set_{used:05d}" for used in self.numbers}
            for old in self._folder.glob("set_*"):
                if old.name not in used:
                    shutil.rmtree(old, ignore_errors=True)
        seed = int(np.random.SeedSequence([self._seed, 2, number]).generate_state(1)[0])
        return self.source.sample(self.guide(place), seed, folder)

    def metrics(self) -> dict[str, float]:
        """Return the newest number, and means over the sets that are there."""
        tables = [table for table in self.tables if table is not None]
        if not tables:
            return {}
        return {
            "synthetic/set": max(self.numbers),
            "synthetic/mean_reward": float(np.mean([float(t.rewards.mean()) for t in tables])),
            "synthetic/terminals": float(np.mean([float(t.terminals.mean()) for t in tables])),
        }

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def modules(self) -> dict[str, nn.Module]:
        """Return the policies by name."""
        return {f"guide_{place}": guide for place, guide in enumerate(self.guides)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the policies' weights."""
        return {"numbers": list(self.numbers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the sets are sampled, or read, again."""
        self.numbers = list(state["numbers"])
        self.tables = [None] * len(self.numbers)
