"""What the last checkpoint of a model's run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from polygrad_fast.errors import CheckpointError
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.directory import read_run_config
from polygrad_fast.runs.restore import checkpoint_to_load


class LastCheckpoint(NamedTuple):
    """The last checkpoint of a run that trained a model on a dataset.

    Attributes:
        stored: the run's config.json. dims: S and A of its dataset.
        weights: by name. num_updates: they were trained for. source: where they are from.
    """

    stored: dict[str, Any]
    dims: tuple[int, int]
    weights: dict[str, Tensor]
    num_updates: int
    source: str

    @classmethod
    def of(cls, run_dir: Path, kind: str) -> LastCheckpoint:
        """Read that of a run of a kind.

        Raises:
            CheckpointError: no such run, its config.json is damaged, or none of its checkpoints can
                be used.
        """
        stored = read_run_config(run_dir, kind)
        path, _ = checkpoint_to_load(run_dir, "last")
        weights, _, metadata = load_checkpoint(path)
        try:
            dims = int(stored["observation_dim"]), len(stored["action_low"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{run_dir / 'config.json'} is damaged: {error!r}") from None
        return cls(stored, dims, weights, int(metadata["num_timesteps"]), str(path))
