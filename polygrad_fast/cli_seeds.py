"""`train --seeds`: independent runs of one command side by side, in processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polygrad_fast.errors import CheckpointError, InputError, RunsFailedError
from polygrad_fast.runs.directory import refuse_another_run
from polygrad_fast.runs.files import write_json_atomic
from polygrad_fast.runs.interrupts import stop_on_signals
from polygrad_fast.runs.metrics import read_metrics

PLAN = "seeds.json"
CURVES = "learning_curves.png"
SECONDS_BETWEEN_LOOKS = 0.5
OWN_FLAGS = ("seeds", "jobs", "seed", "run-dir", "resume", "progress")
"""Flags of `train` that the runs do not get as they are given."""
SWITCHES = ("resume", "progress")


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of a list such as "0-4" or "0,3,7-9".

    Raises:
        InputError: anything else, a range that goes down, a seed twice, or one of 2^32 and more.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"--seeds must be a list such as 0-4 or 0,3,7, got {text!r}")
        begin, end = int(first), int(last if dash else first)
        if end < begin:
            raise InputError(f"--seeds must go up, as {end}-{begin}, got {part.strip()!r}")
        if end >= 2**32:
            raise InputError(f"--seeds must be below 2^32, got {end}")
        seeds += range(begin, end + 1)
    twice = [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    if twice:
        raise InputError(f"--seeds must hold each seed once, got {twice[0]} twice in {text!r}")
    return seeds


def without_flags(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a command's arguments without some flags and their values."""
    kept, words = [], iter(arguments)
    for word in words:
        flag, equals, _ = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-")
        is_switch = name.removeprefix("no-") in SWITCHES
        if not flag.startswith("--") or (name.removeprefix("no-") if is_switch else name) not in (
            names
        ):
            kept.append(word)
        elif not is_switch and not equals:
            next(words, None)
    return kept


