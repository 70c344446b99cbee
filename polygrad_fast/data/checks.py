"""Checks of the numbers that environments and callers hand in."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from polygrad_fast.errors import InputError

_LARGEST = float(np.finfo(np.float32).max)


def as_finite_float32(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Copy `value` into a float32 array after checking its shape and that every entry is finite.

    Args:
        value: numpy array, tensor on any device, or number.
        shape: the shape it must have.
        name: what to call the value in an error.

    Returns:
        A new float32 array of the given shape.

    Raises:
        InputError: not numeric, of another shape, or with an entry that is NaN, infinite or beyond
            the range of float32.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        source = np.asarray(value)
        if source.dtype == np.float32:
            array = source.copy()
        else:
            with np.errstate(over="ignore"):
                array = source.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers of shape {shape}, got {value!r}") from error
    if array.shape != shape:
        raise InputError(f"{name} must have shape {shape}, got {array.shape}")
    finite = np.isfinite(array)
    if np.count_nonzero(finite) < array.size:  # a third of what `finite.all()` takes
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        where = f"[{', '.join(map(str, index))}]" if index else ""
        raise InputError(f"{name}{where} must be a finite float32 value, got {source[index]}")
    return array


def as_finite_number(value: Any, name: str) -> float:
    """Return a number that is finite in float32 as a float, not rounded.

    Raises:
        InputError: as `as_finite_float32` of shape ().
    """
    if not (isinstance(value, float) and -_LARGEST <= value <= _LARGEST):
        as_finite_float32(value, (), name)
    return float(value)


def as_flag(value: Any, name: str) -> bool:
    """Return an episode's flag as a bool.

    Args:
        value: True or False, also of numpy or a tensor, or 1 or 0.
        name: what to call the value in an error.

    Raises:
        InputError: anything else, as NaN, None or an array of several.
    """
    try:
        if value == 0 or value == 1:
            return bool(value)
    except (TypeError, ValueError, RuntimeError):  # comparisons of arrays
        pass
    raise InputError(f"{name} must be True or False, got {value!r}")
