"""The page of differences names options that exist."""

import dataclasses
import fnmatch
import re
from pathlib import Path

import polygrad_fast as pg
from polygrad_fast import compat

PAGE = (Path(compat.__file__).parent / "README.md").read_text().split("## Every difference")[1]


def options(config, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        names += options(value, f"{prefix}{field.name}.") if inner else [f"{prefix}{field.name}"]
    return names


def test_options_that_choose_between_columns_exist():
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
    differences = [row for row in rows if len(row) == 5]
    assert len(differences) > 60
    named = [name for row in differences for name in re.findall(r"\(`([\w.*]+)[`=]", row[1])]
    assert len(named) > 25
    known = options(pg.TrainConfig())
    for name in named:
        assert any(fnmatch.fnmatch(f".{option}", f"*.{name}") for option in known), name


def test_rows_are_complete():
    for line in PAGE.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (6, 7) and line.endswith("|"), line
