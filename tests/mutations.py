"""Apply one wrong edit at a time to a copy of the tree and check that a test notices.

    python tests/mutations.py [--only NAME ...] [--jobs 2] [--write tests/mutations.md]

Not part of the ordinary test run: it takes some minutes. `mutations.toml` lists the edits
("mutants") with the tests that must notice each, in under a minute; `mutations.md` is the stored
table of the last full run. Those tests must first pass on an unchanged copy. The working tree is
never edited, and a mutant counts as caught only if a test fails (not if one cannot be imported)
in a process that has loaded the package from the copy and from nowhere else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("polygrad_fast", "kernels", "tests", "pyproject.toml")
SECONDS = 60
"""Time a mutant's tests have to fail, imports included."""
INSIDE = "--inside"
"""First argument of the process that runs tests in a copy, started as the copy's own file."""
NOT_THE_COPY = 90
"""Its exit status if the package is not loaded from the copy."""


class Mutant(NamedTuple):
    """A wrong edit of one line, and the tests that must notice it."""

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: list[str]


class Result(NamedTuple):
    """The test that failed first, or why none did."""

    caught_by: str
    problem: str
    seconds: float


def read_mutants(path: Path = ROOT / "tests" / "mutations.toml") -> list[Mutant]:
    """Return the list; TypeError where an entry lacks a field or has one too many."""
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]


def mutated(text: str, mutant: Mutant) -> str:
    """Return a file's text with the mutant's edit.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}, wanted once"
        )
    return text.replace(mutant.old, mutant.new)


def table_start(mutant: Mutant) -> str:
    """Return the mutant's row of the table up to what running it adds."""
    edit = f"`{mutant.old.strip()}` → `{mutant.new.strip()}`".replace("|", "\\|")
    return f"| {mutant.name} | {mutant.breaks} | `{mutant.file}`: {edit} |"


def table(results: list[tuple[Mutant, Result]]) -> str:
    """Return the stored table."""
    caught = sum(not result.problem for _, result in results)
    rows = [
        f"{table_start(mutant)} {result.caught_by or result.problem} | {result.seconds:.0f} |"
        for mutant, result in results
    ]
    return "\n".join(
        [
            "# Wrong edits and the tests that notice them",
            "",
            "Written by `python tests/mutations.py --write tests/mutations.md`; the seconds include"
            " the imports.",
            f"{caught} of {len(results)} are caught.",
            "",
            "| mutant | what it breaks | edit | caught by | seconds |",
            "|---|---|---|---|---:|",
            *rows,
            "",
        ]
    )


def run_tests(tests: list[str], mutant: Mutant | None, seconds: float) -> Result:
    """Run tests in a copy of the tree with the mutant's edit (None: unchanged)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        # caches stay behind: an edit that keeps the size would go unnoticed within one second
        copy, ignored = Path(folder), shutil.ignore_patterns("__pycache__", ".*")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, copy / name)
        if mutant is not None:
            target = copy / mutant.file
            target.write_text(mutated(target.read_text(), mutant))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(copy),  # for the processes that tests start
        }
        command = [sys.executable, str(copy / "tests" / Path(__file__).name), INSIDE, *tests]
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, timeout=seconds, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return Result("", f"no test failed within {seconds} s", time.perf_counter() - start)
    elapsed = time.perf_counter() - start
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return Result("", "survived", elapsed)
    if done.returncode == 1 and failed:
        return Result(failed[1], "", elapsed)
    last = (done.stderr.strip() or done.stdout.strip() or "nothing printed").splitlines()[-1]
    return Result("", f"tests did not run (exit status {done.returncode}): {last}", elapsed)


def run_inside(arguments: list[str]) -> int:
    """Run pytest on the copy that holds this very file; return its exit status."""
    folders = {"polygrad_fast": ROOT / "polygrad_fast", "polygrad_fast.kernels": ROOT / "kernels"}

    class FromCopy:
        """Answers before the finder of an editable install, which names the working tree."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name not in folders:
                return None
            folder = folders[name]
            return importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )

    sys.meta_path.insert(0, FromCopy)
    sys.path.remove(str(ROOT / "tests"))

    import pytest

    import polygrad_fast.kernels  # noqa: F401

    def elsewhere() -> list[str]:
        return [
            f"{name} is {module.__file__}"
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "polygrad_fast"
            and not Path(module.__file__).resolve().is_relative_to(ROOT)
        ]

    status = 0
    if not elsewhere():
        options = ["-x", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        status = pytest.main([*options, "--rootdir", str(ROOT), *arguments])
    if elsewhere():  # asked again: tests import more
        print(f"not the copy in {ROOT}: {elsewhere()[0]}", file=sys.stderr)
        return NOT_THE_COPY
    return int(status)


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 if all chosen mutants are caught."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants only")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default 1)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="store the table of a full run")
    options = parser.parse_args(arguments)
    if options.only and options.write:
        parser.error("--write stores the table of all mutants, so it cannot go with --only")
    mutants = read_mutants()
    unknown = set(options.only or ()) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no mutant is called {min(unknown)!r}")
    mutants = [m for m in mutants if not options.only or m.name in options.only]
    for mutant in mutants:
        mutated((ROOT / mutant.file).read_text(), mutant)

    tests = sorted({test for mutant in mutants for test in mutant.tests})
    unchanged = run_tests(tests, None, seconds=30 * SECONDS)
    if unchanged.problem != "survived":
        print(f"the unchanged tree fails: {unchanged.caught_by or unchanged.problem}")
        return 1
    print(f"unchanged: all chosen tests pass ({unchanged.seconds:.0f} s)", flush=True)

    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, result in zip(
            mutants, pool.map(lambda m: run_tests(m.tests, m, SECONDS), mutants), strict=True
        ):
            results.append((mutant, result))
            outcome = result.problem.upper() or result.caught_by
            print(f"{mutant.name} ({result.seconds:.0f} s): {outcome}", flush=True)
    if options.write:
        options.write.write_text(table(results))
    uncaught = sum(bool(result.problem) for _, result in results)
    print(f"{len(results) - uncaught} of {len(results)} caught")
    return min(uncaught, 1)


if __name__ == "__main__":
    inside = sys.argv[1:2] == [INSIDE]
    sys.exit(run_inside(sys.argv[2:]) if inside else main(sys.argv[1:]))
