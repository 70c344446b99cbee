"""The README's tables are those of the stored rows, and all of them are there."""

import re
from pathlib import Path

from polygrad_fast.benchmarking import figures, report
from polygrad_fast.benchmarking.rows import read_folder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ROWS = read_folder(ROOT / "benchmarks" / "results")


def test_tables_are_those_of_the_stored_rows():
    assert report.stale_tables(README, ROWS) == []
    shown = set(re.findall(r"<!-- table: (\w+) -->", README))
    on_gpu = any(row.device == "cuda" for row in ROWS)  # until then the kernels' plain twins only
    assert shown == set(report.TABLES) - (set() if on_gpu else {"kernels"})


def test_rows_name_machine_and_versions():
    assert len([row for row in ROWS if row.benchmark == "quick_seeds"]) >= 10
    for row in ROWS:
        assert row.processor and row.torch and row.commit and row.command and row.date
        assert not row.dirty, row.name
        assert row.status == "ok" and not row.smoke, f"{row.name}: {row.status}"


def test_pictures_are_those_of_the_stored_rows():
    assert figures.stale_plots(ROWS, ROOT / "benchmarks" / "results") == []
    for name in re.findall(r"!\[.*?\]\((benchmarks/.*?)\)", README):
        assert (ROOT / name).stat().st_size < 100_000
