"""Commands of offline learning: offline diffuse, ensemble, train, evaluate and demo.

What takes long to import is imported by the command that needs it, as in `cli`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polygrad_fast.arguments import as_integer
from polygrad_fast.config import DiffuseConfig, DynamicsConfig, OfflineTrainConfig, from_dict
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.runs.directory import read_run_config, refuse_other_options
from polygrad_fast.runs.interrupts import end_on_interrupt

if TYPE_CHECKING:
    from polygrad_fast.offline.runs import OfflineRun

DIFFUSE, ENSEMBLE, TRAIN = "offline diffuse", "offline ensemble", "offline train"
EVALUATION_SEED = 1_000_003
Preset = Literal["quick", "released", "paper"]


@dataclass(frozen=True)
class Diffuse:
    """Train a trajectory diffusion model on a dataset."""

    dataset: str
    """A folder or id of Minari, a D4RL file (.hdf5), or a file .npz."""
    run_dir: Path
    """Where metrics and checkpoints go."""
    preset: Preset = "quick"
    """Small tasks on a CPU, the released code's settings, or the paper's text."""
    env_id: str = ""
    """Environment whose bounds the actions have; default: the one the dataset names."""
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    progress: bool = True
    """Show a progress bar."""
    config: Annotated[DiffuseConfig, tyro.conf.arg(name="")] = field(default_factory=DiffuseConfig)


@dataclass(frozen=True)
class FitEnsemble:
    """Train a dynamics ensemble on a dataset, for `offline train --data ensemble`."""

    dataset: str
    """A folder or id of Minari, a D4RL file (.hdf5), or a file .npz."""
    run_dir: Path
    """Where metrics and checkpoints go."""
    preset: Preset = "quick"
    """Small tasks on a CPU, or with the windows of the released code's or the paper's settings."""
    env_id: str = ""
    """Environment whose bounds the actions have; default: the one the dataset names."""
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    progress: bool = True
    """Show a progress bar."""
    config: Annotated[DynamicsConfig, tyro.conf.arg(name="")] = field(
        default_factory=DynamicsConfig
    )


@dataclass(frozen=True)
class OfflineTrain:
    """Train an agent on real data, or on trajectories of a diffusion model or an ensemble of
    them."""

    agent: Literal["td3_bc", "iql"]
    dataset: str
    """A folder or id of Minari, a D4RL file (.hdf5), or a file .npz."""
    run_dir: Path
    """Where metrics and checkpoints go."""
    data: str = "real"
    """"real", "unguided" (a diffusion model's trajectories), "guided" (by the agent's policy), or
    "ensemble" (the agent's policy in a dynamics ensemble)."""
    diffusion: str = ""
    """Run directory of `offline diffuse`, for unguided and guided data."""
    ensemble: str = ""
    """Run directory of `offline ensemble`, for ensemble data."""
    preset: Preset = "quick"
    """Small tasks on a CPU, the released code's settings, or the paper's text."""
    env_id: str = ""
    """Environment to evaluate in; default: the one the dataset names."""
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    progress: bool = True
    """Show progress bars."""
    config: Annotated[OfflineTrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=OfflineTrainConfig
    )


@dataclass(frozen=True)
class OfflineEvaluate:
    """Play episodes with an agent of `offline train`; the last line printed is JSON."""

    run_dir: tyro.conf.Positional[Path]
    episodes: int = 16
    checkpoint: Literal["last", "best"] = "last"
    """The last agent, or the best-evaluated one, which evaluations in the environment have
    chosen."""
    seed: int = EVALUATION_SEED
    """Seed of the episodes."""
    device: str = "auto"


@dataclass(frozen=True)
class OfflineDemo:
    """Collect a dataset, train a diffusion model, and compare agents that learn from real, unguided
    and guided data; the last line printed is JSON."""

    run_dir: Path = Path("runs/offline_demo")
    """A folder that is not there yet."""
    agent: Literal["td3_bc", "iql"] = "td3_bc"
    seed: int = 0
    progress: bool = True
    """Show progress bars."""


Trains = Diffuse | FitEnsemble | OfflineTrain
TRAINING = {DIFFUSE: Diffuse, ENSEMBLE: FitEnsemble, TRAIN: OfflineTrain}
CONFIGS = {
    Diffuse: DiffuseConfig,
    FitEnsemble: DynamicsConfig,
    OfflineTrain: OfflineTrainConfig,
}
"""Of the commands that train."""
MODEL_FLAGS = {"unguided": "diffusion", "guided": "diffusion", "ensemble": "ensemble"}
"""Kind of data -> the flag that names its model's run directory."""


def defaults(
    command: list[str], flag: Callable[[str], str | None], resumes: bool
) -> dict[type, Trains]:
    """Return what the commands that train start from: a preset's settings, or those of the run to
    resume.

    Args:
        command: the one that is given, or nothing.
        flag: returns the value given for --name, or None.
        resumes: whether --resume is given.

    Raises:
        InputError: unknown preset, or --resume without a run directory to continue.
    """
    found = {}
    for name, options in TRAINING.items():
        if command != [name]:
            found[options] = _new(options, "quick")
        elif not resumes:
            found[options] = _new(options, flag("preset") or "quick")
        elif run_dir := flag("run-dir"):
            found[options] = _stored(options, Path(run_dir))
        else:
            raise InputError("--resume needs --run-dir, the run directory to continue")
    return found


def _new(options: type[Trains], preset: str) -> Trains:
    needed = [item.name for item in dataclasses.fields(options) if item.default is MISSING]
    given = {name: tyro.MISSING for name in needed if name != "config"}
    return options(**given, config=CONFIGS[options].from_preset(preset))


def _stored(options: type[Trains], run_dir: Path) -> Trains:
    """Return what a run began with."""
    name = next(name for name, each in TRAINING.items() if each is options)
    found = read_run_config(run_dir, name)
    with _damage_named(run_dir):
        given = {
            "dataset": found["dataset"],
            "run_dir": run_dir,
            "preset": found["preset"],
            "env_id": found["env_id"] or "",
            "seed": found["seed"],
            "config": from_dict(found["config"], CONFIGS[options]),
        }
        if options is OfflineTrain:
            given |= {name: found[name] for name in ("agent", "data")}
            if found["data"] in MODEL_FLAGS:
                given[MODEL_FLAGS[found["data"]]] = found["model"]
    return options(**given)


@contextlib.contextmanager
def _damage_named(run_dir: Path) -> Iterator[None]:
    """Turn a missing entry of a run's config.json into a sentence."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{run_dir / 'config.json'} is damaged: [{error}] missing") from None


def _check_same_run(given: Trains) -> None:
    """A resumed run keeps its options."""
    stored = _stored(type(given), given.run_dir)

    def options(command: Trains) -> dict[str, Any]:
        # where dataset and model lie may change, what they hold is checked later
        names = ("agent", "data", "preset", "env_id", "seed")
        chosen = {name: getattr(command, name) for name in names if hasattr(command, name)}
        return chosen | dataclasses.asdict(command.config)

    refuse_other_options(options(given), options(stored), stored.run_dir)


def _diffuse(command: Diffuse) -> None:
    with end_on_interrupt():
        from polygrad_fast.offline.runs import diffuse
    run = _begin_model(command, diffuse)
    print(
        f"training a diffusion model on {len(run.training.windows):,} windows of "
        f"{command.config.window_length} steps of {command.dataset} in {command.run_dir}"
    )
    _train_on(run, command, DIFFUSE)


def _fit_ensemble(command: FitEnsemble) -> None:
    with end_on_interrupt():
        from polygrad_fast.offline.runs import fit_ensemble
    run = _begin_model(command, fit_ensemble)
    print(
        f"training an ensemble of {command.config.ensemble.num_members} networks on "
        f"{len(run.training.transitions):,} transitions of {command.dataset} in {command.run_dir}"
    )
    _train_on(run, command, ENSEMBLE)


def _begin_model(command: Diffuse | FitEnsemble, begin: Callable[..., OfflineRun]) -> OfflineRun:
    """Begin or resume a model's run."""
    if command.resume:
        _check_same_run(command)
    with end_on_interrupt():
        return begin(
            command.dataset,
            command.run_dir,
            command.preset,
            command.seed,
            command.config,
            command.env_id or None,
            command.device,
            command.resume,
        )


def _train(command: OfflineTrain) -> None:
    if command.resume:
        _check_same_run(command)
    if command.data not in ("real", *MODEL_FLAGS):
        raise InputError(f"--data must be one of {['real', *MODEL_FLAGS]}, got {command.data!r}")
    needed = MODEL_FLAGS.get(command.data)
    for flag in sorted(set(MODEL_FLAGS.values())):
        given = getattr(command, flag)
        if flag != needed and given:
            raise InputError(f"--data {command.data} needs no --{flag}, got {given}")
        if flag == needed and not given:
            kind = DIFFUSE if flag == "diffusion" else ENSEMBLE
            raise InputError(f"--data {command.data} needs --{flag}, the run directory of `{kind}`")
    model = getattr(command, needed) if needed else ""
    with end_on_interrupt():
        from polygrad_fast.offline.runs import train_agent

        run = train_agent(
            command.agent,
            command.data,
            command.dataset,
            command.run_dir,
            Path(model) if model else None,
            command.preset,
            command.seed,
            command.config,
            command.env_id or None,
            command.device,
            command.resume,
            command.progress,
        )
    print(
        f"training {command.agent} on {command.data} data, {len(run.training.real):,} real "
        f"transitions of {command.dataset}, in {command.run_dir}"
    )
    _train_on(run, command, TRAIN)


def _train_on(run: OfflineRun, command: Trains, name: str) -> None:
    """Train a run and say how it stands."""
    training = run.training
    if training.num_updates:
        print(f"resuming at update {training.num_updates:,} of {training.total_updates:,}")
    if training.num_updates < training.total_updates:
        run.train(command.progress)
    rows = run.rows()
    last = {key: value for row in rows for key, value in row.items()}
    shown = ("diffusion/loss", "diffusion/validation_loss", "dynamics/loss")
    shown += ("dynamics/holdout_error", "eval/mean_reward", "eval/score")
    told = [f"{key} {last[key]:.4g}" for key in shown if key in last]
    print(f"update {training.num_updates:,}: {', '.join(told) or 'no row of metrics yet'}")
    if "eval/mean_reward" in last:
        title = f"{run.run.identity['env_id']}, {run.run.identity['agent']}, seed {command.seed}"
        print(_plot(command.run_dir, title))
    if training.num_updates < training.total_updates:
        again = f"polygrad-fast {name} --resume --run-dir "
        print(f"stopped; `{again}{shlex.quote(str(command.run_dir))}` continues")


def _plot(run_dir: Path, title: str) -> str:
    """Draw a run's learning curve and say where it is."""
    from polygrad_fast.evaluation.plots import plot_learning_curve

    curve = run_dir / "learning_curve.png"
    try:
        plot_learning_curve(run_dir / "metrics.csv", curve, title)
    except InputError as error:  # matplotlib is an extra
        return f"no learning curve ({error})"
    return f"learning curve in {curve}"


def _evaluate(command: OfflineEvaluate) -> None:
    as_integer(command.episodes, "--episodes", 1)
    as_integer(command.seed, "--seed", 0)
    read_run_config(command.run_dir, TRAIN)
    with end_on_interrupt():
        from polygrad_fast.evaluation.offline import OfflineEvaluator
        from polygrad_fast.offline.agents import comparable_score, load_agent

        predict, stored, updates = load_agent(command.run_dir, command.checkpoint, command.device)
        evaluator = OfflineEvaluator(stored["env_id"], command.episodes, command.seed)
    result = evaluator.evaluate(predict)
    episodes = result.episodes
    for number, (value, length) in enumerate(
        zip(episodes.returns.tolist(), episodes.lengths.tolist(), strict=True), 1
    ):
        print(f"episode {number}: return {value:.2f}, {length} steps")
    print(
        f"{stored['env_id']}, {stored['agent']} on {stored['data']} data, {command.checkpoint} "
        f"checkpoint (update {updates:,}): mean return {episodes.mean_reward:.2f}, standard "
        f"deviation {episodes.std_reward:.2f} over {len(episodes.returns)} episodes"
    )
    if result.score is not None:
        print(f"D4RL score {result.score:.2f}")
    if result.caveat is not None:
        print(result.caveat)
    summary = {"mean_reward": episodes.mean_reward, "std_reward": episodes.std_reward}
    score = comparable_score(result)
    print(json.dumps(summary | ({"score": score["eval/score"]} if score else {})))


def _demo(command: OfflineDemo) -> None:
    as_integer(command.seed, "--seed", 0, 2**32)
    with end_on_interrupt():
        from polygrad_fast.offline.demo import run_demo
    print(json.dumps(run_demo(command.run_dir, command.agent, command.seed, command.progress)))


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    DIFFUSE: (Diffuse, _diffuse),
    ENSEMBLE: (FitEnsemble, _fit_ensemble),
    TRAIN: (OfflineTrain, _train),
    "offline evaluate": (OfflineEvaluate, _evaluate),
    "offline demo": (OfflineDemo, _demo),
}
"""Options of each command, and what runs it."""
