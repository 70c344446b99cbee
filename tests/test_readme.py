"""The tables of both READMEs are those of the stored rows, and all of them are there."""

import re
from pathlib import Path

import pytest

from harness import figures, report
from harness.rows import read_folder

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("README.md", "benchmarks/README.md")
ROWS = read_folder(ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("path", PATHS)
def test_tables_are_those_of_the_stored_rows(path):
    assert report.stale_tables((ROOT / path).read_text(), ROWS) == []


def test_the_code_runs(tmp_path, monkeypatch):
    """Every block of Python, one after the other, with fewer steps and episodes."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        for size, smaller in (("5_000", "60"), ("=100)", "=2)"), ("1024", "8")):
            block = block.replace(size, smaller)
        exec(compile(block, "README.md", "exec"), names)
    assert names["batch"].observations.shape == (8, 5, 3)
    assert names["agent"].learn(30).num_timesteps == 30  # with an own denoiser
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_table_is_shown():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(report.TABLES)


def test_rows_name_machine_and_versions():
    assert len([row for row in ROWS if row.benchmark == "quick_seeds"]) >= 5
    for row in ROWS:
        assert row.processor and row.torch and row.commit and row.command and row.date
        assert not row.dirty, row.name
        assert row.status == "ok" and not row.smoke, f"{row.name}: {row.status}"


def test_seeds_have_episodes_of_their_own():
    """No two rows of a world model share an evaluation seed, and none is that of a training run."""
    seeds = [row for row in ROWS if row.benchmark == "quick_seeds"]
    for machine, model in {(row.machine, row.case["world_model"]) for row in seeds}:
        own = [row for row in seeds if (row.machine, row.case["world_model"]) == (machine, model)]
        assert len({row.values["evaluation_seed"] for row in own}) == len(own)
        assert {row.values["evaluation_seed"] for row in own}.isdisjoint(
            row.case["seed"] for row in own
        )


def test_pictures_are_those_of_the_stored_rows():
    assert figures.stale_plots(ROWS, ROOT / "benchmarks" / "results") == []
    for path in PATHS:
        folder = (ROOT / path).parent
        for name in re.findall(r"!\[.*?\]\((?!http)(.*?)\)", (ROOT / path).read_text()):
            assert (folder / name).is_file()


def test_pictures_are_small():
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        assert picture.stat().st_size < 100_000


def test_links_lead_to_files():
    for path in PATHS:
        folder = (ROOT / path).parent
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / path).read_text()):
            assert (folder / target).exists(), f"{path}: {target}"
