"""Report stored benchmark rows, which `pytest benchmarks/ --benchmark-only --rows FILE` makes.

python benchmarks/report.py                                   # print all tables
python benchmarks/report.py --readme README.md --plots benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from harness.figures import draw_all, stale_plots
from harness.report import all_tables, update_readme
from harness.rows import read_folder
from polygrad_fast.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or write them and the plots; return 0, or 2 for bad input."""
    parser = _Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of the rows"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="+",
        default=[],
        help="write the tables between the markers of these Markdown files",
    )
    parser.add_argument("--plots", type=Path, help='draw the plots there; extra "plots"')
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 2 where something differs"
    )
    try:
        _report(parser.parse_args(arguments))
    except InputError as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _report(options: argparse.Namespace) -> None:
    if options.check and not options.readme and options.plots is None:
        raise InputError(
            "--check needs --readme or --plots, the files or the folder that are to be checked"
        )
    rows = read_folder(options.results)
    if not options.readme and options.plots is None:
        print(all_tables(rows))
    for path in options.readme:  # a file that cannot be rewritten stops before any is
        update_readme(path, rows, check=True)
    for path in options.readme:
        stale = update_readme(path, rows, options.check)
        if stale and options.check:
            raise InputError(
                f"{path}: {', '.join(stale)} differ from the rows in {options.results}; "
                f"`python benchmarks/report.py --readme {path}` writes them anew"
            )
        done = "checked" if options.check else f"{len(stale)} tables changed"
        print(f"{path}: {done}, {len(rows)} rows in {options.results}")
    if options.plots is not None and options.check:
        stale = stale_plots(rows, options.plots)
        if stale:
            raise InputError(
                f"{options.plots}: {', '.join(stale)} missing or not of the rows in "
                f"{options.results}; `python benchmarks/report.py --plots {options.plots}` draws "
                "them anew"
            )
        print(f"{options.plots}: checked")
    elif options.plots is not None:
        for path in draw_all(rows, options.plots):
            print(path)


if __name__ == "__main__":
    sys.exit(main())
