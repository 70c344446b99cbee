"""Checks of arguments that many public functions take."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygrad_fast.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

MOST_SEEDS = 1000


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


def as_device(device: str | torch.device | None) -> torch.device:
    """Return a device, that of a GPU with its index; "auto" and None are CUDA where there is one,
    else the CPU.

    Raises:
        InputError: it cannot be used here.
    """
    import torch  # not before it is needed: help and errors of the command line are quick

    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error


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


def as_number_list(text: Any, name: str, kind: type[int] | type[float]) -> list:
    """Return the numbers in a text such as "10,50".

    Raises:
        InputError: not a text of at least one number, separated by commas; "10," and "" are none.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except (ValueError, AttributeError):
        wanted = "integers, e.g. 10,50" if kind is int else "numbers, e.g. 1.0,0.3"
        raise InputError(f"{name} must be a list of {wanted}, got {text!r}") from None


def as_choices(values: Iterable[str], name: str, known: Iterable[str]) -> None:
    """Raise InputError unless each value is a known one, and none comes twice."""
    values, known = list(values), list(known)
    for value in values:
        if value not in known:
            raise InputError(f"{name} must be of {known}, got {value!r}")
    if len(set(values)) < len(values):
        raise InputError(f"{name} must be different ones, got {values}")


def as_seeds(text: Any, name: str) -> tuple[int, ...]:
    """Return the seeds in a text such as "0-4" or "0,2,7".

    Raises:
        InputError: no such text, a seed comes twice, or more than `MOST_SEEDS`.
    """
    found: list[int] = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        seeds = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not seeds:
            raise InputError(f"{name} must be seeds, e.g. 0-4 or 0,2,7, got {text!r}")
        if len(found) + len(seeds) > MOST_SEEDS or set(seeds) & set(found):
            raise InputError(f"{name} must be different seeds, at most {MOST_SEEDS}, got {text!r}")
        found += seeds
    return tuple(found)
