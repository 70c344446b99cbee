"""Store what `polygrad-fast reproduce pgd-..` found, or has found so far, as rows.

python benchmarks/pgd.py runs/reproduce_pgd --command "polygrad-fast reproduce .."
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.rows import Row, RowFile, provenance
from polygrad_fast.errors import InputError

RESULTS = Path(__file__).parent / "results" / "pgd.jsonl"
RETURNS_CASE = ("env_id", "recipe", "agent", "data", "seed", "preset")
TRAJECTORIES_CASE = ("env_id", "model_recipe", "target", "length", "seed", "preset")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results in a folder, each with what it is of.

    Raises:
        InputError: none there, or a damaged one.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            stored = json.loads(path.read_text())
            found.append({"inputs": stored["inputs"], "result": stored["result"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error!r}") from None
    return found


def returns_rows(folder: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (benchmark, case, values) of every agent that was tested."""
    rows = []
    for found in read_results(folder / "results" / "test"):
        case = {name: found["inputs"].pop(name) for name in RETURNS_CASE}
        returns = found["result"]["returns"]
        values = {"mean_return": float(np.mean(returns)), "std_return": float(np.std(returns))}
        rows.append(("pgd_returns", case, values | _numbers(found["inputs"])))
    return rows


def trajectories_rows(folder: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (benchmark, case, values) of every set of trajectories that was measured."""
    rows = []
    for found in read_results(folder / "results" / "trajectories"):
        case = {name: found["inputs"].pop(name) for name in TRAJECTORIES_CASE}
        coefficient = found["inputs"].pop("coefficient")
        case["source"] = "ensemble" if coefficient is None else f"lambda {coefficient:g}"
        values = _numbers(found["result"] | found["inputs"])
        rows.append(("pgd_trajectories", case, values))
    return rows


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return what a row's values can be."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def main(arguments: list[str] | None = None) -> int:
    """Store the rows of the folder on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="--out of the experiments")
    parser.add_argument("--command", required=True, help="what was typed")
    parser.add_argument("--commit", help="of the code that ran; default this one's")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="file of the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        rows = returns_rows(options.folder) + trajectories_rows(options.folder)
        if not rows:
            raise InputError(f"{options.folder} must hold results of reproduce pgd-.., got none")
    except InputError as error:
        parser.error(str(error))
    facts = provenance(torch.device("cpu"), options.command, options.commit)
    file = RowFile(options.rows)
    for benchmark, case, values in rows:
        file.add(
            Row(
                **dataclasses.asdict(facts),
                benchmark=benchmark,
                dtype="float32",
                case=case,
                status="ok",
                values=values,
            )
        )
    print(f"{len(rows)} rows in {options.rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
