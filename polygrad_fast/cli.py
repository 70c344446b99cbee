"""Command line: train, evaluate, sample, errors, actions, gradient, dream, baseline; `cli_data` has
data collect, `cli_offline` the offline commands, `cli_reproduce` reproduce.

What takes long to import (torch, gymnasium) is imported by the command that needs it, so that help
is quick and an interrupt is answered.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import functools
import io
import json
import math
import operator
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polygrad_fast import cli_data, cli_offline, cli_reproduce, cli_seeds
from polygrad_fast._version import __version__
from polygrad_fast.arguments import as_device, as_integer, as_number_list, as_output_file
from polygrad_fast.config import TrainConfig, from_dict
from polygrad_fast.errors import InputError, NonFiniteError, RunsFailedError
from polygrad_fast.runs.directory import read_run_config, refuse_other_options
from polygrad_fast.runs.files import write_bytes_atomic
from polygrad_fast.runs.interrupts import end_on_interrupt, stop_on_signals
from polygrad_fast.runs.metrics import read_metrics
from polygrad_fast.training.estimate import num_updates

if TYPE_CHECKING:
    import numpy as np

    from polygrad_fast.agent import PolyGRAD
    from polygrad_fast.diagnostics.dream import Dream as DreamFound
    from polygrad_fast.ranks import Ranks

EVALUATION_SEED = 1_000_003
SPEEDS = {
    "time/env_steps_per_s": "environment steps/s",
    "time/updates_per_s": "updates/s",
    "time/sample_ms": "ms per sample (one batch)",
}


@dataclass(frozen=True)
class Train:
    """Train a policy in imagination. Every option of the preset can be set, e.g. --a2c.gamma
    0.95."""

    env_id: str
    """Gymnasium environment with Box observations and actions, e.g. Hopper-v5."""
    run_dir: str = ""
    """Where metrics, checkpoints and the learning curve go; default runs/ENV_ID-PRESET-SEED."""
    preset: Literal["default", "laptop", "quick", "paper"] = "default"
    """Released code's settings, locomotion on a CPU, small tasks on a CPU, or the paper's text."""
    seed: int = 0
    seeds: str = ""
    """Independent runs in RUN_DIR/seed_0, .., e.g. 0-4 or 0,3,7, and a figure of all."""
    jobs: int = 1
    """With --seeds: how many of them at a time, each a process with one thread."""
    device: str = "auto"
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint; of several seeds, all that have not
    finished."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run directory."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class SeveralSeeds:
    """`train` of several seeds: what every run is begun with, and what this command adds."""

    command: Train
    plan: cli_seeds.Plan
    given: list[str]
    resume: bool


@dataclass(frozen=True)
class Evaluate:
    """Play whole episodes on fresh environments; the last line printed is JSON."""

    run_dir: tyro.conf.Positional[Path]
    episodes: int = 10
    checkpoint: Literal["best", "last"] = "best"
    """The best-evaluated policy, or the last one."""
    seed: int = EVALUATION_SEED
    """Seed of the episodes."""
    stochastic: bool = False
    """Draw actions from the policy instead of taking its mean."""
    device: str = "auto"
    video: Path | None = None
    """Write one more episode as a video, e.g. out.mp4; needs the extra "video"."""


@dataclass(frozen=True)
class Sample:
    """Imagine trajectories from observations in the replay buffer and write them as .npz."""

    run_dir: tyro.conf.Positional[Path]
    num: int = 1000
    """Number of trajectories."""
    out: Path = Path("trajectories.npz")
    device: str = "auto"


@dataclass(frozen=True)
class Errors:
    """Measure how wrong imagined trajectories are: from real states of fresh episodes, their
    actions replayed in MuJoCo; the last line printed is JSON."""

    run_dir: tyro.conf.Positional[Path]
    horizons: str | None = None
    """Steps, e.g. 10,50; default the run's own. Only some world models can imagine more."""
    num: int = 256
    """Number of trajectories."""
    seed: int = 0
    """Of episodes, starts and imagination."""
    checkpoint: str = "last"
    """The last or the best checkpoint, or the name of one in RUN_DIR/checkpoints."""
    out: Path | None = None
    """Write the errors of every step as .csv."""
    plot: Path | None = None
    """Write a figure of them as .png; needs the extra "plots"."""
    device: str = "auto"


