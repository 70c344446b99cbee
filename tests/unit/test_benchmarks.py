"""The benchmarks and the GPU check run without a GPU as far as they can; a wrong result carries no
time."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from polygrad_fast.benchmarking.rows import read_rows

ROOT = Path(__file__).parents[2]
GPU_CHECK = ROOT / "benchmarks" / "gpu_check.sh"
ENVIRONMENT = {
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which these processes are not
    **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(sys.path),
    "TRITON_INTERPRET": "1",  # the kernels too, where there is triton
}
SAMPLER = "benchmarks/bench_sampler.py"


def command(*arguments) -> list[str]:
    words = ["--device", "cpu", "--smoke", "--benchmark-only", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *map(str, arguments), *words]


def run(*arguments, plugin: Path | None = None) -> subprocess.CompletedProcess:
    """Run pytest over the tiny sizes on the CPU; `plugin` is a file to load first."""
    environment = dict(ENVIRONMENT)
    if plugin is not None:
        environment["PYTHONPATH"] += os.pathsep + str(plugin.parent)
        arguments = (*arguments, "-p", plugin.stem)
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_all_benchmarks_in_tiny_sizes(tmp_path):
    result = run("benchmarks/", "--rows", tmp_path / "rows.jsonl", "--commit", "abc-dirty")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row.benchmark for row in rows} == {
        "sample", "sampler step", "guided_step", "residual_mlp layer", "denoiser update",
        "A2C update", "whole update", "environment step", "dynamics replay", "replay windows",
    }  # fmt: skip
    sampled = {
        (row.case["engine"], row.case["denoiser"], row.dtype)
        for row in rows
        if row.benchmark == "sample"
    }
    assert sampled == {
        (engine, denoiser, dtype)
        for denoiser in ("residual_mlp", "transformer")
        for engine, dtype in (
            ("reference", "float32"), ("torch", "float32"), ("torch", "bfloat16")
        )
    }  # fmt: skip
    for row in rows:
        assert row.status == "ok" and row.checks and all(check.passed for check in row.checks)
        assert 0 < row.ms_min <= row.ms <= row.ms_max and row.us_per_item > 0
        assert (row.commit, row.dirty, row.device, row.threads) == ("abc", True, "cpu", 1)
        assert row.clock == "processor time" and row.torch and row.processor
        assert "--smoke" in row.command and row.command.startswith("OMP_NUM_THREADS=1 pytest ")
    for row in rows:
        if row.benchmark not in ("environment step", "dynamics replay", "replay windows"):
            assert row.flops > 0 and row.bytes > 0
            assert row.tflops > 0 and row.gb_per_s > 0 and row.share_of_floor > 0
    assert len(os.listdir(tmp_path)) == 1
    assert "sample engine=torch denoiser=transformer batch=5" in result.stdout


BROKEN = '''
"""Break engines: one a little, one into NaN, one in its own noise only; one raises."""
from polygrad_fast.benchmarking import sampler_case

make_engine = sampler_case.make_engine


def broken(name, components, dtype):
    if name == "reference":
        raise RuntimeError("launch failed")
    engine = make_engine(name, components, dtype)
    sample, transformer = engine.sample, not hasattr(components.denoiser, "proj")

    def changed(s0, guidance_scale, generator, noise, return_chain):
        x, u, chain = sample(s0, guidance_scale, generator, noise, return_chain)
        for states, actions in [*zip(*(chain or ((), ())), strict=True), (x, u)]:
            if transformer:
                actions.mul_(2 if noise is None else 1)
            elif dtype == "float32":
                states[-1, -1, 0] += 1e-3
            else:
                actions[0, 0, 0] = float("nan")
        return x, u, chain

    engine.sample = changed
    return engine


sampler_case.make_engine = broken
'''


def test_a_wrong_result_carries_no_time_and_stops_nothing(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    rows = tmp_path / "rows.jsonl"
    result = run(SAMPLER, "--rows", rows, plugin=tmp_path / "broken.py")
    assert result.returncode == 1
    found = {(row.case["engine"], row.case["denoiser"], row.dtype): row for row in read_rows(rows)}
    assert len(found) == 6
    assert all(row.ms is None and row.tflops is None for row in found.values())
    little = found["torch", "residual_mlp", "float32"]
    assert little.status == "wrong" and 1e-4 < little.checks[0].value < 1e-2
    nan = found["torch", "residual_mlp", "bfloat16"]
    assert nan.status == "wrong" and nan.checks[0].value is None
    noise = found["torch", "transformer", "float32"]
    assert noise.status == "wrong" and noise.checks[0].passed and not noise.checks[1].passed
    raised = found["reference", "transformer", "float32"]
    assert raised.status == "error" and "launch failed" in raised.error
    assert result.stdout.count("FAILED") == 6


LOST = '''
"""The device is lost after the second case of the first process."""
from pathlib import Path

from polygrad_fast.benchmarking.session import Session


def is_lost(self):
    flag = Path(__file__).with_name("lost")
    if len(self.rows.added) < 2 or flag.exists():
        return False
    flag.touch()
    return True


Session.is_lost = is_lost
'''


def test_after_a_lost_device_a_new_process_goes_on(tmp_path):
    """The loop of the GPU check around the benchmarks."""
    (tmp_path / "lost.py").write_text(LOST)
    rows = tmp_path / "rows.jsonl"
    (loop,) = re.findall(r"^begin_again='(.*?)'$", GPU_CHECK.read_text(), re.DOTALL | re.MULTILINE)
    words = command(SAMPLER, "--rows", rows, "--resume", "--commit", "abc", "-p", "lost")
    result = subprocess.run(
        ["bash", "-c", loop, "loop", "100", *words],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("the device is lost for this process") == 1
    assert "2 cases not measured: its row is stored" in result.stdout
    stored = read_rows(rows)
    assert len(stored) == 6 and all(row.status == "ok" for row in stored)
    budgets = [float(row.command.rsplit(" ", 1)[1]) for row in stored]
    assert budgets[0] == budgets[1] == 100 > budgets[2] > 50


def test_time_budget(tmp_path):
    rows = tmp_path / "rows.jsonl"
    result = run(SAMPLER, "--rows", rows, "--time-budget", 0)
    assert result.returncode == 0 and not rows.exists()
    assert "6 cases not measured: the time budget of 0 s is spent" in result.stdout


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = run(SAMPLER, "--rows", tmp_path / "rows.jsonl")
    assert result.returncode == 4
    assert re.fullmatch(r"ERROR: .*rows.jsonl, line 1: the row lacks .*\s*", result.stderr)


@dataclass(frozen=True)
class OnGPU:
    device = torch.device("cuda")
    smoke = False


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_order_of_cases_on_a_gpu():
    bench = load("bench_sampler")
    cases = sorted(bench.list_cases(OnGPU()), key=lambda pair: pair[0])
    words = ["{engine} {dtype} {denoiser} B={batch} H={horizon}".format(**c) for _, c in cases]
    assert len(words) == len(set(words)) == 12 * (13 + 9)
    assert words[:3] == [
        "triton float16 residual_mlp B=1024 H=10",
        "torch float16 residual_mlp B=1024 H=10",
        "reference float32 residual_mlp B=1024 H=10",
    ]
    controls = [word for word in words if word.startswith("compile")]
    assert controls[0] == "compile float16 residual_mlp B=1024 H=10"
    assert words.index(controls[0]) < 20 < 60 < words.index(controls[1])


def test_gpu_check_is_a_script_whose_parts_exist():
    text = GPU_CHECK.read_text()
    subprocess.run(["bash", "-n", GPU_CHECK], check=True)
    paths = set(re.findall(r"\b(?:tests|benchmarks|kernels)/[\w/]+\.(?:py|sh)", text))
    assert {"benchmarks/profile_sampler.py", "tests/train/test_gpu_training.py"} <= paths
    for path in paths:
        assert (ROOT / path).is_file(), path
    (selected,) = re.findall(r'-k "([\w ]+)"', text)
    kernels = ROOT / "tests" / "kernels"
    tests = (kernels / "test_guided_step.py").read_text()
    tests += (kernels / "test_residual_mlp.py").read_text()
    for name in selected.split(" or "):
        assert f"def test_{name}(" in tests
    offered = (ROOT / "benchmarks" / "conftest.py").read_text()
    for option in ("rows", "resume", "time-budget", "commit", "tests"):
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
