"""Figures drawn from a run's metrics.csv.

They need the extra `plots`; matplotlib is imported when a figure is drawn.
"""

import io
import math
from pathlib import Path

from polygrad_fast.errors import InputError


def plot_learning_curve(metrics_csv: Path, output_png: Path, title: str) -> None:
    """Plot the return against environment steps and write it to `output_png`.

    A line with a band of one standard deviation shows `eval/mean_reward` and `eval/std_reward`;
    points show `train/episode_return`. Uses matplotlib's Agg canvas directly: no display, no
    change to pyplot's state.

    Raises:
        InputError: matplotlib is missing, or `metrics_csv` is unreadable or has no finite
            `eval/mean_reward`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise InputError(
            "plots need the extra 'plots': pip install 'polygrad-fast[plots]'"
        ) from error
    from polygrad_fast.runs.files import write_bytes_atomic
    from polygrad_fast.runs.metrics import STEP_COLUMN, read_metrics

    rows = read_metrics(metrics_csv)
    evaluations = [row for row in rows if math.isfinite(row.get("eval/mean_reward", math.nan))]
    episodes = [row for row in rows if "train/episode_return" in row]
    if not evaluations:
        raise InputError(
            f"{metrics_csv} has {len(rows)} rows, none with a finite eval/mean_reward to plot"
        )
    steps = [row[STEP_COLUMN] for row in evaluations]
    mean = [row["eval/mean_reward"] for row in evaluations]
    std = [row.get("eval/std_reward", 0.0) for row in evaluations]

    figure = Figure(figsize=(7.0, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if episodes:
        axes.plot(
            [row[STEP_COLUMN] for row in episodes],
            [row["train/episode_return"] for row in episodes],
            linestyle="none",
            marker=".",
            markersize=2.5,
            color="0.6",
            label="training episodes",
        )
    axes.fill_between(
        steps,
        [m - s for m, s in zip(mean, std, strict=True)],
        [m + s for m, s in zip(mean, std, strict=True)],
        color="tab:blue",
        alpha=0.2,
        linewidth=0,
        label="evaluation, ± 1 standard deviation",
    )
    axes.plot(steps, mean, color="tab:blue", marker="o", markersize=3, label="evaluation, mean")
    axes.set_title(title)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.85, edgecolor="none", fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes_atomic(output_png, image.getvalue())
