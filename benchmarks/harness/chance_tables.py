"""What the table and the picture of worlds with chance hold."""

from __future__ import annotations

from dataclasses import dataclass

from harness.figure import Figure
from harness.rows import Row

TRUTH = "truth again"
HORIZONS = (10, 50)
"""Steps after the start at which observations are compared."""
BATCHES = (64, 1024)
"""Trajectories imagined at a time, whose cost is measured."""


def _by_case(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the rows of every seed by task and model."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row.case["task"], {}).setdefault(row.case["model"], []).append(row)
    return found


def _values(rows: list[Row], name: str) -> list[float]:
    return [row.values[name] for row in rows if name in row.values]


def _cell(values: list[float]) -> str:
    """Return the mean, and over several seeds the lowest and the highest."""
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.2g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2g} to {max(values):.2g})"


def chance_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: distances and errors by task and model, and costs."""
    header = ["world", "model", *(f"distance, h = {h}" for h in HORIZONS)]
    header += [*(f"std error, h = {h}" for h in HORIZONS), "updates"]
    header += [f"s per 1,000, B = {batch}" for batch in BATCHES]
    lines = []
    for task, models in _by_case(rows).items():
        for model, own in models.items():
            names = [f"{kind}_{h}" for kind in ("energy", "std_error") for h in HORIZONS]
            cells = [_cell(_values(own, name)) for name in names]
            updates = _values(own, "updates")
            cells.append(f"{sum(updates) / len(updates):,.0f}" if updates else "-")
            costs = (_values(own, f"seconds_per_1000_{batch}") for batch in BATCHES)
            cells += [f"{sum(c) / len(c):.2g}" if c else "-" for c in costs]
            lines.append([task, model, *cells])
    return header, lines


def chance_caption(rows: list[Row]) -> str:
    """Return what the numbers are."""
    seeds = {row.case["seed"] for row in rows if row.case["model"] != TRUTH}
    seconds = {row.values["train_seconds"] for row in rows if "train_seconds" in row.values}
    trained = " or ".join(f"{value:g}" for value in sorted(seconds))
    return (
        f"Means over {len(seeds)} seeds (lowest to highest)" if len(seeds) > 1 else "One seed"
    ) + (
        f", each model trained {trained}\n"
        "processor seconds. Distance: energy distance of imagined to true observations h\n"
        'steps after a start, normalized; "truth again": of a second true sample of the\n'
        "same size, about what a perfect model would show. Std error: root mean square error\n"
        "of the standard deviation of what follows a start, in deviations of the data. s:\n"
        "processor seconds per 1,000 trajectories of 51 observations (11 steps: of 11), B at a\n"
        "time."
    )


@dataclass(frozen=True)
class ChanceFigure(Figure):
    """Distances to the truth by world, and costs: one panel each, one line per model."""

    # title -> model -> label -> values of the seeds
    panels: dict[str, dict[str, dict[str, list[float]]]]
    # title -> label -> distance of the second true sample
    floors: dict[str, dict[str, float]]

    @classmethod
    def of(cls, name: str, rows: list[Row]) -> ChanceFigure | None:
        """Return the figure of the rows of the benchmark, None where there are none."""
        own = [row for row in rows if row.benchmark == "chance" and not row.smoke]
        if not own:
            return None
        panels: dict[str, dict[str, dict[str, list[float]]]] = {}
        floors = {}
        costs: dict[str, dict[str, list[float]]] = {}
        for task, models in _by_case(own).items():
            for model, found in models.items():
                shown = {f"h = {h}": _values(found, f"energy_{h}") for h in HORIZONS}
                if model == TRUTH:
                    floors[task] = {label: values[0] for label, values in shown.items()}
                    continue
                panels.setdefault(task, {})[model] = shown
                for batch in BATCHES:
                    seconds = costs.setdefault(model, {}).setdefault(f"B = {batch}", [])
                    seconds += _values(found, f"seconds_per_1000_{batch}")
        return cls(name, panels | {"cost": costs}, floors)

    def draw(self, picture) -> None:
        """Draw a point for every seed; dashed lines are the second true sample."""
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

        titles = list(self.panels)
        models = list(dict.fromkeys(m for panel in self.panels.values() for m in panel))[::-1]
        picture.set_size_inches(2.9 * len(titles) + 1.5, 2.7)
        grid = picture.subplots(1, len(titles), squeeze=False, sharey=True)[0]
        for axes, title in zip(grid, titles, strict=True):
            for model, shown in self.panels[title].items():
                for i, values in enumerate(shown.values()):
                    color, marker = f"C{i + (2 if title == 'cost' else 0)}", "os"[i]
                    heights = [models.index(model)] * len(values)
                    axes.plot(values, heights, marker, color=color, alpha=0.6, markersize=5)
            labels = list(dict.fromkeys(x for shown in self.panels[title].values() for x in shown))
            for i, label in enumerate(labels):
                color = f"C{i + (2 if title == 'cost' else 0)}"
                axes.plot([], [], "os"[i], color=color, label=label)
                if title in self.floors:
                    axes.axvline(self.floors[title][label], color=color, ls="--", linewidth=1)
            axes.set(xscale="log", title=title)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("s per 1,000" if title == "cost" else "distance to the truth")
            axes.set_yticks(range(len(models)), models)
            axes.set_ylim(-0.5, len(models) - 0.5)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize="x-small", framealpha=0.85, edgecolor="none")
