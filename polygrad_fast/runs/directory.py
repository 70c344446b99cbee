"""What identifies the run in a directory, and who may train in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.runs.files import naming
from polygrad_fast.runs.metrics import STEP_COLUMN, STEP_NAMES, read_metrics

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_KEYS = ("env_id", "env_given_by_id", "preset", "seed", "config")


def read_run_config(run_dir: Path, kind: str = "train") -> dict[str, Any]:
    """Return a run directory's config.json.

    Args:
        run_dir: the run directory.
        kind: the command that must have made it; "train" does not write its name.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is that of another command.
    """
    path = run_dir / "config.json"
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has no config.json, which `{kind}` makes"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    found = stored.get("kind", "train") if isinstance(stored, dict) else kind
    if found != kind:
        raise CheckpointError(f"{run_dir} is a run of `{found}`, wanted one of `{kind}`")
    missing = set(RUN_KEYS) - set(stored if isinstance(stored, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is damaged: {sorted(missing)} missing")
    return stored


def difference(given: dict[str, Any], kept: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return the first option in which two descriptions of a run differ.

    Args:
        given, kept: nested options by name; only `given`'s are compared, and not
            `total_timesteps`, which may change between the parts of one run.

    Returns:
        The option's name, its value in `given` and that in `kept`, as words, for instance
        ("a2c.gamma", "0.5", "0.99"); None: no difference.
    """
    given, kept = _flatten(given), _flatten(kept)
    for name, value in given.items():
        if name != "total_timesteps" and (name not in kept or value != kept[name]):
            return name, repr(value), repr(kept[name]) if name in kept else "no such option"
    return None


def refuse_other_options(given: dict[str, Any], stored: dict[str, Any], run_dir: Path) -> None:
    """Let a resumed run keep its options; only `total_timesteps` may change.

    Args:
        given, stored: see `difference`.

    Raises:
        CheckpointError: another option; the message names its flag.
    """
    differs = difference(given, stored)
    if differs is not None:
        name, got, wanted = differs
        raise CheckpointError(
            f"{name} must be {wanted}, as the run began, got {got}: resume {run_dir} without "
            f"--{name.replace('_', '-')}, or start another run"
        )


def options_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies a run, of config.json or of a checkpoint's metadata, for
    `difference`."""
    return {name: metadata[name] for name in ("env_id", "preset", "seed")} | metadata["config"]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def refuse_another_run(run_dir: Path) -> None:
    """Keep a new run out of a directory that holds one, or what is left of one.

    Raises:
        InputError: it does.
    """
    if any((run_dir / name).exists() for name in ("config.json", "metrics.csv", "checkpoints")):
        raise InputError(f"{run_dir} already holds a run; resume it or give another run directory")


def refuse_lost_progress(
    run_dir: Path, interval: int, saved: bool, damage: list[str], best: Path | None
) -> None:
    """Keep a run whose checkpoints are all lost from starting anew over what is left of it.

    A run that was killed before its first checkpoint has nothing to lose and may start anew.

    Args:
        interval: steps, of those that the metrics count, from one checkpoint to the next.
        saved: whether one is known to have been saved.
        damage: what is wrong with those that are left.
        best: the best one, where that is usable.

    Raises:
        CheckpointError: a checkpoint was saved, or the metrics go on after the step of the first.
    """
    metrics = run_dir / "metrics.csv"
    rows = read_metrics(metrics) if metrics.exists() else []
    column = next(iter(rows[0])) if rows else STEP_COLUMN
    last = max((row[column] for row in rows), default=0)
    # the row of a step is written before its checkpoint
    if not saved and last <= interval:
        return
    found = "; ".join(damage) if damage else "they were deleted"
    keep = f", load {best} to evaluate the best policy" if best else ""
    raise CheckpointError(
        f"{run_dir} has no usable checkpoint to resume from ({found}), and starting anew would "
        f"overwrite the run, whose metrics go up to {STEP_NAMES[column]} {last:,}: put a "
        f"step_* checkpoint back{keep}, or train in another run directory"
    )


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second process from training in the same run directory."""
    if fcntl is None:
        yield
        return
    path = run_dir / ".lock"
    with naming(path):
        file = open(path, "w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {run_dir}; wait for it or use another directory"
            ) from None
        yield
