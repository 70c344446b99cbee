"""What identifies the run in a directory, and who may train in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polygrad_fast.errors import CheckpointError, InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_KEYS = ("env_id", "env_given_by_id", "preset", "seed", "config")


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """Return a run directory's config.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = run_dir / "config.json"
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has no config.json; wanted one that `train` made"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    missing = set(RUN_KEYS) - set(stored if isinstance(stored, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is damaged: {sorted(missing)} missing")
    return stored


def comparable(value: Any) -> Any:
    """Return a configuration without what may differ between the parts of one run."""
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k != "total_timesteps"}
    return value


def difference(got: Any, wanted: Any) -> str:
    """Return the first difference of two configurations in words."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        name = next(k for k in sorted({*got, *wanted}) if got.get(k) != wanted.get(k))
        return f"{name} {got.get(name)!r} instead of {wanted.get(name)!r}"
    return f"{got!r} instead of {wanted!r}"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second process from training in the same run directory."""
    if fcntl is None:
        yield
        return
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {run_dir}; wait for it or use another directory"
            ) from None
        yield
