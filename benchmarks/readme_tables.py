"""Write the README's tables from the stored rows in benchmarks/results.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from polygrad_fast.training.run_log import write_bytes_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def quick_seeds() -> str:
    """Return the table of what the quick preset learns on each seed."""
    rows = json.loads((RESULTS / "quick_seeds.json").read_text())
    lines = [
        "| environment | seed | untrained | best policy | last policy | steps | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['env_id']} | {row['seed']} | {row['untrained_mean_reward']:.0f} "
            f"| {row['best_mean_reward']:.0f} ± {row['best_std_reward']:.0f} "
            f"| {row['last_mean_reward']:.0f} ± {row['last_std_reward']:.0f} "
            f"| {row['env_steps']:,} | {row['train_seconds'] / 60:.1f} |"
        )
    first = rows[0]
    commands = [
        f"`python benchmarks/quick_seeds.py --env-id {env_id} --seeds {' '.join(map(str, seeds))}`"
        for env_id, seeds in _seeds(rows).items()
    ]
    machine = f"{first['processor']}, torch {first['torch']}, mujoco {first['mujoco']}"
    lines += [
        "",
        f"Returns over {first['episodes']} fresh episodes (mean ± standard deviation); one thread",
        f"of an {machine}; no setting was tuned on these seeds.",
        f"{' and '.join(commands)}, stored in `benchmarks/results/quick_seeds.json`.",
    ]
    return "\n".join(lines)


def _seeds(rows: list[dict]) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for row in rows:
        seeds.setdefault(row["env_id"], []).append(row["seed"])
    return seeds


def sampler_cpu() -> str:
    """Return the table of the CPU engines' times."""
    stored = json.loads((RESULTS / "sampler_cpu.json").read_text())
    lines = [
        "| engine torch | B | ms per step | its own GEMMs | reference | torch / GEMMs | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for benchmark in stored["benchmarks"]:
        info, case = benchmark["extra_info"], benchmark["params"]
        lines.append(
            f"| {case['dtype']} | {case['batch']} | {info['engine_ms_per_step']:.2f} "
            f"| {info['gemms_ms_per_step']:.2f} | {info['reference_ms_per_step']:.2f} "
            f"| {info['engine_over_gemms']:.2f} | {info['reference_over_engine']:.2f}x |"
        )
    threads = stored["benchmarks"][0]["extra_info"]["threads"]
    processor = stored["machine_info"]["cpu"]["brand_raw"]
    lines += [
        "",
        f"One diffusion step, paper-sized residual MLP, S = 17, A = 6, H = 10; {threads} thread(s)",
        f"of an {processor}; medians of interleaved rounds, commit",
        f"{stored['commit_info']['id'][:7]}:",
        f"`OMP_NUM_THREADS={threads} pytest benchmarks/bench_sampler_cpu.py --benchmark-only",
        "--benchmark-json=benchmarks/results/sampler_cpu.json`",
    ]
    return "\n".join(lines)


TABLES = {"quick_seeds": quick_seeds, "sampler_cpu": sampler_cpu}


def render(text: str) -> str:
    """Return `text` with everything between the table markers made anew."""
    for name, build in TABLES.items():
        begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no {begin} ... {end}")
        replacement = f"{begin}\n{build()}\n{end}"
        text = pattern.sub(lambda _, new=replacement: new, text, count=1)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    write_bytes_atomic(readme, render(readme.read_text()).encode())
