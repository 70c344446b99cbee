"""What this folder's tests would launch on a GPU, compiled without one; see `compile_tests.py`."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
# In two processes; each with the kernels that it launches.
TESTS = {
    "steps": (["test_guided_step.py", "test_residual_mlp.py", "test_refresh.py"], 4),
    "engine": (["test_triton_engine.py"], 4),
}


@pytest.fixture(scope="module")
def recorded(compiled_rows):
    """Of each process what it has recorded and the rows that it has compiled."""
    script = FOLDER / "compile_tests.py"
    lines = compiled_rows(
        {
            name: ["-O", script, "90", *(FOLDER / test for test in tests)]
            for name, (tests, _) in TESTS.items()
        }
    )
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
