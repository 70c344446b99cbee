"""Every kernel at every shipped block size, compiled without a GPU: registers, shared memory,
spills and tensor-core instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# (compute capability, kernels, instruction of the tensor cores, shared memory per program)
TARGETS = {
    80: ("", "mma", 163 * 1024),
    90: ("", "wgmma", 227 * 1024),
    100: (r"float16 (64x128|64x32|D=19 layers=2)", "tcgen05", 227 * 1024),
}
GEFORCE_SHARED = 99 * 1024  # sm_86, sm_89, sm_120; their code is that of sm_80


@pytest.fixture(scope="module")
def tables():
    """Rows of every target; one process each, for the interpreter is on in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {
        target: subprocess.Popen(
            [sys.executable, SCRIPT, str(target), only],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for target, (only, *_) in TARGETS.items()
    }
    rows = {}
    for target, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0
        rows[target] = [json.loads(line) for line in output.splitlines()]
    return rows


def test_table(tables, capsys):
    """Print the table; it goes into the log of every run."""
    columns = [c for c in tables[80][0] if c != "kernel"]
    with capsys.disabled():
        print("\n" + f"{'kernel':46}" + "".join(f"{c:>10}" for c in columns))
        for rows in tables.values():
            for row in rows:
                print(f"{row['kernel']:46}" + "".join(f"{row[c]:>10}" for c in columns))
    assert len(tables[80]) == len(tables[90]) > 50 and len(tables[100]) >= 4


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory(tables, target):
    for row in tables[target]:
        assert row["shared"] <= TARGETS[target][2], row
        if target == 80:
            assert row["shared"] <= GEFORCE_SHARED, row


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(tables, target):
    """Nothing spills in the layers, nor in the steps of a paper-sized sampler at full batch; at
    most eight words elsewhere, where ptxas trades them for a second program per multiprocessor."""
    for row in tables[target]:
        name = row["kernel"]
        paper_sized = name.startswith("layer") or ("D=19 layers=2 rows=64" in name)
        assert row["stack"] <= (0 if paper_sized else 32), row


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_cores(tables, target):
    for row in tables[target]:
        name, instruction = row["kernel"], TARGETS[target][1]
        if name.startswith("initial_state") or "float32" in name:
            assert row["wgmma"] == row["mma"] == row["tcgen05"] == 0, row
            continue
        if any(f"rows={rows}" in name for rows in (16, 32)):
            instruction = "mma"  # fewer rows than a warp group's instruction takes
        assert row[instruction] > 0, row


def test_loads_are_pipelined(tables):
    for rows in tables.values():
        for row in rows:
            if row["kernel"].startswith("layer"):
                assert row["cp_async"] > 0, row
