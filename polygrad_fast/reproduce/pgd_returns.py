"""Table 2 of policy-guided diffusion: returns of agents on real, unguided, guided and ensemble
data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polygrad_fast.arguments import as_choices
from polygrad_fast.config import PGDScale
from polygrad_fast.data.d4rl import d4rl_score, has_d4rl_score
from polygrad_fast.evaluation.plots import plot_estimates
from polygrad_fast.offline.agents import AGENTS, DATA
from polygrad_fast.recipes import RECIPES
from polygrad_fast.reproduce.pgd import PGDExperiment
from polygrad_fast.reproduce.stages import Stages, write_table
from polygrad_fast.reproduce.statistics import estimate, estimated

PAPER = {
    ("HalfCheetah", "medium-replay"): ((44.2, 43.6, 43.6), (44.7, 43.1, 46.1)),
    ("Walker2d", "medium-replay"): ((81.3, 85.2, 84.9), (82.7, 70.7, 84.0)),
    ("Hopper", "medium-replay"): ((82.9, 97.4, 100.5), (58.6, 52.1, 91.9)),
    ("HalfCheetah", "medium"): ((48.4, 45.4, 45.1), (48.6, 45.3, 47.6)),
    ("Walker2d", "medium"): ((81.7, 82.1, 77.8), (84.8, 85.2, 86.3)),
    ("Hopper", "medium"): ((63.6, 59.7, 62.8), (62.4, 57.4, 63.1)),
}
"""Scores of IQL, then of TD3+BC, on real, unguided and guided data of D4RL's -v2 environments."""


def paper_score(env_id: str, recipe: str, agent: str, data: str) -> float | None:
    """Return the paper's score, None where it has none."""
    found = PAPER.get((env_id.rpartition("-v")[0], recipe))
    if found is None or data not in ("real", "unguided", "guided"):
        return None
    return found[("iql", "td3_bc").index(agent)][("real", "unguided", "guided").index(data)]


def pgd_returns(stages: Stages, scale: PGDScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train and test all agents; write pgd-returns.csv and .png, and return the rows.

    A row per task, agent and kind of data, with the interquartile mean over seeds of the mean
    returns of fresh episodes; then the scores over all tasks. Those use D4RL's constants, which are
    of other versions of the environments: the paper's stand beside them to be looked at, not to be
    compared.

    Raises:
        InputError: an unknown agent or kind of data.
    """
    as_choices(scale.agents, "agents", AGENTS)
    as_choices(scale.data, "data", DATA)
    as_choices(scale.recipes, "recipes", RECIPES)
    experiment = PGDExperiment(stages, scale)
    experiment.check_datasets(scale.env_ids, scale.recipes)
    tasks = [(env_id, recipe) for env_id in scale.env_ids for recipe in scale.recipes]
    found: dict[tuple, list[float]] = {}
    for seed in seeds:  # all tasks of one seed first: what is there early is a whole table
        for env_id, recipe in tasks:
            for agent in scale.agents:
                for data in scale.data:
                    result = experiment.test(env_id, recipe, agent, data, seed)
                    key = env_id, recipe, agent, data
                    found.setdefault(key, []).append(float(np.mean(result["returns"])))
    rows = [_row(*key, returns) for key, returns in found.items()]
    if all(has_d4rl_score(env_id) for env_id in scale.env_ids):
        for agent in scale.agents:
            for data in scale.data:
                scores = [
                    [d4rl_score(env_id, value) for value in found[env_id, recipe, agent, data]]
                    for env_id, recipe in tasks
                ]
                rows.append(_total(agent, data, seeds, scores))
    write_table(stages.folder / "pgd-returns.csv", rows)
    _plot(stages, rows)
    return rows


def _row(env_id: str, recipe: str, agent: str, data: str, returns: list[float]) -> dict[str, Any]:
    found = estimated(returns)
    known = has_d4rl_score(env_id)
    return {
        "env_id": env_id,
        "recipe": recipe,
        "agent": agent,
        "data": data,
        **found,
        "score": d4rl_score(env_id, found["iqm"]) if known else None,
        "paper_score": paper_score(env_id, recipe, agent, data),
    }


def _total(
    agent: str, data: str, seeds: Sequence[int], scores: list[list[float]]
) -> dict[str, Any]:
    iqm, low, high = estimate(scores)
    return {
        "env_id": "all (scores)",
        "recipe": "all",
        "agent": agent,
        "data": data,
        "seeds": len(seeds),
        "iqm": iqm,
        "low": low,
        "high": high,
        "lowest": min(map(min, scores)),
        "highest": max(map(max, scores)),
        "score": iqm,
    }


def _plot(stages: Stages, rows: list[dict[str, Any]]) -> None:
    panels: dict[str, dict[str, list[tuple]]] = {}
    for row in rows:
        panel = panels.setdefault(f"{row['env_id']}, {row['recipe']}", {})
        point = (row["data"], row["iqm"], row["low"], row["high"])
        panel.setdefault(row["agent"], []).append(point)
    path = stages.folder / "pgd-returns.png"
    plot_estimates(panels, path, "mean return", "Returns by what the agent learnt from")
