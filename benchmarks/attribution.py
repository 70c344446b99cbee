"""Where an update's time goes, plain beside each acceleration, and beside another commit.

    python benchmarks/attribution.py
    python benchmarks/attribution.py --against 690a659 /path/to/its/checkout/.venv/bin/python

Every preset and world model takes whole updates (as many environment steps as fall on one policy
update, with all that is due after them) in one process per variant, in turns, so that all meet the
same machine. Times are medians over the turns of processor time on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from harness.against import add_against, shown_command
from harness.rows import Row, RowFile, provenance
from harness.update_worker import PREFILL, replaced
from polygrad_fast.agent import PolyGRAD
from polygrad_fast.config import TrainConfig
from polygrad_fast.errors import InputError
from polygrad_fast.runs.processor import Processor

RESULTS = Path(__file__).parent / "results" / "attribution.jsonl"
WORKER = Path(__file__).parent / "harness" / "update_worker.py"
PARTS = ("rest", "replay", "model_update", "imagine", "policy_update")
HOURS = 3600 * 1e3
TURN_SECONDS = 0.2
"""Processor time of one variant's turn, at least."""


class Case(NamedTuple):
    """What is trained; `at_commit`: whether commit 690a659 has it."""

    preset: str
    env_id: str
    world_model: str
    batch: int
    at_commit: bool


class Variant(NamedTuple):
    """A way to do the same."""

    name: str
    options: dict
    autograd: bool = False
    python: str = sys.executable


CASES = (
    Case("quick", "InvertedPendulum-v5", "trajectory_diffusion", 128, True),
    Case("default", "Walker2d-v5", "trajectory_diffusion", 64, True),
    Case("quick", "InvertedPendulum-v5", "autoregressive", 128, False),
    Case("laptop", "Hopper-v5", "trajectory_diffusion", 128, False),
    Case("laptop", "Hopper-v5", "autoregressive", 128, False),
)
SMOKE = (Case("quick", "Pendulum-v1", "trajectory_diffusion", 8, False),)
PLAIN = {"engine": "reference", "dtype": "float32"}
ENGINE = {"engine": "torch", "dtype": "float32"}
ROUNDED = {
    "engine": "torch",
    "dtype": "bfloat16",
    "denoiser": {"train_dtype": "bfloat16"},
    "autoregressive": {"train_dtype": "bfloat16"},
}


def variants(case: Case) -> list[Variant]:
    """Return the ways of this code, each beginning from the one before; bfloat16 only where the
    processor has products of it (emulated ones took 29 seconds an update of preset default)."""
    found = [Variant("plain PyTorch", PLAIN, autograd=True)]
    if case.world_model == "trajectory_diffusion":
        found.append(Variant("+ engine torch", ENGINE, autograd=True))
    found.append(Variant("+ written-out passes", ENGINE))
    offered = (Processor.of_this_machine().instruction_sets or "").split()
    if {"avx512_bf16", "amx_bf16"} & set(offered):
        found.append(Variant("+ bfloat16", ROUNDED))
    return found


def merged(options: dict, changes: dict) -> dict:
    """Return nested options with changes."""
    changes = {k: merged(options.get(k, {}), v) if isinstance(v, dict) else v
               for k, v in changes.items()}  # fmt: skip
    return options | changes


def options_of(case: Case, preset: dict, variant: Variant) -> dict:
    """Return a preset's options ({}: all are the process's own) with those of case and variant."""
    fixed = {
        "world_model": case.world_model,
        "imagined_batch_size": case.batch,
        "learning_starts": PREFILL,
        "policy_delay_steps": 0,
        "replay_capacity": 20_000,
        "denoiser": {"pretrain_updates": 0},
        "autoregressive": {"pretrain_updates": 0},
    }
    return merged(merged(preset, fixed), variant.options)


