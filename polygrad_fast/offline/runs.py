"""Runs of offline learning: begun, resumed and trained in their directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from polygrad_fast.arguments import as_device, as_integer
from polygrad_fast.config import DiffuseConfig, DynamicsConfig, OfflineTrainConfig, TrainConfig
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.evaluation.offline import OfflineEvaluator
from polygrad_fast.offline import agents, diffusion, ensemble, world_model
from polygrad_fast.offline.agents import AgentTraining
from polygrad_fast.offline.diffusion import DiffusionTraining, load_diffusion
from polygrad_fast.offline.ensemble import EnsembleTraining, load_ensemble
from polygrad_fast.offline.loop import run_updates
from polygrad_fast.offline.task import OfflineTask, load_task
from polygrad_fast.offline.world_model import WorldModelTraining, split_episodes
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.directory import difference, read_run_config, refuse_another_run
from polygrad_fast.runs.metrics import UPDATE_COLUMN, read_metrics
from polygrad_fast.runs.restore import checkpoint_to_resume
from polygrad_fast.runs.run import Run

SEEDS = 2**32
OfflineTraining = DiffusionTraining | EnsembleTraining | WorldModelTraining | AgentTraining
OfflineConfig = DiffuseConfig | DynamicsConfig | TrainConfig | OfflineTrainConfig


class OfflineRun:
    """A training in a run directory; `train` continues it.

    Attributes:
        training: what takes the updates. run: directory, checkpoints and metrics.
    """

    def __init__(self, training: OfflineTraining, run: Run):
        self.training, self.run = training, run

    def train(self, progress: bool = True) -> bool:
        """Take the updates that are left and return whether none is; see `run_updates`."""
        return run_updates(self.training, self.run, progress)

    def rows(self) -> list[dict[str, float]]:
        """Return the rows of metrics.csv, none where there is no such file yet."""
        path = self.run.directory / "metrics.csv"
        return read_metrics(path) if path.exists() else []


def diffuse(
    dataset: str,
    run_dir: Path,
    preset: str = "quick",
    seed: int = 0,
    config: DiffuseConfig | None = None,
    env_id: str | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
) -> OfflineRun:
    """Begin or resume the training of a diffusion model on a dataset.

    Args:
        dataset: file, folder or id, see `polygrad_fast.data.load_dataset`.
        run_dir: its run directory.
        preset: name of the configuration; only noted where `config` is given.
        seed: of everything.
        config: default the preset.
        env_id: the environment whose bounds the actions have; None: the one the dataset names.
        device: as `as_device` takes it.
        resume: continue the run in `run_dir` from its last checkpoint.

    Raises:
        InputError: wrong input, before anything is written.
    """
    config = config or DiffuseConfig.from_preset(preset)
    options = preset, seed, config, env_id, device, resume
    return _model_run(diffusion.KIND, DiffusionTraining, dataset, run_dir, *options)


def fit_ensemble(
    dataset: str,
    run_dir: Path,
    preset: str = "quick",
    seed: int = 0,
    config: DynamicsConfig | None = None,
    env_id: str | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
) -> OfflineRun:
    """Begin or resume the training of a dynamics ensemble on a dataset; the arguments are those of
    `diffuse`."""
    config = config or DynamicsConfig.from_preset(preset)
    options = preset, seed, config, env_id, device, resume
    return _model_run(ensemble.KIND, EnsembleTraining, dataset, run_dir, *options)


def fit_world_model(
    dataset: str,
    run_dir: Path,
    config: TrainConfig,
    total_updates: int,
    held_out: float,
    preset: str = "laptop",
    seed: int = 0,
    device: str | torch.device = "auto",
    resume: bool = False,
) -> OfflineRun:
    """Begin or resume the training of a world model on a dataset, some episodes held out.

    Args:
        dataset, run_dir, preset, seed, device, resume: as those of `diffuse`.
        config: resolved; see `WorldModelTraining`.
        total_updates: at least 1.
        held_out: share of the episodes, see `split_episodes`.

    Raises:
        InputError: wrong input, before anything is written.
    """
    total_updates = as_integer(total_updates, "total_updates", 1)

    def make(
        whole: OfflineDataset, config: TrainConfig, seed: int, device: torch.device
    ) -> WorldModelTraining:
        trained, _ = split_episodes(whole, held_out)
        return WorldModelTraining(trained, config, total_updates, seed, device)

    more = {"total_updates": total_updates, "held_out": held_out}
    options = preset, seed, config, None, device, resume, more
    return _model_run(world_model.KIND, make, dataset, run_dir, *options)


def _model_run(
    kind: str,
    make: Callable[..., OfflineTraining],
    dataset: str,
    run_dir: Path,
    preset: str,
    seed: int,
    config: OfflineConfig,
    env_id: str | None,
    device: str | torch.device,
    resume: bool,
    more: Mapping[str, Any] | None = None,
) -> OfflineRun:
    """Begin or resume the training that `make(dataset, config, seed, device)` returns; config.json
    also says what is in `more`."""
    seed, device = as_integer(seed, "seed", 0, SEEDS), as_device(device)
    _check_directory(run_dir, kind, resume)
    task = load_task(dataset, env_id)
    training = make(task.dataset, config, seed, device)
    identity = _identity(kind, task, preset, seed, config) | dict(more or {})
    return _opened(training, run_dir, identity, resume)


def _identity(
    kind: str,
    task: OfflineTask,
    preset: str,
    seed: int,
    config: OfflineConfig,
) -> dict[str, Any]:
    """Return what config.json says of a new run."""
    return {
        "kind": kind,
        "env_id": task.env_id,
        "env_given_by_id": True,
        "preset": preset,
        "seed": seed,
        "config": dataclasses.asdict(config),
        **task.identity,
    }


def train_agent(
    agent: str,
    data: str,
    dataset: str,
    run_dir: Path,
    model_dir: Path | None = None,
    preset: str = "quick",
    seed: int = 0,
    config: OfflineTrainConfig | None = None,
    env_id: str | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    progress: bool = False,
) -> OfflineRun:
    """Begin or resume the training of an agent.

    Args:
        agent: "td3_bc" or "iql".
        data: "real", "unguided", "guided" or "ensemble".
        dataset: file, folder or id, see `polygrad_fast.data.load_dataset`.
        run_dir: its run directory.
        model_dir: run directory of the diffusion model, or of the ensemble; not with real data.
        preset: name of the configuration; only noted where `config` is given.
        seed: of everything.
        config: default the preset.
        env_id: the environment to evaluate in; None: the one the dataset names.
        device: as `as_device` takes it.
        resume: continue the run in `run_dir` from its last checkpoint.
        progress: show a progress bar while sampling.

    Raises:
        InputError: wrong input, before anything is written.
    """
    config = config or OfflineTrainConfig.from_preset(preset)
    seed, device = as_integer(seed, "seed", 0, SEEDS), as_device(device)
    _check_directory(run_dir, agents.KIND, resume)
    model = None
    if model_dir is not None:
        load = load_ensemble if data == "ensemble" else load_diffusion
        model = load(model_dir, device)
    task = load_task(dataset, env_id)
    training = AgentTraining(
        task,
        config,
        agent,
        data,
        seed,
        device,
        model,
        evaluator_of(task, config, seed),
        run_dir / "synthetic",
        progress,
    )
    identity = _identity(agents.KIND, task, preset, seed, config) | {
        "agent": agent,
        "data": data,
        "model": None if model_dir is None else str(model_dir.absolute()),
        "model_content": None if model is None else model.describe(),
    }
    return _opened(training, run_dir, identity, resume)


def evaluator_of(task: OfflineTask, config: OfflineTrainConfig, seed: int) -> OfflineEvaluator:
    """Return what plays the evaluations of a training.

    Raises:
        InputError: the environment is not known, cannot be made, or has other actions.
    """
    if task.env_id is None:
        raise InputError(
            f"{task.dataset.source} does not name its environment, which evaluations need: give "
            f"--env-id"
        )
    env = make_environment(task.env_id)
    space = env.action_space
    env.close()
    if (space.low != task.space.low).any() or (space.high != task.space.high).any():
        raise InputError(
            f"{task.env_id} must have the action space {task.space} of the dataset, got {space}"
        )
    return OfflineEvaluator(task.env_id, config.eval_episodes, seed)


def _check_directory(run_dir: Path, kind: str, resume: bool) -> None:
    if resume:
        read_run_config(run_dir, kind)
    else:
        refuse_another_run(run_dir)


def _opened(
    training: OfflineTraining,
    run_dir: Path,
    identity: dict[str, Any],
    resume: bool,
) -> OfflineRun:
    """Return the run of a training, whose state is that of the last checkpoint of a resumed one."""
    keep = training.config.keep_checkpoints
    if not resume:
        return OfflineRun(training, Run.begin(run_dir, identity, keep, False, UPDATE_COLUMN))
    # a dataset or a model may have been moved: their content is compared
    compared = {name: identity[name] for name in identity if name not in ("dataset", "model")}
    differs = difference(compared, read_run_config(run_dir, identity["kind"]))
    if differs is not None:
        name, got, wanted = differs
        raise CheckpointError(
            f"{name} of {run_dir} must be {wanted}, as the run began, got {got}: give what it "
            f"began with, or start another run"
        )
    found, checkpoints = checkpoint_to_resume(run_dir, training.config.checkpoint_interval)
    checkpoints.keep_last = keep
    if found is not None:
        weights, state, _ = load_checkpoint(found)
        training.load(weights, state or {}, str(found))
    return OfflineRun(training, Run(identity, checkpoints, False, UPDATE_COLUMN))
