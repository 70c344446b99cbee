"""Command line: train, evaluate, sample, gradient, data collect.

What takes long to import (torch, gymnasium) is imported by the command that needs it, so that help
is quick and an interrupt is answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import shlex
import signal
import statistics
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polygrad_fast._version import __version__
from polygrad_fast.arguments import as_integer, as_output_file
from polygrad_fast.config import TrainConfig, from_dict
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.runs.directory import difference, read_run_config
from polygrad_fast.runs.files import write_bytes_atomic
from polygrad_fast.runs.interrupts import end_on_interrupt, stop_on_signals
from polygrad_fast.runs.metrics import read_metrics
from polygrad_fast.training.estimate import num_updates

if TYPE_CHECKING:
    import gymnasium

    from polygrad_fast.agent import PolyGRAD
    from polygrad_fast.data.collect import Act

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
class Gradient:
    """Compare the imagined policy gradient with the simulator's, from the same observations in the
    replay buffer; the last line printed is JSON."""

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
class Collect:
    """Play episodes and write them as a Minari dataset, or as .npz."""

    env_id: str
    """Gymnasium environment with Box observations and actions, e.g. Hopper-v5."""
    out: Path
    """A folder that is not there yet, for a Minari dataset, or a file .npz."""
    policy: str = "random"
    """"random", the run directory of a trained agent, or a model of Stable-Baselines3 (.zip), whose
    loading runs code that it holds."""
    episodes: int = 10
    seed: int = 0
    """Seed of the episodes, the policy's draws and the noise."""
    checkpoint: Literal["best", "last"] = "best"
    """Of a run directory: the best-evaluated policy, or the last one."""
    deterministic: bool = False
    """Take the policy's mean instead of drawing from it."""
    noise_std: tuple[float, ...] = ()
    """Gaussian noise added to the actions, in units of half their range; several: for the episodes
    in turn, as 0 0.2 0.5."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class Baseline:
    """Train a model-free algorithm of Stable-Baselines3 with its default settings; metrics.csv is
    that of a training here. Needs the extra "baselines". The last line printed is JSON."""

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
    progress: bool = True
    """Show a progress bar."""


COMMANDS = ("train", "evaluate", "sample", "gradient", "baseline", "data collect")


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
            run = {
                Train: _train,
                Evaluate: _evaluate,
                Sample: _sample,
                Gradient: _gradient,
                Baseline: _baseline,
                Collect: _collect,
            }
            run[type(command)](command)
    except InputError as error:
        return _fail(str(error), 2)
    except NonFiniteError as error:
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


def _parse(
    arguments: list[str],
) -> Train | Evaluate | Sample | Gradient | Baseline | Collect | None:
    """Parse with tyro, whose boxed messages become one line; return None where it printed help."""
    arguments = _join_command(arguments)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise InputError(f"command must be one of {list(COMMANDS)}, got {arguments[0]!r}{hint}")
    defaults = _train_defaults(arguments)
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Gradient, tyro.conf.subcommand("gradient")]
        | Annotated[Baseline, tyro.conf.subcommand("baseline")]
        | Annotated[Collect, tyro.conf.subcommand("data collect")]
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
            return None
        raise InputError(_first_sentence(complaint.getvalue())) from None
    if isinstance(command, Train) and command.resume:
        _check_same_run(command, defaults)
    return command


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
    env_id, preset = _flag(arguments, "env-id"), _flag(arguments, "preset")
    switches = [word for word in arguments if word in ("--resume", "--no-resume")]
    if switches[-1:] == ["--resume"]:
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
    config = TrainConfig.from_preset(preset, env_id or "")
    return Train(env_id=tyro.MISSING, preset=preset, config=config)


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

    differs = difference(options(command), options(stored))
    if differs is not None:
        name, got, wanted = differs
        raise CheckpointError(
            f"{name} must be {wanted}, as the run began, got {got}: resume {stored.run_dir} "
            f"without --{name.replace('_', '-')}, or start another run"
        )


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
    total = command.config.total_timesteps
    run_dir = Path(
        command.run_dir
        or f"runs/{command.env_id}-{command.preset}-{command.seed}".replace(":", "-")
    )
    with end_on_interrupt():
        agent = _agent_to_train(command, run_dir)
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
            with stop_on_signals(agent.stop, (signal.SIGINT, signal.SIGTERM)):
                agent.learn(total - agent.num_timesteps, progress_bar=command.progress)
        _summarize(agent, run_dir)
    if agent.num_timesteps < total:
        again = f"polygrad-fast train --resume --run-dir {shlex.quote(str(run_dir))}"
        print(f"stopped; `{again}` continues")


def _agent_to_train(command: Train, run_dir: Path) -> PolyGRAD:
    from polygrad_fast.agent import PolyGRAD

    if command.resume:
        return PolyGRAD.resume(run_dir, device=command.device, tensorboard=command.tensorboard)
    return PolyGRAD(
        command.env_id,
        command.preset,
        command.seed,
        command.device,
        command.config,
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
    )
    rows = [row for row in read_metrics(run_dir / "metrics.csv") if "eval/mean_reward" in row]
    names = ("best_mean_reward", "mean_reward", "std_reward")
    found = {name: rows[-1][f"eval/{name}"] for name in names}
    best, last = found["best_mean_reward"], found["mean_reward"]
    print(
        f"{command.env_id}, {command.algo}: mean return {best:.0f} at best, {last:.0f} at the last"
    )
    print(json.dumps(found))


def _gradient(command: Gradient) -> None:
    as_integer(command.num, "--num", 8)
    as_integer(command.newest, "--newest", 1)
    as_integer(command.seed, "--seed", 0, below=2**32)
    read_run_config(command.run_dir)
    with end_on_interrupt():
        from polygrad_fast.agent import PolyGRAD
        from polygrad_fast.diagnostics.gradient import policy_gradient_report
        from polygrad_fast.diagnostics.table import table

        last = command.checkpoint == "last"
        path = command.run_dir if last else command.run_dir / "checkpoints" / command.checkpoint
        agent = PolyGRAD.load(path, device=command.device)
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
    print(
        f"{agent.env_id}, {agent.config.world_model}, {command.checkpoint} checkpoint (environment "
        f"step {agent.num_timesteps:,}), horizon {agent.config.horizon}, {command.num:,} "
        f"trajectories per gradient"
    )
    print(table(report))
    print(json.dumps(report.summary()))


def _collect(command: Collect) -> None:
    as_integer(command.episodes, "--episodes", 1)
    as_integer(command.seed, "--seed", 0, below=2**32)
    with end_on_interrupt():
        from tqdm import tqdm

        from polygrad_fast.data.collect import check_noise, collect_episodes
        from polygrad_fast.data.environment import make_environment
        from polygrad_fast.data.write import check_output, write_dataset

        check_output(command.out)
        env = make_environment(command.env_id)
        act, recipe = _behaviour(command, env)
        check_noise(env, command.noise_std)
    with tqdm(total=command.episodes, unit="episode", disable=not command.progress) as bar:

        def show(episode_return: float, length: int) -> None:
            bar.set_postfix_str(f"return {episode_return:.1f}, {length} steps", refresh=False)
            bar.update()

        dataset = collect_episodes(
            env, act, command.episodes, command.seed, command.noise_std, recipe, show
        )
    write_dataset(dataset, command.out, env)
    made = dataset.recipe
    print(
        f"{made['steps']:,} steps of {command.episodes:,} episodes in {command.out}: mean return "
        f"{made['mean_return']:.2f}, standard deviation {made['std_return']:.2f}"
    )
    summary = ("episodes", "steps", "mean_return", "std_return")
    print(json.dumps({name: made[name] for name in summary}))


def _behaviour(command: Collect, env: gymnasium.Env) -> tuple[Act, dict[str, Any]]:
    """Return the policy to collect with, and what the dataset's recipe says of it."""
    from polygrad_fast.data.collect import random_actions
    from polygrad_fast.data.environment import check_spaces

    dims = check_spaces(env)
    if command.policy == "random":
        if command.deterministic:
            raise InputError("--deterministic needs a policy with a mean, got --policy random")
        return random_actions(env, command.seed), {"policy": "random"}
    path = Path(command.policy)
    recipe = {"policy": command.policy, "deterministic": command.deterministic}
    if path.is_file():
        from polygrad_fast.data.sb3 import load_stable_baselines3

        act = load_stable_baselines3(path, dims, command.deterministic, command.seed)
        return act, recipe
    if not path.is_dir():
        raise InputError(
            f"--policy must be 'random', a run directory or a file, got {command.policy!r}, which "
            f"is not there"
        )
    stored = read_run_config(path)
    import torch

    from polygrad_fast.agent import PolyGRAD

    agent = PolyGRAD.load(path, device="cpu", checkpoint=command.checkpoint)
    found = agent.replay.observation_dim, agent.replay.action_dim
    if found != dims:
        raise InputError(
            f"--policy must be of an environment with (observation, action) dimensions {dims} as "
            f"{command.env_id}, got {found} of {agent.env_id}"
        )
    recipe |= {
        "checkpoint": command.checkpoint,
        "env_step": agent.num_timesteps,
        "trained_in": agent.env_id,
        "preset": stored["preset"],
        "training_seed": stored["seed"],
    }
    generator = None if command.deterministic else torch.Generator().manual_seed(command.seed)
    actor = agent.training.actor
    return lambda observation: actor.predict(observation, generator), recipe
