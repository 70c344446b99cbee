"""The README's tables are those of the stored rows."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_tables():
    spec = importlib.util.spec_from_file_location(
        "readme_tables", ROOT / "benchmarks" / "readme_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables_match_the_stored_rows():
    text = (ROOT / "README.md").read_text()
    assert load_tables().render(text) == text


def test_rows_name_machine_and_versions():
    rows = json.loads((ROOT / "benchmarks" / "results" / "quick_seeds.json").read_text())
    assert len(rows) >= 10
    for row in rows:
        assert row["processor"] and row["torch"] and row["gymnasium"] and row["git_commit"]
        assert "dirty" not in row["git_commit"]
