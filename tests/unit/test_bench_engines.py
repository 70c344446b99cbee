"""The engines' benchmark and the GPU check run without a GPU as far as they can; a wrong result
carries no time."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPU_CHECK = ROOT / "benchmarks" / "gpu_check.sh"
TIMES = {"ms_median", "ms_min", "ms_max", "us_per_trajectory", "tflops", "share_of_floor"}


def load_bench():
    path = ROOT / "benchmarks" / "bench_engines.py"
    spec = importlib.util.spec_from_file_location("bench_engines", path)
    module = sys.modules["bench_engines"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load_bench()


@pytest.fixture(autouse=True)
def one_call(monkeypatch):
    monkeypatch.setattr(bench, "MEASURE_SECONDS", 0.0)


def run(folder, *options):
    """Run the command line on the CPU; return its exit code and the stored rows."""
    code = bench.main([str(folder), "--smoke", "--device", "cpu", *options])

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    path = folder / "engines.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return code, [json.loads(line, parse_constant=refuse) for line in lines]


def test_smoke(tmp_path, capsys):
    code, rows = run(tmp_path)
    assert code == 0
    cases = {(row["engine"], row["dtype"]) for row in rows}
    assert cases == {("reference", "float32"), ("torch", "float32"), ("torch", "bfloat16")}
    for row in rows:
        assert row["status"] == "ok"
        assert 0 <= row["step_error"] <= row["step_error_allowed"] < 0.1
        assert 0 <= row["moment_score"] <= row["moment_score_allowed"]
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert row["tflops"] > 0 and row["calls"] == bench.MIN_CALLS
        assert row["torch"] and row["device"] == "cpu" and row["gpu"] is None
        assert {"driver", "triton", "commit", "dirty", "tests", "num_steps"} <= set(row)
    assert os.listdir(tmp_path) == ["engines.jsonl"]
    table = capsys.readouterr().out.splitlines()
    bench.main([str(tmp_path), "--table"])
    assert capsys.readouterr().out.splitlines() == table[-4:]


def engine_with(change):
    """Return an engine class whose results are changed by `change(states, actions, noise)`."""

    class Changed(bench.TorchEngine):
        def sample(self, s0, guidance_scale, generator, noise, return_chain):
            x, u, chain = super().sample(s0, guidance_scale, generator, noise, return_chain)
            if chain:
                for states, actions in zip(*chain, strict=True):
                    change(states, actions, noise)
            change(x, u, noise)
            return x, u, chain

    return Changed


def off_by_a_little(states, actions, noise):
    states[-1, -1, 0] += 1e-3


def not_a_number(states, actions, noise):
    actions[0, 0, 0] = torch.nan


def wrong_own_noise(states, actions, noise):
    if noise is None:
        actions.mul_(2)


@pytest.mark.parametrize("change", [off_by_a_little, not_a_number, wrong_own_noise])
def test_a_wrong_result_carries_no_time(tmp_path, monkeypatch, capsys, change):
    monkeypatch.setattr(bench, "TorchEngine", engine_with(change))
    code, rows = run(tmp_path, "--engines", "torch", "--dtypes", "float32")
    assert code == 1
    (row,) = rows
    assert row["status"] == "wrong" and not TIMES & set(row)
    if change is wrong_own_noise:
        assert row["step_error"] <= row["step_error_allowed"]
        assert row["moment_score"] > row["moment_score_allowed"]
    else:
        assert row["step_error"] is None or row["step_error"] > row["step_error_allowed"]
    assert re.search(r"float32 +5 +3 +- +- +- .* wrong", capsys.readouterr().out)


def test_a_failing_case_does_not_stop_the_next(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(bench, "TorchEngine", fail)
    code, rows = run(tmp_path, "--engines", "torch", "compile", "reference")
    assert code == 1
    status = {(row["engine"], row["status"]) for row in rows}
    assert ("torch", "error") in status and ("reference", "ok") in status
    assert ("compile", "not offered") in status  # it needs a GPU
    assert all(not TIMES & set(row) for row in rows if row["status"] != "ok")
    assert any("launch failed" in row.get("error", "") for row in rows)


def test_time_budget(tmp_path, capsys):
    code, rows = run(tmp_path, "--time-budget", "0")
    assert code == 0 and rows == []
    assert "reference float32 B=5 H=3 and what follows is not measured" in capsys.readouterr().out


def test_a_lost_device_starts_anew(tmp_path, monkeypatch):
    """After a sticky error a fresh process goes on with the next case."""
    started = []

    def execute(program, arguments):
        started.append(arguments)
        raise SystemExit

    monkeypatch.setattr(bench.Bench, "is_lost", lambda self: True)
    monkeypatch.setattr(bench.os, "execv", execute)
    with pytest.raises(SystemExit):
        run(tmp_path, "--time-budget", "100")
    (arguments,) = started
    assert arguments[0] == sys.executable and "--resume" in arguments
    assert 0 < float(arguments[-1]) < 100
    monkeypatch.undo()
    monkeypatch.setattr(bench, "MEASURE_SECONDS", 0.0)
    first = (tmp_path / "engines.jsonl").read_text()
    code, rows = run(tmp_path, "--resume")
    assert code == 0 and len(rows) == 3
    assert (tmp_path / "engines.jsonl").read_text().startswith(first)


def test_order_of_cases():
    cases = bench.list_cases(bench.Sizes(), list(bench.ENGINES), list(bench.DTYPES))
    assert len(cases) == len(set(cases)) == 12 * 13
    assert [str(case) for case in cases[:3]] == [
        "triton float16 B=1024 H=10",
        "torch float16 B=1024 H=10",
        "reference float32 B=1024 H=10",
    ]
    assert {case.horizon for case in cases[:12]} == {10}
    controls = [case for case in cases if case.engine == "compile"]
    assert cases.index(controls[0]) < 20 < 60 < cases.index(controls[1])
    assert str(controls[0]) == "compile float16 B=1024 H=10"


def test_flops_of_the_paper():
    """6.74 M multiply-adds per trajectory and step in the denoiser, 71 k per row in the policy."""
    c = bench.build(bench.Sizes(), 10, torch.device("cpu"))
    denoiser, policy = 250 * 1024 + 6 * 1024**2 + 1024 * 190, 17 * 256 + 256**2 + 256 * 6
    assert bench.flops(c, 1024) == 2 * 1024 * 128 * (denoiser + 10 * policy)
    assert bench.flops(c, 1024) / bench.PEAK_TFLOPS["H200"]["float16"] / 1e9 == pytest.approx(
        2.47, abs=0.01
    )


@pytest.mark.parametrize("options", [["--batches", "0"], ["--engines", "cuda"], ["--dtypes", "x"]])
def test_bad_options(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, *options)
    assert exit.value.code == 2 and options[-1] in capsys.readouterr().err


def test_no_case_left(tmp_path):
    with pytest.raises(SystemExit, match="reference.*float16"):
        run(tmp_path, "--engines", "reference", "--dtypes", "float16")


def test_gpu_check_is_a_script_whose_parts_exist():
    text = GPU_CHECK.read_text()
    subprocess.run(["bash", "-n", GPU_CHECK], check=True)
    paths = set(re.findall(r"\b(?:tests|benchmarks|kernels)/[\w/]+\.(?:py|sh)", text))
    assert {"benchmarks/bench_engines.py", "tests/train/test_gpu_training.py"} <= paths
    for path in paths:
        assert (ROOT / path).is_file(), path
    (selected,) = re.findall(r'-k "([\w ]+)"', text)
    kernels = ROOT / "tests" / "kernels"
    tests = (kernels / "test_guided_step.py").read_text()
    tests += (kernels / "test_residual_mlp.py").read_text()
    for name in selected.split(" or "):
        assert f"def test_{name}(" in tests
    offered = (ROOT / "benchmarks" / "bench_engines.py").read_text()
    for option in ("smoke", "run-once", "table", "kernel-times", "time-budget", "commit", "tests"):
        assert f" --{option}" in text and f'"--{option}"' in offered


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_gpu_check_says_what_is_missing(tmp_path):
    result = subprocess.run(
        ["bash", GPU_CHECK, tmp_path / "out"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "no CUDA GPU" in result.stdout or "missing packages: triton" in result.stdout
    assert os.listdir(tmp_path / "out") == ["summary.txt"]
    usage = subprocess.run(["bash", GPU_CHECK], capture_output=True, text=True)
    assert usage.returncode == 2 and "OUT_DIR" in usage.stderr
