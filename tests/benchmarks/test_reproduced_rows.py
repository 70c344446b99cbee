"""Rows and tables of what was reproduced."""

import importlib.util
import json
from pathlib import Path

import pytest

from harness import report
from harness.rows import read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "reproduced.py"
SIZES = {"agent_updates": 2000, "diffusion_updates": 3000, "lifetime": 500}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("reproduced_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, kind, number, inputs, result):
    path = folder / "results" / kind / f"{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"inputs": inputs, "result": result}))


@pytest.fixture
def folder(tmp_path):
    case = {"env_id": "Hopper-v5", "recipe": "medium", "agent": "td3_bc", "preset": "quick"}
    for number, (data, seed, returns) in enumerate(
        (("real", 0, [100.0, 300.0]), ("real", 1, [400.0]), ("guided", 0, [50.0]))
    ):
        inputs = case | {"data": data, "seed": seed} | SIZES
        write(tmp_path, "test", number, inputs, {"returns": returns, "score": 1.0})
    for number, (coefficient, mse) in enumerate(((0.0, 0.01), (1.0, None), (None, 0.5))):
        inputs = {"env_id": "Hopper-v5", "model_recipe": "medium", "target": "random"}
        inputs |= {
            "length": 16,
            "coefficient": coefficient,
            "seed": 0,
            "ensemble_updates": 70,
            "preset": "quick",
        }
        result = {"log_likelihood": -3.25, "mse": mse, "median": mse, "counted": 9}
        write(tmp_path, "trajectories", number, inputs, result)
    return tmp_path


def test_results_become_rows_and_tables(script, folder, capsys):
    file = folder / "pgd.jsonl"
    words = [str(folder), "--command", "polygrad-fast reproduce pgd-returns", "--commit", "c" * 40]
    assert script.main([*words, "--results", str(folder)]) == 0
    assert "6 rows in" in capsys.readouterr().out
    rows = read_rows(file)
    assert {row.commit for row in rows} == {"c" * 40}
    assert rows[0].case == {
        "env_id": "Hopper-v5", "recipe": "medium", "agent": "td3_bc", "data": "real", "seed": 0,
        "preset": "quick"
    }  # fmt: skip
    assert rows[0].values["mean_return"] == 200.0 and rows[0].values["std_return"] == 100.0
    assert rows[0].values["agent_updates"] == 2000
    returns = report.build("pgd_returns", rows)
    assert "| Hopper-v5 | medium | td3_bc | 2 | 300 (200 to 400); 62.4 | -; 57.4 " in returns
    assert "| 50; 63.1 | - |" in returns
    assert "agent updates 2000, diffusion updates 3000, lifetime 500." in returns
    measured = report.build("pgd_trajectories", rows)
    assert (
        "| environment | target policy | rows | seeds | lambda 0 | lambda 1 | ensemble |"
        in measured
    )
    assert "| Hopper-v5 | random | 16 | 1 | -3.25; 0.01 | -3.25; - | -3.25; 0.5 |" in measured
    assert "Models of medium;" in measured and "ensemble updates 70." in measured


def test_nothing_and_damage_are_named(script, folder, tmp_path, capsys):
    words = ["--command", "x", "--results", str(tmp_path / "rows")]
    for where, message in ((tmp_path / "gone", "must hold results"), (folder, "0.json is damaged")):
        (folder / "results" / "test" / "0.json").write_text("{")
        with pytest.raises(SystemExit) as stopped:
            script.main([str(where), *words])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


@pytest.fixture
def figures(tmp_path):
    """Two seeds of two models and of two trainings; "paper" is not finite."""
    for seed, error in enumerate((0.25, 0.75)):
        for model, steps in (("exact", 16), ("autoregressive", None), ("paper", 16)):
            inputs = {"env_id": "Hopper-v5", "model": model, "horizon": 10, "steps": steps}
            inputs |= {"seed": seed, "preset": "laptop", "model_updates": 70, "policy_file": True}
            name, finite = f"{model}-{seed}", model != "paper"
            numbers = {"mse": [error, 4 * error], "mean_mse": 2.5 * error, "ks": 0.01, "r2": 0.0}
            numbers |= {"mean_floor": 1e-9, "std": 1.0, "autocorrelation": 0.0}
            write(tmp_path, "errors", name, inputs, numbers if finite else {"mse": None})
            write(tmp_path, "seconds", name, inputs, {"seconds_per_1000": 2.0})
            actions = {"0.5": {"ks": 0.02, "r2": 0.1, "std": 1.0}, "0.1": None}
            write(tmp_path, "actions", name, inputs, actions)
        for algorithm, last in (("ppo", 100.0), ("ablation-no_clipping", 40.0)):
            inputs = {"env_id": "Hopper-v5", "algorithm": algorithm, "seed": seed}
            result = {"env_steps": [0, 500], "returns": [5.0, last + seed], "met_nan": None}
            write(tmp_path, "trainings/Hopper-v5", f"{algorithm}-{seed}", inputs, result)
    return tmp_path


def test_results_of_figures_become_rows_and_tables(script, figures, capsys):
    words = [str(figures), "--command", "polygrad-fast reproduce fig4", "--commit", "c" * 40]
    assert script.main([*words, "--results", str(figures)]) == 0
    assert "22 rows in" in capsys.readouterr().out  # 6 models, 6 at 2 deviations, 4 trainings
    rows = read_rows(figures / "figures.jsonl")
    models = report.build("reproduced_models", rows)
    assert (
        "| exact | 16 | 10 | 2 | 1.25 (0.625 to 1.875) | 2 (1 to 3) | 0.01 (0.01 to 0.01) |"
        in models
    )
    assert "| Hopper-v5 | autoregressive | - | 10 | 2 |" in models
    assert "| Hopper-v5 | paper | 16 | 10 | 2 | - | - | - |" in models
    assert "model updates 70" in models
    actions = report.build("reproduced_actions", rows)
    assert "| environment | model | steps | horizon | sigma 0.5 | sigma 0.1 |" in actions
    assert "| exact | 16 | 10 | 0.02 (0.02 to 0.02); 0.1 (0.1 to 0.1) | - |" in actions
    trainings = report.build("reproduced_trainings", rows)
    assert (
        "| ppo | 2 | 500 | 5 (5 to 5) | 100.5 (100 to 101) | 100.5 (100 to 101) | 0 |" in trainings
    )
    assert "| Hopper-v5 | ablation: no clipping | 2 |" in trainings
