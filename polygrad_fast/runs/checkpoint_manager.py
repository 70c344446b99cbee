"""The checkpoints of one run."""

import math
import os
import re
import warnings
from pathlib import Path

from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.errors import CheckpointError
from polygrad_fast.runs.checkpoint import read_manifest, save_checkpoint, verify
from polygrad_fast.runs.files import discard, locate, remove_temporaries, write_bytes_atomic

# In a run directory: step checkpoints have been saved there, whatever became of them.
SAVED = ".checkpoints_saved"


class CheckpointManager:
    """The checkpoints of one run, in `run_dir/checkpoints`: the last `step_*` and the `best`.

    Safe to kill at any moment: afterwards `latest` and `best` return complete checkpoints, at
    least as new as the last save that returned. Whoever saves must hold the run's lock
    (`runs.directory.locked`), so that one process writes. Others may read meanwhile: only saves
    write, delete, and remove what a killed save left.

    Args:
        run_dir: the run directory; nothing is created before the first save.
        keep_last: how many `step_*` checkpoints stay, at least 1; may be changed.

    Raises:
        InputError: `keep_last` is no integer of at least 1.
    """

    def __init__(self, run_dir: str | Path, keep_last: int = 3) -> None:
        self.directory = Path(run_dir) / "checkpoints"
        self.keep_last = as_integer(keep_last, "keep_last", 1)
        self._marker = Path(run_dir) / SAVED
        self._sequence = self._newest_sequence()

    def save(
        self, env_step: int, weights: dict[str, Tensor], state: dict | None, metadata: dict
    ) -> Path:
        """Write `checkpoints/step_<env_step>`, then delete what `keep_last` no longer covers.

        Raises as `save_checkpoint` does; the older checkpoints then stay untouched.
        """
        # Newest means saved last, not farthest: a run resumed from an earlier step overtakes what
        # it left behind.
        sequence = 1 + self._newest_sequence()
        path = self.directory / f"step_{env_step:09d}"
        remove_temporaries(self.directory)
        save_checkpoint(path, weights, state, metadata, sequence)
        self._sequence = sequence
        if not self._marker.exists():
            write_bytes_atomic(self._marker, b"")
        self._prune()
        return path

    def save_best(self, weights: dict[str, Tensor], metadata: dict) -> Path:
        """Replace `checkpoints/best`: weights and metadata, no trainer state."""
        remove_temporaries(self.directory)
        return save_checkpoint(self.directory / "best", weights, None, metadata)

    def latest(self) -> Path | None:
        """Return the undamaged checkpoint saved last, or None; warn of each damaged newer one."""
        skipped = []
        for path in sorted(self._steps(), key=_age_key, reverse=True):
            wrong = _wrong_with(path)
            if wrong is None:
                for reason in skipped:
                    warnings.warn(f"skipped a damaged checkpoint: {reason}", stacklevel=2)
                return path
            if path.exists():  # else another process has pruned it meanwhile
                skipped.append(wrong)
        return None

    def best(self) -> Path | None:
        """Return the best checkpoint, or None, also where it is damaged."""
        path = locate(self.directory / "best")
        return path if _wrong_with(path) is None else None

    def damage(self, kind: str) -> list[str]:
        """Return what is wrong with each damaged checkpoint of a kind, "last" or "best", newest
        first."""
        best = locate(self.directory / "best")
        steps = sorted(self._steps(), key=_age_key, reverse=True)
        paths = steps if kind == "last" else [best]
        found = [_wrong_with(path) for path in paths if path.exists()]
        return [wrong for wrong in found if wrong is not None]

    def has_saved(self) -> bool:
        """Return whether a step checkpoint has ever been saved here, even if none is left."""
        return self._marker.exists() or bool(self._steps())

    def others_saved(self) -> bool:
        """Return whether another object has saved here since this one was made or saved last."""
        return self._newest_sequence() > self._sequence

    def _newest_sequence(self) -> int:
        return max((_sequence(path) or 0 for path in self._steps()), default=0)

    def _steps(self) -> list[Path]:
        """Return the directories of the step checkpoints, one per step."""
        if not self.directory.is_dir():
            return []
        matches = (
            re.fullmatch(r"(\.old-)?(step_\d+)", name) for name in os.listdir(self.directory)
        )
        found = {locate(self.directory / match[2]) for match in matches if match}
        return [path for path in found if path.is_dir()]

    def _prune(self) -> None:
        steps = sorted(self._steps(), key=_age_key)
        complete = [path for path in steps if _sequence(path) is not None]
        if len(complete) < self.keep_last:
            return
        keep = complete[-self.keep_last :]
        for path in steps:
            if path not in keep:
                discard(path)


def _wrong_with(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is."""
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return None


def _sequence(path: Path) -> int | None:
    """Return the number of a checkpoint's save within its run, from 1; None where the manifest
    cannot be used."""
    try:
        return int(read_manifest(path)["sequence"])
    except CheckpointError:
        return None


def _age_key(path: Path) -> tuple[float, int]:
    """Return the order of saving; what cannot be told counts as newest: `latest` reports it."""
    sequence = _sequence(path)
    return (math.inf if sequence is None else sequence), int(path.name.rpartition("_")[2])
