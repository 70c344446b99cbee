"""Train the quick preset on several seeds and store what the policies score.

    python benchmarks/quick_seeds.py --env-id InvertedPendulum-v5 --seeds 10 11 12 13 14

Each seed is trained and evaluated by the command line, one process after the other, with one
thread each. Rows go to benchmarks/results/quick_seeds.jsonl in place of those of the same
environment; `polygrad-fast bench report` makes the README's table of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from polygrad_fast.benchmarking.rows import Row, provenance, read_rows, write_rows
from polygrad_fast.training.run_log import read_metrics

RESULTS = Path(__file__).parent / "results" / "quick_seeds.jsonl"


def run_seed(env_id: str, seed: int, episodes: int) -> dict[str, float]:
    """Train one seed and evaluate its best and last checkpoints on fresh episodes; return the
    row's values."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def polygrad_fast(*arguments: str) -> str:
        command = [sys.executable, "-m", "polygrad_fast.cli", *arguments]
        result = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return result.stdout

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        start = time.perf_counter()
        polygrad_fast(
            *("train", "--env-id", env_id, "--preset", "quick", "--seed", str(seed)),
            *("--run-dir", str(run_dir), "--no-progress"),
        )
        seconds = time.perf_counter() - start
        scores = {
            checkpoint: json.loads(
                polygrad_fast(
                    *("evaluate", str(run_dir), "--episodes", str(episodes)),
                    *("--checkpoint", checkpoint),
                ).splitlines()[-1]
            )
            for checkpoint in ("best", "last")
        }
        rows = read_metrics(run_dir / "metrics.csv")
    return {
        "env_steps": rows[-1]["env_step"],
        "train_seconds": round(seconds, 1),
        "untrained_mean_reward": round(rows[0]["eval/mean_reward"], 1),
        "best_mean_reward": round(scores["best"]["mean_reward"], 1),
        "best_std_reward": round(scores["best"]["std_reward"], 1),
        "last_mean_reward": round(scores["last"]["mean_reward"], 1),
        "last_std_reward": round(scores["last"]["std_reward"], 1),
        "episodes": episodes,
    }


def main() -> None:
    """Run the seeds given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-id", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--episodes", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the processes that train
    command = shlex.join(["python", "benchmarks/quick_seeds.py", *sys.argv[1:]])
    # before the first row makes the checkout dirty
    facts = dataclasses.asdict(provenance(torch.device("cpu"), command))
    stored = read_rows(RESULTS) if RESULTS.exists() else []
    rows = [row for row in stored if row.case["env_id"] != arguments.env_id]
    for seed in arguments.seeds:
        row = Row(
            **facts,
            benchmark="quick_seeds",
            dtype="float32",
            case={"env_id": arguments.env_id, "seed": seed},
            status="ok",
            values=run_seed(arguments.env_id, seed, arguments.episodes),
        )
        rows.append(row)
        print(row.name, json.dumps(row.values), flush=True)
        write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
