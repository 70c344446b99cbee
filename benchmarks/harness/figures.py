"""Figures drawn from stored rows; they need the extra ``plots``."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.chance_tables import ChanceFigure
from harness.figure import Figure
from harness.rows import Row
from polygrad_fast.errors import InputError

MODELS = {"residual_mlp": "residual MLP", "transformer": "transformer"}
PANELS_PER_ROW = 3


@dataclass(frozen=True)
class Line:
    """Milliseconds per trajectory over batch sizes or horizons."""

    machine: str
    denoiser: str
    engine: str
    dtype: str
    fixed: str  # what is the same at every point, in words
    points: dict[int, float]


@dataclass(frozen=True)
class SpeedFigure(Figure):
    """Times per trajectory, one panel per machine, both axes logarithmic."""

    lines: list[Line]
    x_label: str
    y_label: str

    def draw(self, picture) -> None:
        """Draw a colour for each engine and dtype."""
        from matplotlib.ticker import LogLocator, ScalarFormatter

        machines = list(dict.fromkeys(line.machine for line in self.lines))
        kinds = list(dict.fromkeys((line.engine, line.dtype) for line in self.lines))
        picture.set_size_inches(6.4 * len(machines), 4.4)
        panels = picture.subplots(1, len(machines), squeeze=False)[0]
        for axes, machine in zip(panels, machines, strict=True):
            own = [line for line in self.lines if line.machine == machine]
            for line in own:
                axes.plot(
                    list(line.points),
                    list(line.points.values()),
                    "--" if line.denoiser == "transformer" else "-",
                    color=f"C{kinds.index((line.engine, line.dtype))}",
                    marker="o",
                    markersize=4,
                    label=f"{MODELS.get(line.denoiser, line.denoiser)}, {line.engine} "
                    f"{line.dtype}, {line.fixed}",
                )
            axes.set(xscale="log", yscale="log")
            axes.set_title("\n".join(textwrap.wrap(machine, 60)))
            axes.set(xlabel=self.x_label, ylabel=self.y_label)
            ticks = sorted({x for line in own for x in line.points})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize="x-small", framealpha=0.85, edgecolor="none")


@dataclass(frozen=True)
class LearningFigure(Figure):
    """Returns during training, one panel per environment and preset, one color per world model, one
    line per seed."""

    # title -> world model -> seed -> [steps, returns]
    panels: dict[str, dict[str, dict[str, list[list[float]]]]]

    def draw(self, picture) -> None:
        """Draw thin lines of the seeds and their mean."""
        from matplotlib.ticker import EngFormatter

        columns = min(PANELS_PER_ROW, len(self.panels))
        rows = math.ceil(len(self.panels) / columns)
        picture.set_size_inches(2.7 * columns, 2.2 * rows)
        grid = picture.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(self.panels) :]:
            axes.remove()
        known = list(dict.fromkeys(model for models in self.panels.values() for model in models))
        for axes, (title, models) in zip(grid.flat, self.panels.items(), strict=False):
            for model, seeds in models.items():
                i = known.index(model)
                at_step: dict[float, list[float]] = {}
                for steps, returns in seeds.values():
                    axes.plot(steps, returns, color=f"C{i}", alpha=0.3, linewidth=1)
                    for step, value in zip(steps, returns, strict=True):
                        at_step.setdefault(step, []).append(value)
                means = {step: sum(at_step[step]) / len(at_step[step]) for step in sorted(at_step)}
                label = f"{model}, {len(seeds)} seeds" if len(seeds) > 1 else model
                axes.plot(
                    list(means), list(means.values()), color=f"C{i}", linewidth=2, label=label
                )
            axes.set_title(title, fontsize="medium")
            axes.legend(fontsize="x-small", framealpha=0.5, edgecolor="none", handlelength=1.2)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        picture.supxlabel("environment steps", fontsize="medium")
        picture.supylabel("return of an episode (thick: mean)", fontsize="medium")


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw every figure and return the files, .png each.

    - batch: time per trajectory against the batch size, at the shortest horizon of each network.
    - learning: returns during training of every environment and seed measured by
      benchmarks/quick_seeds.py; none where there is no such row.
    - chance: distances to the truth in worlds with chance (benchmarks/chance.py), likewise.
    - figure_4: time per trajectory against the horizon, at the largest batch that was measured at
      most horizons; as the paper's figure 4, seconds per 1000 trajectories against their length,
      for the two of its world models that are implemented here.

    Of each engine float32 and the fastest dtype are drawn; of the batch sizes, lines of at least
    two points where there are any.

    Raises:
        InputError: matplotlib is missing, `folder` is a file, or no row holds the time of a whole
            sample.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "plots need the extra 'plots': pip install 'polygrad-fast[plots]'"
        ) from error
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, wanted a folder for the plots")
    return [_draw(folder, figure) for figure in _figures(rows)]


def stale_plots(rows: Iterable[Row], folder: Path) -> list[str]:
    """Return the names of the pictures in a folder that are missing or of other rows.

    Raises:
        InputError: no row holds the time of a whole sample.
    """

    def digest(path: Path) -> str | None:
        found = re.search(rb"tEXtrows\0([0-9a-f]{64})", path.read_bytes())
        return found and found[1].decode()

    stale = []
    for figure in _figures(rows):
        path = folder / figure.name
        if not path.is_file() or digest(path) != figure.digest:
            stale.append(figure.name)
    return stale


def _figures(rows: Iterable[Row]) -> list[Figure]:
    """Return what is to be drawn."""
    rows = list(rows)
    samples = [
        row for row in rows if row.benchmark == "sample" and row.ms is not None and not row.smoke
    ]
    if not samples:
        raise InputError("no row holds the time of a whole sample (benchmark 'sample') to plot")
    try:
        steps = ", ".join(sorted({f"K = {row.case['steps']}" for row in samples}))
        by_batch = _lines(samples, "horizon", min, "batch")
        by_horizon = _lines(samples, "batch", _most_frequent, "horizon")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the plots cannot be made of these rows: {type(error).__name__} {error}"
        ) from error
    if any(len(line.points) > 1 for line in by_batch):
        by_batch = [line for line in by_batch if len(line.points) > 1]
    time = f"ms per trajectory ({steps})"
    panels: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for row in rows:
        if row.benchmark == "quick_seeds" and row.curves and not row.smoke:
            title = f"{row.case['env_id']}, {row.case['preset']}"
            seed = f"{row.case['seed']}, {row.machine}"
            models = panels.setdefault(title, {})
            model = row.case["world_model"].replace("_", " ")
            models.setdefault(model, {})[seed] = list(row.curves.values())
    chance = ChanceFigure.of("chance.png", rows)
    return [
        *([LearningFigure("learning.png", panels)] if panels else []),
        *([chance] if chance else []),
        SpeedFigure("batch.png", by_batch, "batch size B", time),
        SpeedFigure(
            "figure_4.png",
            by_horizon,
            "trajectory length H",
            f"seconds per 1000 trajectories\n= {time}",
        ),
    ]


def _most_frequent(values: list[int]) -> int:
    """Return the most frequent value, of several the largest."""
    return max(values, key=lambda value: (values.count(value), value))


def _lines(
    samples: list[Row], fixed: str, pick: Callable[[list[int]], int], along: str
) -> list[Line]:
    """Return the lines along one size, at the value of the other that `pick` picks from all
    rows'."""
    lines, seen = [], {}
    for row in samples:
        for size in (row.case[fixed], row.case[along]):
            if not isinstance(size, int):
                raise TypeError(f"{row.name} has the size {size!r}")
        key = (row.machine, row.case["denoiser"], row.case["engine"], row.dtype)
        seen.setdefault(key, []).append(row)
    for key, found in sorted(seen.items()):
        values = [row.case[fixed] for row in found]
        chosen = pick(values)
        points = {
            row.case[along]: row.us_per_item / 1e3 for row in found if row.case[fixed] == chosen
        }
        lines.append(Line(*key, f"{fixed[0].upper()} = {chosen}", dict(sorted(points.items()))))
    fastest = {}
    for line in lines:
        key = line.machine, line.denoiser, line.engine
        if key not in fastest or min(line.points.values()) < min(fastest[key].points.values()):
            fastest[key] = line
    return [line for line in lines if line.dtype == "float32" or line in fastest.values()]


def _draw(folder: Path, shown: Figure) -> Path:
    from matplotlib import figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = folder / shown.name
    picture = figure.Figure(dpi=75, layout="constrained")
    FigureCanvasAgg(picture)
    shown.draw(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, format="png", metadata={"rows": shown.digest})
    return path