@dataclass(frozen=True)
class Actions:
    """Measure whether imagined actions are the policy's, at several standard deviations; the last
    line printed is JSON."""

    run_dir: tyro.conf.Positional[Path]
    sigmas: str = "1.0,0.3,0.1"
    """Standard deviations that replace the policy's own, in its units."""
    num: int = 1024
    """Trajectories imagined at each, from observations in the replay buffer."""
    action_update: Literal["score", "sample", "exact", "none"] | None = None
    """Of the sampler, instead of the run's own; trajectory diffusion only."""
    guidance_scale: float | None = None
    """Instead of the run's own; action update "score" only."""
    seed: int = 0
    checkpoint: str = "last"
    """The last checkpoint, or the name of one in RUN_DIR/checkpoints."""
    plot: Path | None = None
    """Write histograms as .png; needs the extra "plots"."""
    device: str = "auto"


@dataclass(frozen=True)
class Gradient:
    """Compare the imagined policy gradient with the simulator's, from the same observations in the
    replay buffer, and the critic on which both rest with the returns of episodes, played and
    imagined; the last line printed is JSON."""

    run_dir: tyro.conf.Positional[Path]
    num: int = 4096
    """Trajectories per gradient."""
    newest: int = 4000
    """Compare from the newest so many start observations, and from all."""
    seed: int = 0
    checkpoint: str = "last"
    """The last checkpoint, or the name of one in RUN_DIR/checkpoints, e.g. step_000006000."""
    device: str = "auto"


@dataclass(frozen=True)
class Dream:
    """Show one imagined trajectory above the real one of the same actions, with its error; where
    observations do not fix the pose, plot them."""

    run_dir: tyro.conf.Positional[Path]
    out: Path = Path("dream.mp4")
    """A video (.mp4 or .gif) or a strip of frames (.png); needs the extra "video"."""
    horizon: int | None = None
    """Steps; default the run's own. Only some world models can imagine more."""
    start: int = 0
    """Steps of the policy before the dream begins."""
    fps: float = 10.0
    """Frames per second of the video, one per step."""
    seed: int = 0
    """Of the episode, its actions and the imagination."""
    checkpoint: str = "last"
    """The last or the best checkpoint, or the name of one in RUN_DIR/checkpoints."""
    device: str = "auto"


