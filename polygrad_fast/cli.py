"""Command line: train, evaluate, sample, bench."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from polygrad_fast._version import __version__
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.benchmarking.figures import draw_all, stale_plots
from polygrad_fast.benchmarking.report import all_tables, update_readme
from polygrad_fast.benchmarking.rows import read_folder
from polygrad_fast.config import TrainConfig, from_dict
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.evaluation.plots import plot_learning_curve
from polygrad_fast.evaluation.video import record_episode
from polygrad_fast.training.run_directory import read_run_config
from polygrad_fast.training.run_log import read_metrics, write_bytes_atomic

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
    preset: Literal["default", "quick", "paper"] = "default"
    """Released code's settings, CPU-sized, or the paper's text."""
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    """Continue the run in --run-dir from its last checkpoint."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run directory."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


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
class Bench:
    """Report stored benchmark rows, which `pytest benchmarks/ --benchmark-only --rows FILE` makes:
    print their tables, or write them into a README, and draw plots."""

    action: tyro.conf.Positional[Literal["report"]]
    """What to do with the rows."""
    results: Path = Path("benchmarks/results")
    """Folder of the rows (*.jsonl)."""
    readme: Path | None = None
    """Write the tables between the markers of this file, e.g. README.md."""
    check: bool = False
    """Write nothing; exit with 2 if a table in --readme or a plot in --plots differs from the
    rows."""
    plots: Path | None = None
    """Draw the plots into this folder; needs the extra "plots"."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (training met NaN), 2 (bad input)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(__version__)
        return 0
    try:
        _find_modules_here()
        command = _parse(arguments)
        run = {Train: _train, Evaluate: _evaluate, Sample: _sample, Bench: _bench}
        run[type(command)](command)
    except InputError as error:
        return _fail(str(error), 2)
    except NonFiniteError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    return 0


def _find_modules_here() -> None:
    """Let `--env-id module:Name-v0` find modules of the working directory, as `python -m` does; a
    console script looks in its own directory instead."""
    with contextlib.suppress(FileNotFoundError):  # the working directory is gone
        here = os.getcwd()
        if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)


def _fail(message: str, code: int) -> int:
    print(f"polygrad-fast: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> Train | Evaluate | Sample | Bench:
    """Parse with tyro; its boxed messages become one line."""
    defaults = _train_defaults(arguments)
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
    )
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
            raise
        raise InputError(_first_sentence(complaint.getvalue())) from None
    if isinstance(command, Train) and command.resume:
        _check_same_run(command, defaults)
    return command


def _train_defaults(arguments: list[str]) -> Train:
    """Return what `train` starts from: the preset's settings, or those of the run to resume."""
    if arguments[:1] != ["train"]:
        return Train(env_id=tyro.MISSING)
    env_id, preset = _flag(arguments, "env-id"), _flag(arguments, "preset")
    if "--resume" in arguments:
        given = _flag(arguments, "run-dir")
        if given is None:
            raise InputError("--resume needs --run-dir, the run directory to continue")
        run_dir = Path(given)
        stored = read_run_config(run_dir)
        return Train(
            env_id=stored["env_id"],
            run_dir=str(run_dir),
            preset=stored["preset"],
            seed=stored["seed"],
            config=from_dict(stored["config"]),
        )
    preset = preset or "default"
    config = TrainConfig.from_preset(preset, env_id or "")
    return Train(env_id=tyro.MISSING, preset=preset, config=config)


def _flag(arguments: list[str], name: str) -> str | None:
    """Return the value given for --name (also --na_me and --name=value), or None."""
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            return value or (arguments[i + 1] if i + 1 < len(arguments) else None)
    return None


