"""Another commit to compare with, on the command line and in rows."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence


def add_against(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the option that names the other commit, `options.against`: (name, interpreter)."""
    parser.add_argument(
        "--against",
        nargs=2,
        metavar=("NAME", "PYTHON"),
        required=required,
        help="a commit, and the interpreter in which it is installed",
    )


def shown_command(script: str, arguments: Sequence[str], against: Sequence[str] | None) -> str:
    """Return the command of a row: the other commit's interpreter lies anywhere, and a row says
    which commit, not where."""
    python = against[1] if against else None
    shown = ["PYTHON" if word == python else word for word in arguments]
    return shlex.join(["python", f"benchmarks/{script}", *shown])