@contextlib.contextmanager
def worker(case: Case, preset: dict, variant: Variant) -> Iterator[subprocess.Popen]:
    """Start a process that takes updates; it says its configuration when it can."""
    settings = {
        "preset": case.preset,
        "env_id": case.env_id,
        "options": options_of(case, preset, variant),
        "autograd": variant.autograd,
    }
    command = [variant.python, "-P", str(WORKER), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def configuration(process: subprocess.Popen, variant: str) -> dict:
    """Wait for a process that has been started, and return its options.

    Raises:
        InputError: it ended instead; the message has its last line.
    """
    line = process.stdout.readline()
    if not line:
        last = process.stderr.read().strip().splitlines()[-1:]
        raise InputError(f"{variant} cannot be measured: {' '.join(last)}")
    return json.loads(line)


def update(process: subprocess.Popen, count: int) -> dict[str, float]:
    """Let a process take updates; return the seconds of each part of one."""
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def measure(case: Case, against: tuple[str, str] | None, rounds: int) -> dict[str, dict]:
    """Return the values of each variant's row, by its name.

    The other commit takes the updates of its own preset; where that is not this code's, this code
    takes them with these settings too.
    """
    preset = TrainConfig.from_preset(case.preset)
    ways = [(variant, preset) for variant in variants(case)]
    with contextlib.ExitStack() as stack:
        running = {}
        if against is not None and case.at_commit:
            name, python = f"commit {against[0]}", against[1]
            former = Variant(name, ENGINE, python=python)
            running[name] = stack.enter_context(worker(case, {}, former))
            there = replaced(preset, configuration(running[name], name))
            now = replaced(preset, options_of(case, {}, former))
            if there.resolved(case.env_id) != now.resolved(case.env_id):
                ways.insert(0, (Variant("this code, settings of that commit", ENGINE), there))
        for variant, config in ways:
            options = dataclasses.asdict(config.resolved(case.env_id))
            running[variant.name] = stack.enter_context(worker(case, options, variant))
            configuration(running[variant.name], variant.name)
        # enough in a turn that caches are warm again
        slowest = max(update(process, 1)["whole"] for process in running.values())
        count = math.ceil(TURN_SECONDS / slowest)
        found: dict[str, list[dict]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, process in running.items():
                found[name].append(update(process, count))
    values = {name: values_of(updates) for name, updates in found.items()}
    first = next(iter(values.values()))
    for name in values:
        values[name]["times_as_fast"] = first["whole_ms"] / values[name]["whole_ms"]
    return values


def values_of(updates: list[dict[str, float]]) -> dict[str, float]:
    """Return medians in milliseconds, and what a million environment steps would take."""
    median = {
        part: 1e3 * statistics.median(update.get(part, 0.0) for update in updates)
        for part in (*PARTS, "whole")
    }
    env_steps = updates[0]["env_steps"]
    return {f"{part}_ms": ms for part, ms in median.items()} | {
        "env_steps": env_steps,
        "rounds": len(updates),
        "hours_per_million_steps": median["whole"] * 1e6 / env_steps / HOURS,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases of the command line and store a row per variant."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_against(parser)
    presets = sorted({case.preset for case in CASES})
    parser.add_argument("--only", nargs="+", choices=presets, help="presets (all)")
    parser.add_argument("--rounds", type=int, default=15, help="of a case (%(default)s)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the mechanics")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    command = shown_command("attribution.py", arguments, options.against)
    facts = provenance(torch.device("cpu"), command)
    against = tuple(options.against) if options.against else None
    try:
        file = RowFile(options.rows)
        for case in SMOKE if options.smoke else CASES:
            if options.only and case.preset not in options.only:
                continue
            PolyGRAD(case.env_id, case.preset, device="cpu")  # refused now or never
            for name, values in measure(case, against, options.rounds).items():
                names = {**case._asdict(), "variant": name}
                del names["at_commit"]
                dtype = "bfloat16" if "bfloat16" in name else "float32"
                file.add(
                    Row(
                        **vars(facts),
                        benchmark="attribution",
                        dtype=dtype,
                        case=names,
                        status="ok",
                        values=values,
                        smoke=options.smoke,
                    )
                )
                print(names, {k: round(v, 3) for k, v in values.items()}, flush=True)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