@dataclass(frozen=True)
class Baseline:
    """Train a model-free algorithm of Stable-Baselines3, by default with its own settings;
    metrics.csv is that of a training here. Needs the extra "baselines". The last line printed is
    JSON."""

    env_id: str
    """Gymnasium environment with Box observations and actions, e.g. Hopper-v5."""
    algo: Literal["a2c", "ppo", "sac", "td3", "trpo"] = "ppo"
    run_dir: str = ""
    """Where metrics, models and the learning curve go; default runs/ENV_ID-ALGO-SEED."""
    seed: int = 0
    total_timesteps: int = 100_000
    """Environment steps."""
    eval_interval: int = 5000
    """Environment steps between two evaluations of the policy's mean."""
    eval_episodes: int = 10
    num_envs: int = 1
    """Environments that are stepped side by side."""
    normalize: bool = False
    """Train on observations and rewards over running moments; of a2c, ppo and trpo."""
    hyperparameters: tuple[str, ...] = ()
    """Of the algorithm's constructor, each NAME=VALUE with the value in JSON, as n_steps=256."""
    progress: bool = True
    """Show a progress bar."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (training met NaN), 2 (bad input)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(__version__)
        return 0
    format_before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        _find_modules_here()
        command = _parse(arguments)
        if command is not None:
            runs = {**dict(COMMANDS.values()), SeveralSeeds: _train_seeds}
            runs[type(command)](command)
    except InputError as error:
        return _fail(str(error), 2)
    except (NonFiniteError, RunsFailedError) as error:
        return _fail(str(error), 1)
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        return _fail(_with_notes(message, error), 1)
    except KeyboardInterrupt as error:
        return _fail(_with_notes("interrupted", error), 130)
    finally:
        warnings.formatwarning = format_before
    return 0


def _one_line(message: Warning | str, *where: object) -> str:
    return f"polygrad-fast: warning: {' '.join(str(message).split())}\n"


def _find_modules_here() -> None:
    """Let `--env-id module:Name-v0` find modules of the working directory, as `python -m` does; a
    console script looks in its own directory instead."""
    with contextlib.suppress(FileNotFoundError):  # the working directory is gone
        here = os.getcwd()
        if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)


def _with_notes(message: str, error: BaseException) -> str:
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _fail(message: str, code: int) -> int:
    print(f"polygrad-fast: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Any:
    """Parse with tyro, whose boxed messages become one line; return None where it printed help."""
    arguments = _join_command(arguments)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise InputError(f"command must be one of {list(COMMANDS)}, got {arguments[0]!r}{hint}")
    plan = _plan_to_resume(arguments)
    given = cli_seeds.without_flags(arguments[1:], cli_seeds.OWN_FLAGS)
    if plan is not None:
        further = cli_seeds.without_flags(arguments[1:], ("resume", "seeds"))
        arguments = ["train", *plan.arguments, *further, "--seeds", plan.seeds]
    flag = functools.partial(_flag, arguments)
    defaults = {Train: _train_defaults(arguments)}
    defaults |= cli_offline.defaults(arguments[:1], flag, _resumes(arguments))
    defaults |= cli_reproduce.defaults(arguments, flag)
    subcommands = [
        Annotated[
            options,
            tyro.conf.subcommand(
                name, **({"default": defaults[options]} if options in defaults else {})
            ),
        ]
        for name, (options, _) in COMMANDS.items()
    ]
    commands = functools.reduce(operator.or_, subcommands)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command = tyro.cli(
                tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes)(commands),
                args=arguments,
                prog="polygrad-fast",
                description="Policy-guided trajectory diffusion (PolyGRAD).",
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise InputError(_first_sentence(complaint.getvalue())) from None
    if not isinstance(command, Train):
        return command
    if command.seeds or command.jobs != 1:
        _check_seeds(command, arguments)
        begun = plan or cli_seeds.Plan(command.seeds, given)
        return SeveralSeeds(command, begun, given if plan else [], plan is not None)
    if command.resume:
        _check_same_run(command, defaults[Train])
    return command


def _plan_to_resume(arguments: list[str]) -> cli_seeds.Plan | None:
    """Return the plan of the directory whose several seeds `train --resume` is to continue."""
    run_dir = _flag(arguments, "run-dir")
    if arguments[:1] != ["train"] or not _resumes(arguments) or not run_dir:
        return None
    plan = cli_seeds.Plan.read(Path(run_dir))
    seeds = _flag(arguments, "seeds")
    if plan is not None and seeds not in (None, plan.seeds):
        raise InputError(
            f"--seeds must be {plan.seeds}, as the runs in {run_dir} began, or be left out, got "
            f"{seeds}"
        )
    return plan


def _check_seeds(command: Train, arguments: list[str]) -> None:
    if not command.seeds:
        raise InputError(f"--jobs needs --seeds, got --jobs {command.jobs} for one run")
    as_integer(command.jobs, "--jobs", 1)
    cli_seeds.parse_seeds(command.seeds)
    if _flag(arguments, "seed") is not None:
        raise InputError(f"--seed must be left out with --seeds, got {command.seed}")
    if command.resume:
        raise InputError(f"--seeds must be left out to resume the one run in {command.run_dir}")


def _join_command(arguments: list[str]) -> list[str]:
    """Return the arguments with a command of two words, as `data collect`, as one of them; `data
    --help` asks for the list of commands."""
    whole, groups = " ".join(arguments[:2]), {name.split()[0] for name in COMMANDS if " " in name}
    if whole in COMMANDS and len(arguments) > 1:
        return [whole, *arguments[2:]]
    if arguments[:1] and arguments[0] in groups and arguments[1:2] in (["-h"], ["--help"]):
        return arguments[1:]
    return arguments


def _train_defaults(arguments: list[str]) -> Train:
    """Return what `train` starts from: the preset's settings, or those of the run to resume."""
    if arguments[:1] != ["train"]:
        return Train(env_id=tyro.MISSING)
    preset = _flag(arguments, "preset")
    if _resumes(arguments):
        given = _flag(arguments, "run-dir")
        if not given:
            raise InputError("--resume needs --run-dir, the run directory to continue")
        run_dir = Path(given)
        stored = read_run_config(run_dir)
        return Train(
            env_id=stored["env_id"],
            run_dir=str(run_dir),
            preset=stored["preset"],
            seed=stored["seed"],
            config=from_dict(stored["config"], TrainConfig),
        )
    preset = preset or "default"
    config = TrainConfig.from_preset(preset)
    return Train(env_id=tyro.MISSING, preset=preset, config=config)


def _resumes(arguments: list[str]) -> bool:
    """Return whether a run is to be continued; the last of the switches counts."""
    switches = [word for word in arguments if word in ("--resume", "--no-resume")]
    return switches[-1:] == ["--resume"]


def _flag(arguments: list[str], name: str) -> str | None:
    """Return the value given last for --name (also --na_me and --name=value), or None; the last
    counts for tyro too."""
    found = None
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            found = value if equals else next(iter(arguments[i + 1 :]), None)
    return found


def _check_same_run(command: Train, stored: Train) -> None:
    """A resumed run keeps its configuration; only its length may change."""

    def options(train: Train) -> dict:
        chosen = {"env_id": train.env_id, "preset": train.preset, "seed": train.seed}
        return chosen | dataclasses.asdict(train.config)

    refuse_other_options(options(command), options(stored), Path(stored.run_dir))


