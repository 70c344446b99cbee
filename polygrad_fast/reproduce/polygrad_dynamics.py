"""Figures 3, 4 and 5 of PolyGRAD: are imagined actions the policy's, what do trajectories cost, and
how true are they?

The paper shows its results as plots, without numbers, so the column "paper" is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polygrad_fast.config import WorldModelScale
from polygrad_fast.evaluation.plots import plot_curves, plot_densities, plot_tradeoffs
from polygrad_fast.reproduce.polygrad import BINS, ModelExperiment
from polygrad_fast.reproduce.polygrad_models import Variant, variants
from polygrad_fast.reproduce.stages import Stages, write_table
from polygrad_fast.reproduce.statistics import estimated

ON_POLICY = {
    "std": 1.0,
    "ks": None,
    "ks_floor": None,
    "r2": 0.0,
    "autocorrelation": 0.0,
    "kurtosis": 3.0,
    "beyond_3": 0.0027,
}
"""Statistics of standardized actions, and what they are on-policy; None: "ks" is about
"ks_floor"."""
IN_FIGURE_4 = (
    "mean_mse",
    "mean_floor",
    "last_mse",
    "reward_mse",
    "terminal_agreement",
    "left_out",
    "std",
    "ks",
    "ks_floor",
    "r2",
    "autocorrelation",
)


def fig3(stages: Stages, scale: WorldModelScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure imagined actions at several standard deviations of the policy; write fig3.csv and
    .png, and return the rows: one per environment, model, standard deviation and statistic."""
    horizon = scale.horizons[0]
    found = _measured(stages, scale, seeds, [horizon], ModelExperiment.actions)
    rows, panels = [], {}
    for (env_id, variant), results in found.items():
        for sigma in scale.sigmas:
            at = [result[str(sigma)] for result in results]
            for name, wanted in ON_POLICY.items():
                row = _case(env_id, variant) | {"sigma": sigma, "statistic": name}
                row |= estimated([None if numbers is None else numbers[name] for numbers in at])
                rows.append(row | {"on_policy": wanted, "paper": None})
            counts = [numbers["counts"] for numbers in at if numbers is not None]
            if counts:
                panel = panels.setdefault(f"{env_id}, sigma {sigma:g}", {})
                panel[variant.label] = np.sum(counts, axis=0)
    write_table(stages.folder / "fig3.csv", rows)
    title = f"Standardized actions in trajectories of {horizon} steps"
    plot_densities(panels, BINS, stages.folder / "fig3.png", len(scale.sigmas), title)
    return rows


def fig4(stages: Stages, scale: WorldModelScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure errors, actions and computation times; write fig4.csv and .png, and return the rows:
    one per environment, model, horizon and quantity."""
    found = _measured(stages, scale, seeds, scale.horizons, _errors_and_seconds)
    rows, panels = [], {}
    for (env_id, variant), results in found.items():
        estimates = {
            name: estimated([result.get(name) for result in results])
            for name in ("seconds_per_1000", *IN_FIGURE_4)
        }
        rows += [
            _case(env_id, variant) | {"quantity": name} | numbers | {"paper": None}
            for name, numbers in estimates.items()
        ]
        error, seconds = estimates["mean_mse"], estimates["seconds_per_1000"]
        if "iqm" in error:
            panel = panels.setdefault(f"{env_id}, {variant.horizon} steps", {})
            point = (seconds["iqm"], *(error[name] for name in ("iqm", "low", "high")))
            panel.setdefault(variant.model, []).append(point)
    write_table(stages.folder / "fig4.csv", rows)
    plot_tradeoffs(
        panels,
        stages.folder / "fig4.png",
        ("seconds for 1,000 trajectories", "squared error, normalized observations"),
        "Error and computation time of world models",
    )
    return rows


def fig5(stages: Stages, scale: WorldModelScale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the error of every imagined step; write fig5.csv and .png, and return the rows: one
    per environment, model, horizon and step."""
    found = _measured(stages, scale, seeds, scale.horizons, ModelExperiment.errors)
    rows, panels = [], {}
    for (env_id, variant), results in found.items():
        curve = []
        for step in range(1, variant.horizon):
            at = {
                name: [
                    None if result["mse"] is None else result[name][step - 1] for result in results
                ]
                for name in ("mse", "floor")
            }
            row = _case(env_id, variant) | {"step": step} | estimated(at["mse"])
            rows.append(row | {"floor": estimated(at["floor"]).get("iqm"), "paper": None})
            if "iqm" in row:
                curve.append((step, *(row[name] for name in ("iqm", "low", "high"))))
        if curve:
            heading = f"{env_id}, trajectories of {variant.horizon} steps"
            panels.setdefault(heading, {})[variant.label] = curve
    write_table(stages.folder / "fig5.csv", rows)
    plot_curves(
        panels,
        stages.folder / "fig5.png",
        ("step of the trajectory", "squared error, normalized observations"),
        "Imagined trajectories against the simulator",
        log=True,
    )
    return rows


def _measured(
    stages: Stages,
    scale: WorldModelScale,
    seeds: Sequence[int],
    horizons: Sequence[int],
    measure: Callable[[ModelExperiment, str, Variant, int], dict[str, Any]],
) -> dict[tuple[str, Variant], list[dict[str, Any]]]:
    """Return what was measured for each seed, by environment and variant."""
    experiment = ModelExperiment(stages, scale)
    experiment.check()
    found: dict[tuple[str, Variant], list[dict[str, Any]]] = {}
    for seed in seeds:  # all of one seed first: what is there early is a whole table
        for env_id in scale.env_ids:
            for horizon in horizons:
                for variant in variants(scale, horizon):
                    result = measure(experiment, env_id, variant, seed)
                    found.setdefault((env_id, variant), []).append(result)
    return found


def _errors_and_seconds(
    experiment: ModelExperiment, env_id: str, variant: Variant, seed: int
) -> dict[str, Any]:
    found = experiment.errors(env_id, variant, seed)
    last = None if found["mse"] is None else found["mse"][-1]
    seconds = experiment.seconds(env_id, variant, seed)
    return found | {"last_mse": last, "seconds_per_1000": seconds}


def _case(env_id: str, variant: Variant) -> dict[str, Any]:
    return {"env_id": env_id, **variant._asdict()}
