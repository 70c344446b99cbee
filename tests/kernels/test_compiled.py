"""Every kernel at every shipped block size, compiled without a GPU: registers, shared memory,
spills and tensor-core instructions."""

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# (compute capability, kernels, instruction of the tensor cores, shared memory per program)
TARGETS = {
    80: (r"^(?!.*(W=(50|512)|paper|exact|bfloat16|input))", "mma", 163 * 1024),
    90: ("", "wgmma", 227 * 1024),
    100: (
        r"float16 (64x128x64|64x32x64|D=19 layers=2 rows=\d+( last)?( exact)?)$",
        "tcgen05",
        227 * 1024,
    ),
}
STEP_SPILLS = {80: 96, 90: 128, 100: 392}  # the sizes are chosen for sm_90
GEFORCE_SHARED = 99 * 1024  # sm_86, sm_89, sm_120; their code is that of sm_80


@pytest.fixture(scope="module")
def tables(compiled_rows):
    """Rows of every target."""
    return compiled_rows(
        {target: [SCRIPT, str(target), only] for target, (only, *_) in TARGETS.items()}
    )


def test_table(tables, capsys):
    """Print the table; it goes into the log of every run."""
    columns = [c for c in tables[80][0] if c != "kernel"]
    with capsys.disabled():
        print("\n" + f"{'kernel':46}" + "".join(f"{c:>10}" for c in columns))
        for rows in tables.values():
            for row in rows:
                print(f"{row['kernel']:46}" + "".join(f"{row[c]:>10}" for c in columns))
    assert len(tables[90]) > len(tables[80]) > 50 and len(tables[100]) >= 4


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory(tables, target):
    for row in tables[target]:
        assert row["shared"] <= TARGETS[target][2], row
        if target == 80:
            assert row["shared"] <= GEFORCE_SHARED, row


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(tables, target):
    """Nothing spills in layers of width 1024 or 2048, nor on sm_90 in the steps of a paper-sized
    sampler at full batch; at most eight words elsewhere, where ptxas trades them for a second
    program per multiprocessor. Rows of odd width, whose loads are element by element, spill up to
    128 bytes, other steps of 64 rows up to `STEP_SPILLS`."""
    for row in tables[target]:
        name, allowed = row["kernel"], 32
        if "W=50" in name:
            allowed = 128
        elif name.startswith("layer") and "W=512" not in name:
            allowed = 0
        elif "rows=64" in name:
            paper_sized = target == 90 and "D=19 layers=2" in name
            allowed = 0 if paper_sized else STEP_SPILLS[target]
        assert row["stack"] <= allowed, row


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_cores(tables, target):
    without = "initial_state", "generalized_advantages", "refresh"
    for row in tables[target]:
        name, instruction = row["kernel"], TARGETS[target][1]
        if name.startswith(without) or "float32" in name:
            assert row["wgmma"] == row["mma"] == row["tcgen05"] == 0, row
            continue
        if any(f"rows={rows}" in name for rows in (16, 32)):
            instruction = "mma"  # fewer rows than a warp group's instruction takes
        assert row[instruction] > 0, row


def test_loads_are_pipelined(tables):
    """But for half-precision rows of odd width: asynchronous copies take four bytes or more."""
    for rows in tables.values():
        for row in rows:
            name = row["kernel"]
            if name.startswith("layer") and not ("float16" in name and "W=50" in name):
                assert row["cp_async"] > 0, row


def test_tf32_operands_are_rounded(tables):
    """Tensor cores would cut their last bits off. The step's first layer is in tf32 in float16
    engines too."""
    for rows in tables.values():
        for row in rows:
            name = row["kernel"]
            rounds = "tf32" in name or ("guided_step float16" in name)
            assert (row["cvt_tf32"] > 0) == rounds, row


def test_advantages_stay_in_registers(tables):
    for target in (80, 90):
        rows = [r for r in tables[target] if r["kernel"].startswith("generalized_advantages")]
        assert len(rows) == 2
        assert all(r["stack"] == r["shared"] == 0 and r["registers"] <= 64 for r in rows)


def test_one_layer_policies_of_the_widest_states(tables):
    for target in (80, 90):
        rows = [row for row in tables[target] if "D=63 layers=1" in row["kernel"]]
        assert len(rows) == 5
        assert max(row["shared"] for row in rows) <= GEFORCE_SHARED