def _first_sentence(boxed: str) -> str:
    """Return the message in tyro's box with its suggestion, without title, frame and help text.

    The box is drawn in ASCII where the output's encoding is not UTF-8.
    """
    parts: list[list[str]] = [[]]
    for line in boxed.strip().splitlines()[1:]:
        text = re.sub(r"[│╭╮╰╯]", "", line).strip(" ─")
        if re.search("───|^ *---+ *$", line):
            parts += [[]] if parts[-1] else []
        elif text:
            parts[-1].append(text)
    message = " ".join(parts[0]).replace("Error parsing __tyro-dummy-inner__.", "")
    for part in parts[1:]:
        options = [word for line in part for word in line.split() if word.startswith("--")]
        if part and part[0].startswith("Perhaps you meant") and options:
            message = f"{message.rstrip('.')}, did you mean {options[0]}?"
    return message or "the arguments cannot be read, see --help"


def _train(command: Train) -> None:
    run_dir = Path(
        command.run_dir
        or f"runs/{command.env_id}-{command.preset}-{command.seed}".replace(":", "-")
    )
    with end_on_interrupt():
        from polygrad_fast.ranks import joined
    with joined(command.device) as ranks, contextlib.ExitStack() as stack:
        if ranks.index > 0:  # the first process speaks for all
            stack.enter_context(contextlib.redirect_stdout(None))
        _train_together(command, run_dir, ranks)


def _train_together(command: Train, run_dir: Path, ranks: Ranks) -> None:
    """Train in one of the processes that do so together, or alone."""
    total = command.config.total_timesteps
    ranks.check_multiples(total_timesteps=total)  # before the run directory is made
    with end_on_interrupt():
        agent = _agent_to_train(command, run_dir, ranks)
    if command.resume:
        if total < agent.num_timesteps:
            raise InputError(
                f"--total-timesteps must be at least {agent.num_timesteps}, the environment step "
                f"the run is at, got {total}"
            )
        begin = f"resuming {run_dir} at environment step {agent.num_timesteps:,} of {total:,}"
    else:
        begin = f"training {agent.env_id} ({command.preset}, seed {agent.seed}) in {run_dir}"
    with agent.locked():
        if total != agent.config.total_timesteps:
            agent.extend(total)
        print(begin)
        if agent.num_timesteps < total:
            shows = command.progress and ranks.index == 0
            with stop_on_signals(agent.stop, (signal.SIGINT, signal.SIGTERM)):
                agent.learn(total - agent.num_timesteps, progress_bar=shows)
        if ranks.index == 0:
            _summarize(agent, run_dir)
    if agent.num_timesteps < total:
        again = f"polygrad-fast train --resume --run-dir {shlex.quote(str(run_dir))}"
        print(f"stopped; `{again}` continues")


def _train_seeds(several: SeveralSeeds) -> None:
    command = several.command
    run_dir = Path(command.run_dir or f"runs/{command.env_id}-{command.preset}".replace(":", "-"))
    with end_on_interrupt():
        _check_runs(command, several.resume)
    if not several.resume:
        several.plan.write(run_dir)
    cli_seeds.train_seeds(
        several.plan,
        several.given,
        run_dir,
        command.config.total_timesteps,
        command.jobs,
        command.progress,
        command.env_id,
    )


def _check_runs(command: Train, resume: bool) -> None:
    """Refuse once what every run of several seeds would refuse, before anything is written."""
    from polygrad_fast.ranks import Ranks, num_launched

    if num_launched() > 1:
        raise InputError(
            f"--seeds begins processes of its own and must be run without torchrun, got "
            f"{num_launched()} processes of that"
        )
    as_device(command.device)
    if not resume:
        first = dataclasses.replace(command, seed=cli_seeds.parse_seeds(command.seeds)[0])
        with tempfile.TemporaryDirectory() as folder:
            _agent_to_train(first, Path(folder), Ranks())


def _agent_to_train(command: Train, run_dir: Path, ranks: Ranks) -> PolyGRAD:
    from polygrad_fast.agent import PolyGRAD

    if command.resume:
        return PolyGRAD.resume(run_dir, device=command.device, tensorboard=command.tensorboard)
    config = command.config
    if config.num_envs < ranks.number:
        config = dataclasses.replace(config, num_envs=ranks.number)
    return PolyGRAD(
        command.env_id,
        command.preset,
        command.seed,
        command.device,
        config,
        run_dir,
        command.tensorboard,
    )