@dataclass(frozen=True)
class Plan:
    """What is to be run in a directory, as its seeds.json keeps it.

    Attributes:
        seeds: as given, "0-4".
        arguments: of the command that began them, without `OWN_FLAGS`.
    """

    seeds: str
    arguments: list[str]

    @classmethod
    def read(cls, run_dir: Path) -> Plan | None:
        """Return a directory's plan, None where it holds none.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = run_dir / PLAN
        try:
            stored = json.loads(path.read_text())
            return cls(stored["seeds"], stored["arguments"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def write(self, run_dir: Path) -> None:
        """Begin a directory with this plan.

        Raises:
            InputError: it holds a plan or a run already, or cannot be written.
        """
        refuse_another_run(run_dir)
        if (run_dir / PLAN).exists():
            raise InputError(f"{run_dir} already holds runs; resume them or give another --run-dir")
        try:
            write_json_atomic(run_dir / PLAN, vars(self))
        except OSError as error:
            raise InputError(f"run directory {run_dir} cannot be written: {error}") from error


def run_of(run_dir: Path, seed: int) -> Path:
    """Return the run directory of one seed."""
    return run_dir / f"seed_{seed}"


def train_seeds(
    plan: Plan,
    given: Sequence[str],
    run_dir: Path,
    total: int,
    jobs: int,
    progress: bool,
    name: str,
) -> None:
    """Begin or continue the run of every seed, then plot them together.

    Each run is a process with one thread for PyTorch (OMP_NUM_THREADS, unless `--cpu-threads` says
    otherwise), in RUN_DIR/seed_N, what it prints in RUN_DIR/seed_N.log. Ctrl-C and SIGTERM stop all
    after their current update, a second Ctrl-C at once.

    Args:
        plan: what began them.
        given: further arguments of this command, as --total-timesteps.
        run_dir: of all.
        total: environment steps of each.
        jobs: runs at a time.
        progress: show one bar for all.
        name: of the environment, for the figure.

    Raises:
        RunsFailedError: some runs failed, the others have finished; names them.
    """
    seeds = parse_seeds(plan.seeds)
    waiting = {seed: _arguments(plan, given, run_of(run_dir, seed), seed) for seed in seeds}
    done = [seed for seed in seeds if _is_finished(run_of(run_dir, seed), total)]
    for seed in done:
        del waiting[seed]
    begun = f"{len(done)} have finished, " if done else ""
    print(f"{len(seeds)} runs in {run_dir}, {begun}{min(jobs, len(waiting))} at a time")
    pool = _Pool(waiting, run_dir, jobs)
    try:
        with stop_on_signals(pool.stop, (signal.SIGINT, signal.SIGTERM)):
            _watch(pool, seeds, run_dir, total, progress)
    finally:
        pool.kill()
    _summarize(seeds, run_dir, name)
    if pool.failed:
        words = "; ".join(f"seed {seed} {reason}" for seed, reason in pool.failed.items())
        raise RunsFailedError(f"{len(pool.failed)} of {len(seeds)} runs failed: {words}")
    if pool.stopped and not all(_is_finished(run_of(run_dir, seed), total) for seed in seeds):
        again = f"polygrad-fast train --resume --run-dir {shlex.quote(str(run_dir))}"
        print(f"stopped; `{again}` continues")


def _arguments(plan: Plan, given: Sequence[str], run_dir: Path, seed: int) -> list[str]:
    """Return the arguments that begin or continue the run of one seed."""
    if (run_dir / "config.json").exists():
        words = [*given, "--resume"]
    else:
        words = [*plan.arguments, *given, "--seed", str(seed)]
    return ["train", *words, "--run-dir", str(run_dir), "--no-progress"]


def _is_finished(run_dir: Path, total: int) -> bool:
    from polygrad_fast.runs.checkpoint import read_metadata
    from polygrad_fast.runs.checkpoint_manager import CheckpointManager

    latest = CheckpointManager(run_dir).latest()
    return latest is not None and read_metadata(latest)["num_timesteps"] >= total


class _Pool:
    """Runs in processes, so many at a time.

    Attributes:
        failed: seed -> what happened, of those that ended with an error.
        stopped: `stop` was called.
    """

    def __init__(self, waiting: dict[int, list[str]], run_dir: Path, jobs: int):
        self._waiting, self._run_dir, self._jobs = dict(waiting), run_dir, jobs
        self.running: dict[int, subprocess.Popen] = {}
        self.failed: dict[int, str] = {}
        self.stopped = False

    def stop(self) -> None:
        """Let all end after their current update; begin no other."""
        self.stopped = True
        for process in self.running.values():
            process.terminate()

    def kill(self) -> None:
        """End at once what still runs; checkpoints survive that."""
        for process in self.running.values():
            process.kill()
            process.wait()

    def step(self, tell: Callable[[str], Any]) -> bool:
        """Note what has ended, begin what can begin; return whether anything runs.

        Args:
            tell: hears of every run that ended.
        """
        for seed, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[seed]
            last = self._last_line(seed)
            if code == 0 or self.stopped:
                tell(f"seed {seed}: {last}")
            else:
                self.failed[seed] = f"with exit code {code} ({last or 'no word'})"
                tell(f"seed {seed} failed, exit code {code}: {last}")
        while self._waiting and len(self.running) < self._jobs and not self.stopped:
            seed = next(iter(self._waiting))
            self._begin(seed, self._waiting.pop(seed))
        return bool(self.running)

    def _begin(self, seed: int, arguments: list[str]) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        with open(self._log(seed), "ab") as log:
            self.running[seed] = subprocess.Popen(
                [sys.executable, "-m", "polygrad_fast", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # Ctrl-C is this process's, which passes it on
            )

    def _log(self, seed: int) -> Path:
        return self._run_dir / f"seed_{seed}.log"

    def _last_line(self, seed: int) -> str:
        lines = self._log(seed).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _watch(pool: _Pool, seeds: list[int], run_dir: Path, total: int, progress: bool) -> None:
    """Show how far all are, until nothing runs."""
    from tqdm import tqdm

    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    with tqdm(
        total=total * len(seeds),
        disable=not progress,
        unit="step",
        dynamic_ncols=True,
        bar_format=layout,
    ) as bar:
        while pool.step(lambda words: tqdm.write(words)):
            rows = {seed: _last_values(run_of(run_dir, seed)) for seed in seeds}
            bar.n = min(sum(int(row.get("env_step", 0)) for row in rows.values()), bar.total)
            bar.set_postfix_str(
                ", ".join(_in_words(seed, rows[seed], total) for seed in pool.running)
            )
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _in_words(seed: int, row: dict[str, float], total: int) -> str:
    best = row.get("eval/best_mean_reward")
    share = f"{100 * row.get('env_step', 0) / total:.0f} %"
    return f"seed {seed}: {share}" + ("" if best is None else f", best {best:.0f}")


def _last_values(run_dir: Path) -> dict[str, float]:
    """Return the last value of every column of a run's metrics."""
    try:
        rows = read_metrics(run_dir / "metrics.csv")
    except InputError:  # not there yet
        return {}
    return {name: value for row in rows for name, value in row.items()}


def _summarize(seeds: list[int], run_dir: Path, name: str) -> None:
    """Write the figure of all runs, and say what they have come to."""
    from polygrad_fast.evaluation.plots import plot_learning_curves

    found = {seed: _last_values(run_of(run_dir, seed)) for seed in seeds}
    last = [row["eval/mean_reward"] for row in found.values() if "eval/mean_reward" in row]
    if not last:
        return
    paths = [run_of(run_dir, seed) / "metrics.csv" for seed in seeds if found[seed]]
    try:
        plot_learning_curves(paths, run_dir / CURVES, f"{name}, {len(paths)} seeds")
        where = f"learning curves in {run_dir / CURVES}"
    except InputError as error:  # matplotlib is an extra
        where = f"no learning curves ({error})"
    print(
        f"{name}: mean return at the last evaluation {statistics.fmean(last):.0f} over "
        f"{len(last)} seeds ({min(last):.0f} to {max(last):.0f}); {where}"
    )
