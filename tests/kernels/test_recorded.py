"""What this folder's tests would launch on a GPU, compiled without one; see `compile_tests.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
# In two processes; each with the kernels that it launches.
TESTS = {
    "steps": (["test_guided_step.py", "test_residual_mlp.py"], 3),
    "engine": (["test_triton_engine.py"], 3),
}


@pytest.fixture(scope="module")
def recorded():
    """Of each process what it has recorded and the rows that it has compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-O", FOLDER / "compile_tests.py", "90", *(FOLDER / t for t in tests)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for name, (tests, _) in TESTS.items()
    }
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, outputs[name]
    lines = {
        name: [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for name, output in outputs.items()
    }
    return {name: (head, rows) for name, (head, *rows) in lines.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_every_launch_compiles_and_fits(recorded, name):
    head, rows = recorded[name]
    assert head["recorded"] > 100 and len(rows) > 20
    assert len({row["kernel"] for row in rows}) >= TESTS[name][1]
    for row in rows:
        assert "error" not in row, row
        assert row["shared"] <= 227 * 1024 and row["stack"] <= 128, row
