"""Store what `polygrad-fast reproduce ..` found, or has found so far, as rows.

    python benchmarks/reproduced.py runs/reproduce --command "polygrad-fast reproduce .."

Experiments of policy-guided diffusion go to results/pgd.jsonl, PolyGRAD's to results/figures.jsonl.
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

RESULTS = Path(__file__).parent / "results"
RETURNS_CASE = ("env_id", "recipe", "agent", "data", "seed", "preset")
MODEL_CASE = ("env_id", "model", "horizon", "steps", "seed", "preset")
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


def models_rows(folder: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (benchmark, case, values) of every world model whose trajectories were measured, with
    their computation time where that was."""
    seconds = {
        tuple(found["inputs"][name] for name in MODEL_CASE): found["result"]
        for found in read_results(folder / "results" / "seconds")
    }
    rows = []
    for found in read_results(folder / "results" / "errors"):
        case, result = _model_case(found["inputs"]), found["result"]
        key = tuple(found["inputs"][name] for name in MODEL_CASE)
        values = _numbers(found["inputs"] | result | seconds.get(key, {}))
        if result["mse"] is not None:
            last = {"last_mse": result["mse"][-1]}
            values |= _numbers(last)
        rows.append(("reproduced_models", case, values))
    return rows


def actions_rows(folder: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (benchmark, case, values) of every world model whose actions were measured, at each
    standard deviation."""
    rows = []
    for found in read_results(folder / "results" / "actions"):
        case = _model_case(found["inputs"])
        for sigma, result in found["result"].items():
            values = _numbers(found["inputs"] | (result or {}))
            rows.append(("reproduced_actions", case | {"sigma": float(sigma)}, values))
    return rows


def trainings_rows(folder: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (benchmark, case, values) of every training; values hold its returns untrained, at its
    best evaluation and at its last."""
    rows = []
    for path in sorted((folder / "results" / "trainings").glob("*")):
        for found in read_results(path):
            inputs, returns = found["inputs"], found["result"]["returns"]
            case = {name: inputs[name] for name in ("env_id", "algorithm", "seed")}
            values = {"untrained": returns[0], "best": max(returns), "last": returns[-1]}
            values["env_steps"] = found["result"]["env_steps"][-1]
            values["met_nan"] = int(found["result"]["met_nan"] is not None)
            case["preset"] = inputs.get("preset", "defaults")
            rows.append(("reproduced_trainings", case, values))
    return rows


def _model_case(inputs: dict[str, Any]) -> dict[str, Any]:
    case = {name: inputs[name] for name in MODEL_CASE}
    return case | {"steps": case["steps"] or 0}  # 0: one step at a time


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return what a row's values can be."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


KINDS = {
    "pgd.jsonl": (returns_rows, trajectories_rows),
    "figures.jsonl": (models_rows, actions_rows, trainings_rows),
}
"""What reads a folder's results for each file of rows."""


def main(arguments: list[str] | None = None) -> int:
    """Store the rows of the folder on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="--out of the experiments")
    parser.add_argument("--command", required=True, help="what was typed")
    parser.add_argument("--commit", help="of the code that ran; default this one's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows' files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        found = {
            name: [row for read in readers for row in read(options.folder)]
            for name, readers in KINDS.items()
        }
        if not any(found.values()):
            raise InputError(f"{options.folder} must hold results of reproduce, got none")
    except InputError as error:
        parser.error(str(error))
    facts = provenance(torch.device("cpu"), options.command, options.commit)
    for name, rows in found.items():
        if not rows:
            continue
        file = RowFile(options.results / name)
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
        print(f"{len(rows)} rows in {options.results / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
