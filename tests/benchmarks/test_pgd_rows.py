"""Rows and tables of policy-guided diffusion."""

import importlib.util
import json
from pathlib import Path

import pytest

from harness import report
from harness.rows import read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "pgd.py"
SIZES = {"agent_updates": 2000, "diffusion_updates": 3000, "lifetime": 500}


@pytest.fixture
def pgd():
    spec = importlib.util.spec_from_file_location("pgd_script", SCRIPT)
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


def test_results_become_rows_and_tables(pgd, folder, capsys):
    file = folder / "rows.jsonl"
    words = [str(folder), "--command", "polygrad-fast reproduce pgd-returns", "--commit", "c" * 40]
    assert pgd.main([*words, "--rows", str(file)]) == 0
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


def test_nothing_and_damage_are_named(pgd, folder, tmp_path, capsys):
    words = ["--command", "x", "--rows", str(tmp_path / "rows.jsonl")]
    for where, message in ((tmp_path / "gone", "must hold results"), (folder, "0.json is damaged")):
        (folder / "results" / "test" / "0.json").write_text("{")
        with pytest.raises(SystemExit) as stopped:
            pgd.main([str(where), *words])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
