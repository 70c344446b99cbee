"""What the tables of PolyGRAD's figures hold: header and lines, and what stands below."""

from __future__ import annotations

from harness.pgd_tables import estimated_cell, rows_of, shared_sizes, unique
from harness.rows import Row

MODEL = ("env_id", "model", "steps", "horizon")
MODEL_HEADER = ["environment", "model", "steps", "horizon"]


def _cell(rows: list[Row], name: str) -> str:
    return estimated_cell([row.values[name] for row in rows if name in row.values])


def _models(rows: list[Row]) -> list[tuple[list[str], list[Row]]]:
    """Return the first cells of each model's line, and its rows."""
    found = []
    for key in unique(tuple(row.case[name] for name in MODEL) for row in rows):
        env_id, model, steps, horizon = key
        first = [env_id, model.replace("_", " "), str(steps or "-"), str(horizon)]
        found.append((first, rows_of(rows, dict(zip(MODEL, key, strict=True)))))
    return found


def models_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of errors, actions and costs of world models, over seeds."""
    names = ("mean_mse", "last_mse", "ks", "r2", "autocorrelation", "std", "seconds_per_1000")
    lines = [
        [*first, str(len(own)), *(_cell(own, name) for name in names)]
        for first, own in _models(rows)
    ]
    header = ["seeds", "error", "at the last step", "KS", "R2", "autocorrelation", "std"]
    return [*MODEL_HEADER, *header, "s per 1,000"], lines


def models_caption(rows: list[Row]) -> str:
    """Return what the numbers are."""
    return (
        "Interquartile means over seeds (bootstrap interval of 95 %): squared error of imagined\n"
        "observations against the simulator, in standard deviations of the data, mean over the\n"
        "steps after the start; statistics of standardized actions; processor seconds for 1,000\n"
        f"trajectories. {shared_sizes(rows, ('model_updates', 'dataset_steps'))}."
    )


def actions_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of Kolmogorov-Smirnov distance and R2 by standard deviation."""
    sigmas = unique(row.case["sigma"] for row in rows)
    lines = []
    for first, own in _models(rows):
        cells = []
        for sigma in sigmas:
            at = rows_of(own, {"sigma": sigma})
            found = [_cell(at, name) for name in ("ks", "r2")]
            cells.append("-" if found[0] == "-" else "; ".join(found))
        lines.append([*first, *cells])
    return [*MODEL_HEADER, *(f"sigma {sigma:g}" for sigma in sigmas)], lines


def actions_caption(rows: list[Row]) -> str:
    """Return what the numbers are."""
    seeds = len(unique(row.case["seed"] for row in rows))
    return (
        "Kolmogorov-Smirnov distance of standardized actions from the standard normal; share of\n"
        f"them that their own state explains (R2). Interquartile means over {seeds} seeds\n"
        "(bootstrap interval of 95 %), at several standard deviations of the policy."
    )


def trainings_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of returns of trainings, over seeds."""
    lines = []
    for env_id, algorithm in unique((row.case["env_id"], row.case["algorithm"]) for row in rows):
        own = rows_of(rows, {"env_id": env_id, "algorithm": algorithm})
        steps = max(row.values["env_steps"] for row in own)
        name = algorithm.replace("ablation-", "ablation: ").replace("_", " ")
        cells = [_cell(own, column) for column in ("untrained", "best", "last")]
        met_nan = sum(row.values["met_nan"] for row in own)
        lines.append([env_id, name, str(len(own)), f"{steps:,}", *cells, str(met_nan)])
    header = ["environment", "algorithm", "seeds", "environment steps", "untrained"]
    return [*header, "best evaluation", "last evaluation", "met NaN"], lines


def trainings_caption(rows: list[Row]) -> str:
    """Return what the numbers are."""
    presets = ", ".join(sorted({row.case["preset"] for row in rows} - {"defaults"}))
    return (
        "Mean returns of evaluations, interquartile mean over seeds (bootstrap interval of 95 %).\n"
        f"Preset of trainings in imagination: {presets or '-'}; of the others: their package's."
    )
