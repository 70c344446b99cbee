"""Train another commit and this one on the same seeds with the same settings, and store how their
policies learn.

    python benchmarks/learning_curves.py --against 690a659 /path/to/its/checkout/.venv/bin/python \
        --env-id InvertedPendulum-v5 --seeds 100 101 102 103 104

The settings are those of the other commit's preset, read back from its run. Every run is a process
with one thread, one after the other. A row per run is written to
benchmarks/results/learning_curves.jsonl as soon as it is done.
`python benchmarks/report.py` makes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from quick_seeds import learning_curve

from harness.against import add_against, shown_command
from harness.rows import Row, RowFile, provenance
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.config import PRESETS, TrainConfig
from polygrad_fast.config.options import from_dict
from polygrad_fast.errors import InputError
from polygrad_fast.runs.metrics import read_metrics

RESULTS = Path(__file__).parent / "results" / "learning_curves.jsonl"
THIS = "this code"
FEW = [
    "--total-timesteps=90",
    "--learning-starts=60",
    "--denoiser.pretrain-updates=2",
    "--eval-interval=20",
    "--eval-episodes=2",
    "--imagined-batch-size=8",
]
"""Options of a run that only tries the mechanics."""


class Run(NamedTuple):
    """What is trained."""

    env_id: str
    preset: str
    seed: int
    run_dir: Path


def train_there(python: str, run: Run, options: list[str]) -> TrainConfig:
    """Train by the command line of another interpreter's package; return its configuration.

    Raises:
        InputError: the command failed; the message has its last line.
    """
    settings = {"env-id": run.env_id, "preset": run.preset, "seed": run.seed}
    command = [python, "-P", "-m", "polygrad_fast.cli", "train", "--no-progress"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    try:
        done = _run([*command, f"--run-dir={run.run_dir}", *options])
    except OSError as error:
        raise InputError(f"{python} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise InputError(f"{python} did not train: {last[0]}")
    saved = json.loads((run.run_dir / "config.json").read_text())
    return from_dict(saved["config"], TrainConfig)


def train_here(run: Run, config: TrainConfig) -> None:
    """Train this checkout's package in a process of its own."""
    settings = json.dumps([*map(str, run), dataclasses.asdict(config)])
    done = _run([sys.executable, __file__, "--worker", settings])
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def worker(settings: str) -> None:
    """Train what `train_here` says."""
    torch.set_num_threads(1)
    env_id, preset, seed, run_dir, options = json.loads(settings)
    config = from_dict(options, TrainConfig)
    agent = PolyGRAD(env_id, preset, int(seed), "cpu", config, run_dir)
    agent.learn(config.total_timesteps)


def _run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def processor_seconds() -> float:
    """Return the processor time of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(
    against: tuple[str, str], env_id: str, preset: str, seed: int, options: list[str]
) -> dict[str, dict]:
    """Train a seed by both commits with the preset and the command line's options; return the
    values and curves of each one's row."""
    name, python = against
    found = {}

    def record(code: str, run: Run, begun: float) -> None:
        curve = learning_curve(read_metrics(run.run_dir / "metrics.csv"))
        seconds = round(processor_seconds() - begun, 1)
        values = {"train_steps": curve["env_step"][-1], "processor_seconds": seconds}
        found[code] = {"values": values, "curves": curve}

    with tempfile.TemporaryDirectory() as folder:
        there, here = (Run(env_id, preset, seed, Path(folder) / part) for part in ("a", "b"))
        begun = processor_seconds()
        config = train_there(python, there, options)
        record(f"commit {name}", there, begun)
        begun = processor_seconds()
        train_here(here, config)
        record(THIS, here, begun)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train the environments and seeds of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_against(parser, required=True)
    parser.add_argument("--env-id", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--total-timesteps", type=int, help="the preset's")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--smoke", action="store_true", help="few steps, to try the mechanics")
    options = parser.parse_args(arguments)
    for seed in options.seeds:
        if seed < 0:
            parser.error(f"--seeds must be at least 0, got {seed}")
    changes = FEW if options.smoke else []
    if options.total_timesteps is not None:
        changes = [*changes, f"--total-timesteps={options.total_timesteps}"]
    torch.set_num_threads(1)  # as the processes that train
    command = shown_command("learning_curves.py", arguments, options.against)
    facts = vars(provenance(torch.device("cpu"), command))
    try:
        file = RowFile(options.rows)
        for env_id in options.env_id:
            PolyGRAD(env_id, options.preset, device="cpu")  # refused now or never
        for env_id, seed in itertools.product(options.env_id, options.seeds):
            found = compare(options.against, env_id, options.preset, seed, changes)
            for code, result in found.items():
                case = {"env_id": env_id, "preset": options.preset, "seed": seed, "code": code}
                row = Row(
                    **facts,
                    benchmark="learning_curves",
                    dtype="float32",
                    case=case,
                    status="ok",
                    smoke=options.smoke,
                    **result,
                )
                file.add(row)
                print(row.name, json.dumps(row.values), *row.curves.values(), flush=True)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        sys.exit(main())