def _summarize(agent: PolyGRAD, run_dir: Path) -> None:
    from polygrad_fast.evaluation.plots import plot_learning_curve

    rows = read_metrics(run_dir / "metrics.csv")
    speeds = _speeds(rows)
    if speeds:
        print(f"speed (median): {', '.join(speeds)}")
    curve = run_dir / "learning_curve.png"
    try:
        plot_learning_curve(run_dir / "metrics.csv", curve, f"{agent.env_id}, seed {agent.seed}")
        where = f"learning curve in {curve}"
    except InputError as error:  # matplotlib is an extra
        where = f"no learning curve ({error})"
    print(f"{_result(rows, agent)}; run in {run_dir}, {where}")


def _speeds(rows: list[dict[str, float]]) -> list[str]:
    """Return the run's median speeds in words, those of the training where there is any."""
    trained = [row for row in rows if "time/sample_ms" in row]
    medians = {}
    for name in SPEEDS:
        values = [row[name] for row in trained or rows if name in row]
        if values:
            medians[name] = statistics.median(values)
    speeds = [f"{value:.4g} {SPEEDS[name]}" for name, value in medians.items()]
    if trained and medians.get("time/env_steps_per_s"):
        speeds.append(f"{1e6 / medians['time/env_steps_per_s'] / 3600:.1f} hours per 1 M steps")
    return speeds


def _result(rows: list[dict[str, float]], agent: PolyGRAD) -> str:
    """Return in words what the policy was worth untrained, at best and at the end."""
    taken = f"{agent.num_timesteps:,} steps"
    returns = {
        row["env_step"]: row["eval/mean_reward"] for row in rows if "eval/mean_reward" in row
    }
    first_updates = agent.config.learning_starts + agent.config.policy_delay_steps
    if not num_updates(
        agent.num_timesteps - first_updates, agent.config.policy_updates_per_env_step
    ):
        return f"no policy update yet after {taken}"
    if not returns:
        return f"no evaluation in metrics.csv after {taken}"
    best_step, last_step = agent.best_timestep(), max(returns)
    untrained, best, last = returns.get(0), returns.get(best_step), returns[last_step]
    found = [] if untrained is None else [f"{untrained:.0f} untrained"]
    if best is not None:
        found.append(
            f"{best:.0f} at best (environment step {best_step:,}, kept as best checkpoint)"
        )
    found.append(f"{last:.0f} at the last evaluation (environment step {last_step:,})")
    if untrained is None or last_step <= first_updates:
        verdict = f"{agent.env_id}: no evaluation to compare with that of the untrained policy"
    elif last > untrained:
        verdict = f"learnt {agent.env_id} in imagination"
    elif best is not None and best > untrained:
        verdict = f"{agent.env_id}: the last policy is no better than the untrained one"
    else:
        verdict = f"{agent.env_id}: no improvement over the untrained policy"
    return f"{verdict}: mean return {', '.join(found)}, {taken}"


def _evaluate(command: Evaluate) -> None:
    if command.episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {command.episodes}")
    if command.seed < 0:
        raise InputError(f"--seed must be at least 0, got {command.seed}")
    if command.video is not None:
        as_output_file(command.video, "--video")
    read_run_config(command.run_dir)
    with end_on_interrupt():
        from polygrad_fast.agent import PolyGRAD
        from polygrad_fast.evaluation.video import record_episode

        agent = PolyGRAD.load(command.run_dir, device=command.device, checkpoint=command.checkpoint)
    if command.video is not None:
        record_episode(
            agent.evaluator.environments,
            lambda observations: agent.predict(observations, deterministic=True)[0],
            command.video,
            command.seed,
        )
        print(f"video in {command.video}")
    result = agent.evaluate(command.episodes, command.seed, not command.stochastic)
    for episode, (value, length) in enumerate(
        zip(result.returns.tolist(), result.lengths.tolist(), strict=True), 1
    ):
        print(f"episode {episode}: return {value:.2f}, {length} steps")
    print(
        f"{agent.env_id}, {command.checkpoint} checkpoint (environment step "
        f"{agent.num_timesteps:,}): mean return {result.mean_reward:.2f}, "
        f"standard deviation {result.std_reward:.2f} over {command.episodes} episodes"
    )
    print(json.dumps({"mean_reward": result.mean_reward, "std_reward": result.std_reward}))


def _sample(command: Sample) -> None:
    if command.num < 1:
        raise InputError(f"--num must be at least 1, got {command.num}")
    as_output_file(command.out, "--out")
    read_run_config(command.run_dir)
    with end_on_interrupt():
        import numpy as np

        from polygrad_fast.agent import PolyGRAD

        agent = PolyGRAD.load(command.run_dir, device=command.device)
    batch = agent.imagine(command.num)
    arrays = {
        name: getattr(batch, name).cpu().numpy()
        for name in ("observations", "actions", "rewards", "terminals")
    }
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_bytes_atomic(command.out, data.getvalue())
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    print(f"{command.num} imagined trajectories in {command.out}: {shapes}")


