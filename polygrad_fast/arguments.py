"""Checks of arguments that many public functions take."""

from __future__ import annotations

import numbers
import os
from pathlib import Path
from typing import Any

from polygrad_fast.errors import InputError


def as_integer(value: Any, name: str, minimum: int, below: int | None = None) -> int:
    """Return an integer, Python's or numpy's, as an int.

    Raises:
        InputError: not an integer (True and 1.0 are none), under `minimum`, or not under `below`.
    """
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not fits or value < minimum or (below is not None and value >= below):
        wanted = f"of at least {minimum}" if below is None else f"in [{minimum}, {below})"
        raise InputError(f"{name} must be an integer {wanted}, got {value!r}")
    return int(value)


def as_path(value: Any, name: str) -> Path:
    """Return a path.

    Raises:
        InputError: neither a string nor a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name} must be a path (str or pathlib.Path), got {value!r}")
    return Path(value)


def as_output_file(value: Any, name: str) -> Path:
    """Return the path of a file to be written, before the work that makes its content.

    Raises:
        InputError: neither a string nor a path, a directory, or in one that does not exist.
    """
    path = as_path(value, name)
    if path.is_dir():
        raise InputError(f"{name} must be a file, got the directory {path}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{name} must be in an existing directory, got {path}")
    return path
