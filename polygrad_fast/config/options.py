"""Frozen dataclasses of checked options."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from dataclasses import replace
from math import isfinite
from typing import Any, Literal

from polygrad_fast.errors import InputError


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a configuration's options; evaluating them takes a millisecond."""
    return typing.get_type_hints(cls)


def matches(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an option's type; numbers must be finite."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is types.UnionType:
        return any(matches(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:  # of any number of one type
        part = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(matches(each, part) for each in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _plain(value: Any) -> Any:
    """Return a numpy scalar as the Python value it holds, which JSON can express."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {list(typing.get_args(hint))}"
    if typing.get_origin(hint) is types.UnionType:
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a tuple, each {_describe(typing.get_args(hint)[0])}"
    return {float: "a finite number", int: "an integer", types.NoneType: "None"}.get(
        hint, f"a {hint.__name__}"
    )


class Options:
    """Check every option's type when a configuration is built, then its range; numpy's numbers are
    stored as Python's."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _plain(getattr(self, name)))
            self._check(matches(getattr(self, name), hint), name, _describe(hint))
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raise InputError for a value out of range; types are right already."""

    def _check(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(
                f"{type(self).__name__}.{name} must be {wanted}, got {getattr(self, name)!r}"
            )

    def _check_at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            self._check(getattr(self, name) >= minimum, name, f"at least {minimum}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            optional = matches(None, _hints(type(self))[name])
            wanted = "None or a positive number" if optional else "positive"
            self._check(value is None or value > 0, name, wanted)


def replace_options(config: Any, overrides: dict[str, Any]) -> Any:
    """Return a configuration with some options replaced.

    Raises:
        InputError: an option is unknown or its value is not allowed.
    """
    known = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in known:
            raise InputError(
                f"{type(config).__name__} has no option {name!r}, wanted one of {sorted(known)}"
            )
    return replace(config, **overrides)


def from_dict(data: dict[str, Any], cls: type) -> Any:
    """Rebuild a configuration from `dataclasses.asdict` (read back from JSON).

    Raises:
        InputError: an option is unknown or its value is not allowed.
    """
    if not isinstance(data, dict):
        raise InputError(f"{cls.__name__} must be a dictionary of options, got {data!r}")
    hints = _hints(cls)
    unknown = sorted(set(data) - set(hints), key=str)
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{cls.__name__} has no option {unknown[0]!r}{hint}")
    values = {
        name: from_dict(value, hints[name]) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in data.items()
    }
    return cls(**values)
