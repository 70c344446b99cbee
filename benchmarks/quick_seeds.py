"""Train the quick preset on several seeds and store a table of what the policies score.

    python benchmarks/quick_seeds.py --env-id InvertedPendulum-v5 --seeds 10 11 12 13 14

Each seed is trained and evaluated by the command line, one process after the other, with one
thread each. Rows go to benchmarks/results/quick_seeds.json; rows of the same environment are
replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from polygrad_fast.training.run_log import read_metrics, versions, write_json_atomic

RESULTS = Path(__file__).parent / "results" / "quick_seeds.json"


def run_seed(env_id: str, seed: int, episodes: int) -> dict:
    """Train one seed and evaluate its best and last checkpoints on fresh episodes."""
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
        "env_id": env_id,
        "seed": seed,
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
    software = versions()  # before the first row makes the checkout dirty
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in stored if row["env_id"] != arguments.env_id]
    for seed in arguments.seeds:
        rows.append(run_seed(arguments.env_id, seed, arguments.episodes) | software)
        print(json.dumps(rows[-1]), flush=True)
        write_json_atomic(RESULTS, rows)


if __name__ == "__main__":
    main()
