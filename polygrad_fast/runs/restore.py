"""Which checkpoint to load, and how the agent in it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.runs.checkpoint_manager import CheckpointManager
from polygrad_fast.runs.directory import refuse_lost_progress


def checkpoint_to_load(path: Path, which: str) -> tuple[Path, CheckpointManager | None]:
    """Return a checkpoint directory, and the checkpoints of the run that it is of.

    Args:
        path: a checkpoint, whose run is not known (None), or a run directory.
        which: of a run directory, "last" or "best".

    Raises:
        InputError: another `which`.
        CheckpointError: there is none.
    """
    if which not in ("last", "best"):
        raise InputError(f"checkpoint must be 'last' or 'best', got {which!r}")
    if path.is_file():
        raise CheckpointError(f"{path} is a file, wanted a run or checkpoint directory")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist, wanted a run or checkpoint directory")
    if not (path / "config.json").exists():
        return path, None
    manager = CheckpointManager(path)
    found = manager.best() if which == "best" else manager.latest()
    if found is None:
        damage = "; ".join(manager.damage(which))
        gone = which == "last" and manager.has_saved()
        why = f" that can be used: {damage}" if damage else " any more" if gone else " yet"
        raise CheckpointError(f"{path} has no {which} checkpoint{why}")
    return found, manager


def checkpoint_to_resume(run_dir: Path, interval: int) -> tuple[Path | None, CheckpointManager]:
    """Return the last checkpoint of a run, None for a run that was killed before its first, and
    all of them.

    Args:
        interval: environment steps from one checkpoint to the next.

    Raises:
        CheckpointError: its checkpoints are all damaged or gone.
    """
    manager = CheckpointManager(run_dir)
    found = manager.latest()
    if found is None:
        damage, saved = manager.damage("last"), manager.has_saved()
        refuse_lost_progress(run_dir, interval, saved, damage, manager.best())
    return found, manager


def constructor_arguments(metadata: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return what builds the agent again that config.json or a checkpoint describes, but for its
    configuration.

    Args:
        metadata: its content.
        given: the arguments of `PolyGRAD.load` that the constructor takes too.

    Raises:
        InputError: an environment or module that cannot be saved is missing, or a module is given
            where the agent had its own.
    """
    given = dict(given)
    if given["env"] is None:
        if not metadata["env_given_by_id"]:
            raise InputError(
                f"this agent was trained on an environment given as an object or a function "
                f"({metadata['env_id']}): give the environment as env="
            )
        given["env"] = metadata["env_id"]
    evaluated_on = metadata.get("eval_env")
    if given["eval_env"] is None and evaluated_on is not None:
        if not evaluated_on["given_by_id"]:
            raise InputError(
                f"this agent was evaluated on an environment given as an object or a function "
                f"({evaluated_on['id']}): give the environment as eval_env="
            )
        given["eval_env"] = evaluated_on["id"]
    trained = metadata.get("own_modules", {})
    for name in ("denoiser", "policy"):
        if name in trained and given[name] is None:
            raise InputError(
                f"this agent was trained with an own {name}, {trained[name]}: load it in "
                f"Python and give such a module as {name}="
            )
        if given[name] is not None and name not in trained:
            raise InputError(
                f"this agent was trained with its built-in {name}, got {name}="
                f"{type(given[name]).__name__}; wanted none"
            )
    return {
        "preset": metadata["preset"],
        "seed": metadata["seed"],
        **given,
    }