def _check_same_run(command: Train, stored: Train) -> None:
    """A resumed run keeps its configuration; only its length may change."""
    given, kept = _flatten(dataclasses.asdict(command)), _flatten(dataclasses.asdict(stored))
    for name, value in given.items():
        same_run = name in ("run_dir", "device", "resume", "progress", "tensorboard")
        if same_run or name == "config.total_timesteps" or value == kept[name]:
            continue
        flag = name.removeprefix("config.").replace("_", "-")
        raise CheckpointError(
            f"--{flag} {value} given, but the run in {stored.run_dir} has {kept[name]}: "
            "resume it without that option or start another run"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _first_sentence(boxed: str) -> str:
    """Return the message in tyro's box, without its frame and the help text below."""
    lines = []
    for line in boxed.splitlines():
        text = re.sub(r"[│╭╮╰╯]", "", line).strip(" ─")
        if "───" in line and lines:
            break
        if text and not line.startswith("╭"):
            lines.append(text)
    message = " ".join(lines).replace("Error parsing __tyro-dummy-inner__.", "")
    return message or "the arguments cannot be read, see --help"


def _train(command: Train) -> None:
    total = command.config.total_timesteps
    run_dir = Path(
        command.run_dir
        or f"runs/{command.env_id}-{command.preset}-{command.seed}".replace(":", "-")
    )
    if command.resume:
        agent = PolyGRAD.resume(run_dir, device=command.device, tensorboard=command.tensorboard)
        if total < agent.num_timesteps:
            raise InputError(
                f"--total-timesteps {total} given, but the run is at environment step "
                f"{agent.num_timesteps} already"
            )
        agent.extend(total)
        print(f"resuming {run_dir} at environment step {agent.num_timesteps:,} of {total:,}")
    else:
        agent = PolyGRAD(
            command.env_id,
            command.preset,
            command.seed,
            command.device,
            command.config,
            run_dir,
            command.tensorboard,
        )
        print(f"training {agent.env_id} ({command.preset}, seed {agent.seed}) in {run_dir}")
    if agent.num_timesteps < total:
        with _stopped_by_signals(agent):
            agent.learn(total - agent.num_timesteps, progress_bar=command.progress)
    _summarize(agent, run_dir)
    if agent.num_timesteps < total:
        print(f"stopped; `polygrad-fast train --resume --run-dir {run_dir}` continues")


@contextlib.contextmanager
def _stopped_by_signals(agent: PolyGRAD):
    """End the training after the current step, with a checkpoint, on Ctrl-C or SIGTERM; a second
    Ctrl-C stops at once."""

    def stop(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        agent.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summarize(agent: PolyGRAD, run_dir: Path) -> None:
    all_rows = read_metrics(run_dir / "metrics.csv")
    trained = [row for row in all_rows if "a2c/actor_loss" in row] or all_rows[1:]
    medians = {
        name: np.median([row[name] for row in trained if name in row])
        for name in SPEEDS
        if any(name in row for row in trained)
    }
    speeds = [f"{medians[name]:.4g} {SPEEDS[name]}" for name in medians]
    if "time/env_steps_per_s" in medians:
        speeds.append(f"{1e6 / medians['time/env_steps_per_s'] / 3600:.1f} hours per 1 M steps")
    print(f"speed (median): {', '.join(speeds)}")
    rows = [row for row in all_rows if "eval/mean_reward" in row]
    curve = run_dir / "learning_curve.png"
    try:
        plot_learning_curve(run_dir / "metrics.csv", curve, f"{agent.env_id}, seed {agent.seed}")
        where = f"learning curve in {curve}"
    except InputError as error:  # matplotlib is an extra
        where = f"no learning curve ({error})"
    untrained, last = rows[0]["eval/mean_reward"], rows[-1]["eval/mean_reward"]
    best = max(rows, key=lambda row: row["eval/mean_reward"])
    if not any("a2c/actor_loss" in row for row in all_rows):
        learnt = f"no policy update yet after {agent.num_timesteps:,} steps"
    else:
        learnt = (
            f"learnt {agent.env_id} in imagination: mean return {untrained:.0f} untrained, "
            f"{best['eval/mean_reward']:.0f} at best (environment step {best['env_step']:,}), "
            f"{last:.0f} at the end ({agent.num_timesteps:,} steps)"
        )
    print(f"{learnt}; run in {run_dir}, {where}")


def _evaluate(command: Evaluate) -> None:
    if command.episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {command.episodes}")
    if command.video is not None:
        _check_writable(command.video)
    read_run_config(command.run_dir)
    agent = PolyGRAD.load(command.run_dir, device=command.device, checkpoint=command.checkpoint)
    if command.video is not None:
        record_episode(agent, command.video, command.seed)
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
    _check_writable(command.out)
    read_run_config(command.run_dir)
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


def _bench(command: Bench) -> None:
    if command.check and command.readme is None and command.plots is None:
        raise InputError(
            "--check needs --readme or --plots, the file or the folder that is to be checked"
        )
    rows = read_folder(command.results)
    if command.readme is None and command.plots is None:
        print(all_tables(rows))
    if command.readme is not None:
        stale = update_readme(command.readme, rows, command.check)
        if stale and command.check:
            raise InputError(
                f"{command.readme}: {', '.join(stale)} differ from the rows in {command.results}; "
                f"`polygrad-fast bench report --readme {command.readme}` writes them anew"
            )
        done = "checked" if command.check else f"{len(stale)} tables changed"
        print(f"{command.readme}: {done}, {len(rows)} rows in {command.results}")
    if command.plots is not None and command.check:
        stale = stale_plots(rows, command.plots)
        if stale:
            raise InputError(
                f"{command.plots}: {', '.join(stale)} missing or not of the rows in "
                f"{command.results}; `polygrad-fast bench report --plots {command.plots}` draws "
                "them anew"
            )
        print(f"{command.plots}: checked")
    elif command.plots is not None:
        for path in draw_all(rows, command.plots):
            print(path)


def _check_writable(path: Path) -> None:
    """Raise before any work is lost on a file that cannot be written."""
    if path.is_dir():
        raise InputError(f"{path} is a directory, wanted a file name")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} does not exist, wanted an existing directory")


if __name__ == "__main__":
    sys.exit(main())
