import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polygrad_fast.errors import InputError
from polygrad_fast.evaluation import plots
from polygrad_fast.evaluation.plots import plot_learning_curve, plot_offline_comparison
from polygrad_fast.runs.metrics import MetricsLog


def write_log(path: Path) -> Path:
    with MetricsLog(path) as log:
        for step in range(0, 10_000, 100):
            log.write(step, {"train/episode_return": (step * 7919) % 500})
            if step % 2000 == 0:
                log.write(step, {"eval/mean_reward": step / 20, "eval/std_reward": 30.0})
        log.write(10_000, {"eval/mean_reward": float("nan")})
    return path


def test_the_figure_is_a_png_with_content(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    log = write_log(tmp_path / "metrics.csv")
    plot_learning_curve(log, tmp_path / "plots" / "curve.png", "Hopper-v5, seed 0")
    pixels = image.imread(tmp_path / "plots" / "curve.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    assert len({tuple(pixel) for pixel in pixels[::4, ::4].reshape(-1, pixels.shape[-1])}) > 5


def test_what_is_drawn(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    plot_learning_curve(write_log(tmp_path / "metrics.csv"), tmp_path / "x.png", "A title")
    (axes,) = drawn[0].axes
    points, line = axes.lines
    assert axes.get_title() == "A title" and axes.get_xlabel() and axes.get_ylabel()
    assert list(line.get_xdata()) == [0, 2000, 4000, 6000, 8000]
    assert list(line.get_ydata()) == [0.0, 100.0, 200.0, 300.0, 400.0]
    assert len(points.get_xdata()) == 100
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(430.0)


def test_one_evaluation_without_spread_is_enough(tmp_path):
    pytest.importorskip("matplotlib")
    with MetricsLog(tmp_path / "metrics.csv") as log:
        log.write(100, {"eval/mean_reward": 1.0})
    plot_learning_curve(tmp_path / "metrics.csv", tmp_path / "curve.png", "one")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_nothing_to_plot(tmp_path):
    pytest.importorskip("matplotlib")
    with MetricsLog(tmp_path / "metrics.csv") as log:
        log.write(100, {"train/episode_return": 1.0})
    with pytest.raises(InputError, match="has 1 rows, none with a finite eval/mean_reward"):
        plot_learning_curve(tmp_path / "metrics.csv", tmp_path / "curve.png", "none")
    with pytest.raises(InputError, match="missing.csv"):
        plot_learning_curve(tmp_path / "missing.csv", tmp_path / "curve.png", "none")
    assert not (tmp_path / "curve.png").exists()


def test_what_is_drawn_of_dynamics_errors(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    rows = [
        {
            "step": t,
            "mse": 0.1 * t,
            "quartile_1": 0.05 * t,
            "median": 0.08 * t,
            "quartile_3": 0.2 * t,
            "floor_mse": 0.01,
        }
        for t in (1, 2, 3)
    ]
    nothing = dict.fromkeys(rows[0]) | {"step": 4}
    plots.plot_dynamics_errors([*rows, nothing], tmp_path / "x.png", "A title")
    plots.plot_dynamics_errors([row | {"floor_mse": 1e-9} for row in rows], tmp_path / "x.png", "")
    (axes,) = drawn[0].axes
    mean, median, floor = axes.lines
    assert axes.get_yscale() == "log" and axes.get_title() == "A title"
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.2, 0.3, np.nan])
    np.testing.assert_allclose(median.get_ydata(), [0.08, 0.16, 0.24, np.nan])
    np.testing.assert_allclose(floor.get_ydata(), [0.01, 0.01, 0.01, np.nan])
    assert list(mean.get_xdata()) == [1, 2, 3, 4]
    (axes,) = drawn[1].axes  # a floor far below is told, not drawn
    assert len(axes.lines[2].get_ydata()) == 0
    assert axes.lines[2].get_label() == "the simulator's own: below 1e-09"


def test_what_is_drawn_of_standardized_actions(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    values = np.array([-9.0, 0.1, 0.1, 2.0])
    plots.plot_standardized_actions([("one", values)] * 4, tmp_path / "x.png", "A title")
    assert len(drawn[0].axes) == 4 and drawn[0].get_suptitle() == "A title"
    axes = drawn[0].axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    width = axes.patches[0].get_width()
    assert np.sum(heights) * width == pytest.approx(1.0)
    assert heights[0] * width == pytest.approx(0.25)  # beyond the axis, shown at its end
    assert max(axes.lines[0].get_ydata()) == pytest.approx(0.39894, abs=1e-4)


def test_what_is_drawn_of_observations(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    imagined = np.arange(90.0).reshape(3, 30)
    plots.plot_observations(imagined, imagined + 1, (2, 3), tmp_path / "x.png", "A title")
    assert len(drawn[0].axes) == 24
    real, dreamt = drawn[0].axes[5].lines
    assert list(real.get_ydata()) == [6, 36, 66] and list(dreamt.get_ydata()) == [5, 35]
    assert (real.get_label(), dreamt.get_label()) == ("simulated", "imagined")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"polygrad-fast\[plots\]"):
        plot_learning_curve(tmp_path / "metrics.csv", tmp_path / "curve.png", "none")


def test_importing_does_not_import_matplotlib():
    root = Path(plots.__file__).parents[2]
    script = "import sys, polygrad_fast.evaluation.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)


def test_runs_that_count_updates(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    with MetricsLog(tmp_path / "metrics.csv", step_column="update") as log:
        log.write(3, {"eval/mean_reward": 1.0})
    plot_learning_curve(tmp_path / "metrics.csv", tmp_path / "x.png", "")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "updates" and list(axes.lines[0].get_xdata()) == [3]
    write_log(tmp_path / "steps.csv")
    plot_learning_curve(tmp_path / "steps.csv", tmp_path / "x.png", "")
    assert drawn[1].axes[0].get_xlabel() == "environment steps"


def test_what_a_comparison_shows(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    curves = {"real": ([0, 10], [1.0, 2.0]), "guided": ([0, 10], [3.0, 4.0])}
    returns = {"real": [1.0, 3.0], "guided": [4.0], "dataset": [-1.0, -2.0]}
    plot_offline_comparison(curves, returns, tmp_path / "x.png", "A title")
    (axes,) = drawn[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["real data", "guided data", "dataset, mean"]
    data = {line.get_label(): line for line in axes.lines}
    assert list(data["guided data"].get_ydata()) == [3.0, 4.0]
    assert list(data["dataset, mean"].get_ydata()) == [-1.5, -1.5]
    means = [list(bar.lines[0].get_ydata()) for bar in axes.containers]
    ends = [[cap.get_ydata()[0] for cap in bar.lines[1]] for bar in axes.containers]
    assert means == [[2.0], [4.0]] and ends == [[1.0, 3.0], [4.0, 4.0]]


def test_curves_of_several_runs(tmp_path, monkeypatch):
    """Mean, lowest and highest of the runs that were evaluated at a step."""
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure_class, "savefig", lambda self, *a, **k: drawn.append(self))
    curves = ({0: 1.0, 100: 5.0}, {0: 3.0, 100: 9.0, 200: 2.0}, {0: 2.0, 100: float("nan")}, {})
    logs = [tmp_path / f"{i}.csv" for i in range(len(curves))]
    for path, curve in zip(logs, curves, strict=True):
        with MetricsLog(path) as log:
            for step, value in curve.items():
                log.write(step, {"eval/mean_reward": value})
    plots.plot_learning_curves(logs, tmp_path / "x.png", "A title")
    (axes,) = drawn[0].axes
    *runs, mean = axes.lines
    assert [list(line.get_ydata()) for line in runs] == [[1.0, 5.0], [3.0, 9.0, 2.0], [2.0]]
    assert list(mean.get_xdata()) == [0, 100, 200]
    assert list(mean.get_ydata()) == [2.0, 7.0, 2.0]
    corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices}
    assert {(0, 1.0), (0, 3.0), (100, 5.0), (100, 9.0), (200, 2.0)} <= corners
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["lowest to highest", "mean of 3 runs"]
    with pytest.raises(InputError, match="2 runs have no finite eval/mean_reward"):
        plots.plot_learning_curves([logs[3]] * 2, tmp_path / "x.png", "A title")
