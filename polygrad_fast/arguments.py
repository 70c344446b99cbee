"""Checks of arguments that many public functions take."""

from __future__ import annotations

import numbers
import os
from pathlib import Path
from typing import Any

import torch

from polygrad_fast.errors import InputError, first_line


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
    """Return a device; "auto" and None are CUDA where there is one, else the CPU.

    Raises:
        InputError: it cannot be used here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
    return resolved
