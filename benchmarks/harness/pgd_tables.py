"""What the tables of policy-guided diffusion hold: header and lines, and what stands below."""

from __future__ import annotations

from collections.abc import Iterable

from harness.rows import Row
from polygrad_fast.reproduce.pgd_returns import paper_score
from polygrad_fast.reproduce.statistics import estimate

DATA = ("real", "unguided", "guided", "ensemble")


def unique(values: Iterable) -> list:
    """Return values in the order in which they first come, each once."""
    return list(dict.fromkeys(values))


def rows_of(rows: list[Row], case: dict) -> list[Row]:
    """Return the rows whose case has all that is in `case`."""
    return [row for row in rows if case.items() <= row.case.items()]


def estimated_cell(values: list[float]) -> str:
    """Return an interquartile mean with its interval, of one value the value."""
    if not values:
        return "-"
    found = estimate([values])
    shown = [f"{number:.4g}" for number in found]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def returns_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the returns by what agents learnt from, over seeds."""
    lines = []
    for env_id, recipe, agent in sorted(
        {(row.case["env_id"], row.case["recipe"], row.case["agent"]) for row in rows}
    ):
        cells = []
        for data in DATA:
            case = {"env_id": env_id, "recipe": recipe, "agent": agent, "data": data}
            own = rows_of(rows, case)
            cell = estimated_cell([row.values["mean_return"] for row in own])
            score = paper_score(env_id, recipe, agent, data)
            cells.append(cell if score is None else f"{cell}; {score:g}")
        case = {"env_id": env_id, "recipe": recipe, "agent": agent}
        seeds = len(unique(row.case["seed"] for row in rows_of(rows, case)))
        lines.append([env_id, recipe, agent, str(seeds), *cells])
    return ["environment", "data set", "agent", "seeds", *DATA], lines


def returns_caption(rows: list[Row]) -> str:
    """Return what the numbers are."""
    sizes = shared_sizes(
        rows, ("agent_updates", "diffusion_updates", "lifetime", "num_trajectories")
    )
    return (
        "Mean returns of fresh episodes by the last agent, interquartile mean over seeds\n"
        "(bootstrap interval of 95 %); behind the semicolon the paper's score, of D4RL's -v2 data\n"
        f"and larger networks, to be looked at, not compared. {sizes}."
    )


def trajectories_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of likelihood and error by guidance, over seeds."""
    sources = unique(row.case["source"] for row in rows)
    lines = []
    for env_id, target, length in unique(
        (row.case["env_id"], row.case["target"], row.case["length"]) for row in rows
    ):
        case = {"env_id": env_id, "target": target, "length": length}
        own = rows_of(rows, case)
        cells = []
        for source in sources:
            values = [row.values for row in own if row.case["source"] == source]
            likelihood = estimated_cell([v["log_likelihood"] for v in values])
            error = estimated_cell([v["mse"] for v in values if "mse" in v])
            cells.append(f"{likelihood}; {error}")
        seeds = len(unique(row.case["seed"] for row in own))
        lines.append([env_id, target, str(length), str(seeds), *cells])
    return ["environment", "target policy", "rows", "seeds", *sources], lines


def trajectories_caption(rows: list[Row]) -> str:
    """Return what the numbers are."""
    sizes = shared_sizes(rows, ("diffusion_updates", "ensemble_updates", "measured_trajectories"))
    recipes = ", ".join(unique(row.case["model_recipe"] for row in rows))
    return (
        "Mean log-likelihood of actions under the target policy; squared error against MuJoCo,\n"
        "where the actions are replayed from the same first state (observations in standard\n"
        f"deviations of the data). Models of {recipes}; target policies: IQL on real data of\n"
        f"that name, random: one that never learnt. Over seeds as above. {sizes}."
    )


def shared_sizes(rows: list[Row], names: Iterable[str]) -> str:
    """Return sizes in words."""
    found = {
        name: unique(row.values[name] for row in rows if row.values.get(name) is not None)
        for name in names
    }
    return ", ".join(
        f"{name.replace('_', ' ')} {' or '.join(map(str, values))}"
        for name, values in found.items()
        if values
    )
