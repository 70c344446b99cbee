"""The list of wrong edits fits the code, and the stored table is that of the list, all caught."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "mutations.py")
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)
MUTANTS = mutations.read_mutants()
ADVICE = "run `python tests/mutations.py --write`, with `--only NAME` for some"


def has_test(test: str) -> bool:
    """Whether a file, or file::function with or without parameters, is in the tree."""
    file, _, function = test.partition("::")
    path = ROOT / file
    name = function.partition("[")[0]
    return path.is_file() and (not name or f"\ndef {name}(" in path.read_text())


def test_every_edit_fits_its_file_and_names_tests_that_are_there():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        edited = mutations.mutated(text, mutant)  # raises unless the old text occurs once
        assert edited != text, mutant.name
        assert len(edited.splitlines()) == len(text.splitlines()), f"{mutant.name}: not one line"
        compile(edited, mutant.file, "exec")
        assert mutant.tests and all(map(has_test, mutant.tests)), mutant.name


def test_the_stored_table_is_that_of_the_list_and_all_are_caught():
    heading, *rows = mutations.read_rows(mutations.TABLE).items()
    assert [name for name, _ in rows] == [mutant.name for mutant in MUTANTS], ADVICE
    for (_, row), mutant in zip(rows, MUTANTS, strict=True):
        start = mutations.table_start(mutant)
        assert row.startswith(start), f"{mutant.name}: {ADVICE}"
        caught = re.fullmatch(r" (\S+::.+) \| (\d+) \|", row.removeprefix(start))
        assert caught, f"{mutant.name} is not caught: {row}"
        assert has_test(caught[1]), f"{mutant.name}: {caught[1]} is gone; {ADVICE}"
        assert int(caught[2]) < mutations.SECONDS, mutant.name
        assert any(caught[1].startswith(test) for test in mutant.tests), mutant.name


@pytest.mark.parametrize("text", ["a", "b b"])
def test_an_edit_that_does_not_fit_is_refused(text):
    mutant = mutations.Mutant("x", "", "f.py", "b", "c", [])
    assert mutations.mutated("a b", mutant) == "a c"
    with pytest.raises(ValueError, match=f"occurs {text.count('b')} times in f.py"):
        mutations.mutated(text, mutant)