def _baseline(command: Baseline) -> None:
    with end_on_interrupt():
        from polygrad_fast.baselines import train_baseline
    name = re.sub(r"[^\w.-]+", "-", command.env_id)
    run_dir = Path(command.run_dir or f"runs/{name}-{command.algo}-{command.seed}")
    train_baseline(
        command.algo,
        command.env_id,
        run_dir,
        command.total_timesteps,
        command.seed,
        command.eval_interval,
        command.eval_episodes,
        command.progress,
        command.num_envs,
        command.normalize,
        _hyperparameters(command.hyperparameters),
    )
    rows = [row for row in read_metrics(run_dir / "metrics.csv") if "eval/mean_reward" in row]
    names = ("best_mean_reward", "mean_reward", "std_reward")
    found = {name: rows[-1][f"eval/{name}"] for name in names}
    best, last = found["best_mean_reward"], found["mean_reward"]
    print(
        f"{command.env_id}, {command.algo}: mean return {best:.0f} at best, {last:.0f} at the last"
    )
    print(json.dumps(found))


def _hyperparameters(words: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in found:
            raise InputError(f"--hyperparameters must name each once, got {name} again in {word!r}")
        try:
            found[name] = json.loads(value, parse_constant=_refuse_constant)
        except ValueError:
            raise InputError(
                f"--hyperparameters must be NAME=VALUE with values in JSON, got {word!r}"
            ) from None
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _load(command: Errors | Actions | Gradient | Dream) -> PolyGRAD:
    """Load the agent of the run and checkpoint that a command names."""
    from polygrad_fast.agent import PolyGRAD

    which = command.checkpoint
    if which in ("last", "best"):
        return PolyGRAD.load(command.run_dir, device=command.device, checkpoint=which)
    return PolyGRAD.load(command.run_dir / "checkpoints" / which, device=command.device)


def _describe(agent: PolyGRAD, command: Errors | Actions | Gradient | Dream) -> str:
    return (
        f"{agent.env_id}, {agent.config.world_model}, {command.checkpoint} checkpoint (environment "
        f"step {agent.num_timesteps:,}), horizon {agent.config.horizon}"
    )


def _warn_of_guidance(agent: PolyGRAD, command: Errors | Dream) -> None:
    """Warn where the checkpoint lacks the guidance scale that the run had tuned."""
    config = agent.config
    guided = config.sampler.action_update == "score" and config.guidance.rule != "none"
    if config.world_model == "trajectory_diffusion" and guided and command.checkpoint == "best":
        warnings.warn(
            f"the best checkpoint does not hold the guidance scale of the run: imagining with the "
            f"initial one, {config.guidance.initial:g}; the last checkpoint has its own",
            stacklevel=2,
        )


def _check_plot(path: Path | None) -> None:
    """Check, before any work, that a figure can be drawn and written."""
    if path is None:
        return
    as_output_file(path, "--plot")
    if path.suffix != ".png":
        raise InputError(f"--plot must be a .png file, got {path}")
    from polygrad_fast.evaluation.plots import check_plots

    check_plots()


def _errors(command: Errors) -> None:
    horizons = None
    if command.horizons is not None:
        horizons = as_number_list(command.horizons, "--horizons", int)
    as_integer(command.num, "--num", 1)
    as_integer(command.seed, "--seed", 0, below=2**32)
    if command.out is not None:
        as_output_file(command.out, "--out")
    _check_plot(command.plot)
    read_run_config(command.run_dir)
    with end_on_interrupt():
        from polygrad_fast.diagnostics.dynamics import dynamics_report, dynamics_table
        from polygrad_fast.evaluation.plots import plot_dynamics_errors
        from polygrad_fast.threads import available_cpus, cpu_threads

        agent = _load(command)
    _warn_of_guidance(agent, command)
    threads = agent.config.cpu_threads
    with cpu_threads(threads, agent.device):
        report = dynamics_report(
            agent.make_evaluation_environment(),
            agent.world_model,
            agent.policy,
            agent.normalizer,
            agent.action_scaler,
            horizons or [agent.config.horizon],
            command.num,
            command.seed,
            agent.config.imagined_batch_size,
            threads or available_cpus(),
            progress=sys.stderr.isatty(),
        )
    rows = report.rows()
    if command.out is not None:
        write_bytes_atomic(command.out, _as_csv(rows))
        print(f"errors of every step in {command.out}")
    if command.plot is not None:
        title = f"{agent.env_id}, {agent.config.world_model}, seed {agent.seed}"
        plot_dynamics_errors(rows, command.plot, title)
        print(f"figure in {command.plot}")
    simulator = "mujoco.rollout" if report.is_native else "gymnasium's loop"
    print(
        f"{_describe(agent, command)}, {command.num:,} trajectories from {report.num_episodes} "
        f"fresh episodes, simulated by {simulator}"
    )
    print(dynamics_table(report))
    print(json.dumps(report.summary()))


def _as_csv(rows: list[dict[str, float | None]]) -> bytes:
    """Return rows as CSV with a header; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _actions(command: Actions) -> None:
    sigmas = as_number_list(command.sigmas, "--sigmas", float)
    for sigma in sigmas:
        if not 0 < sigma < float("inf"):
            raise InputError(f"--sigmas must be positive finite numbers, got {sigma}")
    as_integer(command.num, "--num", 4)
    as_integer(command.seed, "--seed", 0, below=2**32)
    _check_plot(command.plot)
    read_run_config(command.run_dir)
    with end_on_interrupt():
        import torch

        from polygrad_fast.diagnostics.actions import action_report, action_table
        from polygrad_fast.evaluation.plots import plot_standardized_actions
        from polygrad_fast.threads import cpu_threads

        agent = _load(command)
    config = agent.config
    scale = _change_sampler(agent, command)
    generator = torch.Generator(agent.device).manual_seed(command.seed)
    if agent.replay.num_windows == 0:
        raise InputError(
            "the actions need start observations in the replay buffer, got none; the best "
            "checkpoint has no replay buffer, the last one has"
        )
    starts = agent.replay.sample_initial_observations(
        command.num, generator, config.newest_start_states, config.share_of_newest
    )
    # the same noise at each sigma, and not the numbers that drew the starts
    noise_seed = int(torch.randint(2**62, (), generator=generator, device=agent.device))
    with cpu_threads(config.cpu_threads, agent.device):
        reports = [
            action_report(
                agent.world_model,
                agent.policy,
                agent.normalizer,
                starts,
                sigma,
                noise_seed,
                config.imagined_batch_size,
                progress=sys.stderr.isatty(),
            )
            for sigma in sigmas
        ]
    if command.plot is not None:
        samples = [
            (f"sigma {report.sigma:g}: std {report.statistics.std:.3f}", report.values)
            for report in reports
        ]
        title = f"{agent.env_id}, {config.world_model}, seed {agent.seed}"
        plot_standardized_actions(samples, command.plot, title)
        print(f"figure in {command.plot}")
    print(f"{_describe(agent, command)}, {command.num:,} trajectories at each sigma")
    if scale:
        print(f"the sampler's {scale}")
    print(action_table(reports))
    print(json.dumps([report.summary() for report in reports]))


def _change_sampler(agent: PolyGRAD, command: Actions) -> str:
    """Let the agent imagine with the action update and guidance scale asked for; return in words
    what it imagines with, where it has a sampler.

    Raises:
        InputError: the world model has no sampler, or its actions follow no guidance scale.
    """
    from polygrad_fast.world_models import TrajectoryDiffusion

    model = agent.world_model
    asked = {"--action-update": command.action_update, "--guidance-scale": command.guidance_scale}
    if not isinstance(model, TrajectoryDiffusion):
        for flag, value in asked.items():
            if value is not None:
                raise InputError(
                    f"{flag} must be left out for a run whose world model is "
                    f"{agent.config.world_model!r}, which has no sampler, got {value!r}"
                )
        return ""
    if command.action_update is not None:
        model.use_action_update(command.action_update)
    update = model.config.sampler.action_update
    if command.guidance_scale is not None:
        if update != "score":
            raise InputError(
                f"--guidance-scale must be left out with action update {update!r}, got "
                f"{command.guidance_scale:g}"
            )
        if not 0 <= command.guidance_scale < float("inf"):
            raise InputError(
                f"--guidance-scale must be a finite number of at least 0, got "
                f"{command.guidance_scale}"
            )
        model.guidance.value = command.guidance_scale
    scale = f", guidance scale {model.guidance.value:.4g}" if update == "score" else ""
    return f"action update is {update!r}{scale}"


def _gradient(command: Gradient) -> None:
    as_integer(command.num, "--num", 8)
    as_integer(command.newest, "--newest", 1)
    as_integer(command.seed, "--seed", 0, below=2**32)
    read_run_config(command.run_dir)
    with end_on_interrupt():
        from polygrad_fast.diagnostics.gradient import policy_gradient_report
        from polygrad_fast.diagnostics.table import table
        from polygrad_fast.threads import cpu_threads

        agent = _load(command)
    with cpu_threads(agent.config.cpu_threads, agent.device):
        report = policy_gradient_report(
            agent.make_evaluation_environment(),
            agent.world_model,
            agent.training.learner,
            agent.replay,
            agent.action_scaler,
            command.num,
            command.newest,
            command.seed,
            agent.config.imagined_batch_size,
        )
    print(f"{_describe(agent, command)}, {command.num:,} trajectories per gradient")
    print(table(report))
    print(json.dumps(report.summary()))


def _dream(command: Dream) -> None:
    from polygrad_fast.evaluation.video import VIDEOS, check_video

    if command.horizon is not None:
        as_integer(command.horizon, "--horizon", 2)
    as_integer(command.start, "--start", 0)
    as_integer(command.seed, "--seed", 0, below=2**32)
    if not 0 < command.fps <= 1000:
        raise InputError(f"--fps must be in (0, 1000], got {command.fps}")
    as_output_file(command.out, "--out")
    if command.out.suffix not in (*VIDEOS, ".png"):
        raise InputError(f"--out must be a .mp4, .gif or .png file, got {command.out}")
    check_video("dream")
    read_run_config(command.run_dir)
    with end_on_interrupt():
        from polygrad_fast.diagnostics.dream import dream, pose_simulator
        from polygrad_fast.evaluation.plots import check_plots, plot_observations
        from polygrad_fast.evaluation.video import prepare_rendering, write_strip, write_video
        from polygrad_fast.threads import cpu_threads
        from polygrad_fast.world_models import check_horizon

        agent = _load(command)
    _warn_of_guidance(agent, command)
    horizon = check_horizon(agent.world_model, command.horizon or agent.config.horizon)
    parts = agent.policy, agent.normalizer, agent.action_scaler
    with cpu_threads(agent.config.cpu_threads, agent.device):
        environment = agent.make_evaluation_environment()
        simulator = pose_simulator(environment, *parts, command.seed)
        if simulator is None:
            if command.out.suffix != ".png":
                raise InputError(
                    f"--out must be a .png file for {agent.env_id}, whose observations do not fix "
                    f"the pose and are plotted instead, got {command.out}"
                )
            check_plots()
        else:
            environment = agent.make_evaluation_environment(render_mode="rgb_array")
            simulator = pose_simulator(environment, *parts, command.seed)
            prepare_rendering(environment)
        found = dream(
            environment,
            simulator,
            agent.world_model,
            *parts,
            horizon,
            command.start,
            command.seed,
        )
    title = f"{agent.env_id}, {agent.config.world_model}, seed {agent.seed}"
    ends = found.imagined_length, found.real_length
    if simulator is None:
        plot_observations(found.imagined, found.real, ends, command.out, title)
        what = "observations plotted"
    else:
        frames = _dream_frames(found)
        if command.out.suffix == ".png":
            write_strip(frames, command.out)
        else:
            write_video(frames, command.out, command.fps)
        what = f"{len(frames)} frames"
    print(f"{_describe(agent, command)}: {what} in {command.out}")
    last = min(ends)
    print(
        f"error after {last - 1} steps: {found.errors[last - 1]:.3g} (squared, normalized "
        f"observations); {_end_in_words('imagined', ends[0], len(found.errors))}, "
        f"{_end_in_words('simulated', ends[1], len(found.errors))}"
    )


def _end_in_words(name: str, length: int, horizon: int) -> str:
    return f"{name} goes on" if length == horizon else f"{name} ends at step {length - 1}"


def _dream_frames(found: DreamFound) -> list[np.ndarray]:
    """Return frames with captions."""
    from polygrad_fast.evaluation.video import captioned

    frames = []
    for t, (imagined, real) in enumerate(found.frames):
        error = "" if math.isnan(found.errors[t]) else f", error {found.errors[t]:.2g}"
        ended = [" (ended)" if t >= n else "" for n in (found.imagined_length, found.real_length)]
        frames.append(
            captioned(
                [
                    (f"imagined, step {t}{error}{ended[0]}", imagined),
                    (f"simulated, same actions{ended[1]}", real),
                ]
            )
        )
    return frames


COMMANDS = {
    "train": (Train, _train),
    "evaluate": (Evaluate, _evaluate),
    "sample": (Sample, _sample),
    "errors": (Errors, _errors),
    "actions": (Actions, _actions),
    "gradient": (Gradient, _gradient),
    "dream": (Dream, _dream),
    "baseline": (Baseline, _baseline),
    **cli_data.COMMANDS,
    **cli_offline.COMMANDS,
    **cli_reproduce.COMMANDS,
}
"""Name -> its options, and what runs it."""


if __name__ == "__main__":  # as torchrun begins it: -m polygrad_fast.cli
    sys.exit(main())
