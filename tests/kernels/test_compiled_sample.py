"""What a paper-sized sample of engine "triton" needs of an H200, compiled without one: registers,
spills, shared memory, programs per multiprocessor, waves, launches per step, kernels per sample."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_sample.py")
NUM_STEPS, LAYERS = 128, 6
# (kernel, batch, dtype): programs of one multiprocessor at least, waves at most
BUDGETS = {
    ("refresh", 1024, "float16"): (2, 8),
    ("refresh", 1024, "tf32"): (2, 8),
    ("refresh", 16384, "float16"): (2, 8),
    ("initial_state", 1024, "float16"): (16, 1),
    ("residual_mlp_layer", 1024, "float16"): (2, 1),
    ("guided_step", 1024, "float16"): (2, 1),
    ("initial_state", 1024, "tf32"): (16, 1),
    ("residual_mlp_layer", 1024, "tf32"): (2, 1),
    ("guided_step", 1024, "tf32"): (1, 2),
    ("initial_state", 16384, "float16"): (16, 5),
    ("residual_mlp_layer", 16384, "float16"): (1, 8),
    ("guided_step", 16384, "float16"): (2, 10),
}


@pytest.fixture(scope="module")
def rows(compiled_rows):
    return compiled_rows({"sample": [SCRIPT, "90"]})["sample"]


def test_table(rows, capsys):
    """Print the table; it goes into the log of every run."""
    columns = [c for c in rows[0] if c not in ("tcgen05", "checked_in_vain")]
    with capsys.disabled():
        print("\n" + "".join(f"{c:>20}" if c == "kernel" else f"{c:>10}" for c in columns))
        for row in rows:
            print("".join(f"{row[c]:>20}" if c == "kernel" else f"{row[c]:>10}" for c in columns))


def test_no_kernel_spills(rows):
    """But for the refresh, compiled by triton 3.6; it runs once a sample."""
    for row in rows:
        allowed = 32 if row["kernel"] == "refresh" else 0
        assert row["stack"] <= allowed and row["shared"] <= 227 * 1024, row


def test_waves(rows):
    seen = set()
    for row in rows:
        case = row["kernel"], row["batch"], row["dtype"]
        programs, waves = BUDGETS[case]
        assert row["programs"] >= programs and row["waves"] <= waves, row
        seen.add(case)
    assert seen == set(BUDGETS)


def test_launches_and_kernels(rows):
    """A diffusion step launches its layers and the guided step; a sample has seven kernels: the
    refresh, the start, first, hidden and last layer, the guided step and that of the last diffusion
    step."""
    for batch, dtype in {(row["batch"], row["dtype"]) for row in rows}:
        own = [row for row in rows if (row["batch"], row["dtype"]) == (batch, dtype)]
        assert len(own) == 7
        assert sum(row["launches"] for row in own) == 2 + 1 + NUM_STEPS * (LAYERS + 3)


def test_the_check_of_the_device_compiles_nothing_in_vain(rows):
    for row in rows:
        if row["batch"] == 1024:
            assert row["checked_in_vain"] == 0, row
