"""A run: its directory, and what is written there."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.errors import InputError, NonFiniteError
from polygrad_fast.runs.checkpoint import read_metadata
from polygrad_fast.runs.checkpoint_manager import CheckpointManager
from polygrad_fast.runs.directory import locked, refuse_another_run
from polygrad_fast.runs.files import write_json_atomic
from polygrad_fast.runs.metrics import STEP_COLUMN, MetricsLog, TensorboardLog
from polygrad_fast.runs.versions import versions


class Run:
    """A run: what identifies it, its directory, checkpoints and metrics.

    Without a directory nothing is written.

    Args:
        identity: what config.json and every checkpoint say of it; see `runs.directory.RUN_KEYS`.
        checkpoints: those of an existing run directory; None: there is no directory.
        tensorboard: also write TensorBoard events.
        step_column: what metrics.csv counts, and with it `step` and `num_timesteps` here:
            environment steps, or updates.

    Raises:
        InputError: TensorBoard is asked for without a directory, or not installed.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        checkpoints: CheckpointManager | None = None,
        tensorboard: bool = False,
        step_column: str = STEP_COLUMN,
    ):
        self.directory = None if checkpoints is None else checkpoints.directory.parent
        _check_tensorboard(tensorboard, self.directory)
        self.identity, self._tensorboard = identity, tensorboard
        self._checkpoints, self._step_column = checkpoints, step_column
        self._locked = False

    @classmethod
    def begin(
        cls,
        directory: Path,
        identity: dict[str, Any],
        keep_checkpoints: int,
        tensorboard: bool,
        step_column: str = STEP_COLUMN,
    ) -> Run:
        """Make a directory that of a new run, with config.json and versions.json.

        Raises:
            InputError: it holds a run already, or cannot be written; TensorBoard is not installed.
        """
        _check_tensorboard(tensorboard, directory)
        found = versions()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory):
                refuse_another_run(directory)  # that another process has begun meanwhile
                write_json_atomic(directory / "versions.json", found)
                write_json_atomic(directory / "config.json", identity | {"num_timesteps": 0})
        except OSError as error:
            raise InputError(f"run directory {directory} cannot be written: {error}") from error
        checkpoints = CheckpointManager(directory, keep_checkpoints)
        return cls(identity, checkpoints, tensorboard, step_column)

    def metadata(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of an environment step says of itself."""
        return self.identity | {"num_timesteps": step}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the run directory.

        Raises:
            InputError: another process is training there, or has since this object was made.
        """
        if self.directory is None or self._locked:
            yield
            return
        with locked(self.directory):
            if self._checkpoints.others_saved():
                raise InputError(
                    f"another process has trained in {self.directory} since this agent was made or "
                    f"loaded; load it again"
                )
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def open_logs(self, num_timesteps: int) -> list[MetricsLog | TensorboardLog]:
        """Return what takes the rows of metrics after `num_timesteps`, which drop later ones."""
        if self.directory is None:
            return []
        # the row of step 0 is written by this call, those up to num_timesteps were written before
        resume_step = num_timesteps or -1
        logs: list = [MetricsLog(self.directory / "metrics.csv", resume_step, self._step_column)]
        if self._tensorboard:
            logs.append(TensorboardLog(self.directory, resume_step))
        return logs

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint of an environment step.

        Raises:
            NonFiniteError: a weight is not finite; then no good checkpoint is replaced.
        """
        if self._checkpoints is not None:
            _check_finite(weights)
            self._checkpoints.save(step, weights, state, self.metadata(step))

    def save_best(self, step: int, weights: dict[str, Tensor]) -> None:
        """Write the best checkpoint in place of the former one.

        Raises:
            NonFiniteError: a weight is not finite; then the former one stays.
        """
        if self._checkpoints is not None:
            _check_finite(weights)
            self._checkpoints.save_best(weights, self.metadata(step))

    def extend(self, step: int, config: dict[str, Any]) -> None:
        """Let config.json say how long the run is to be, at an environment step."""
        identity = self.identity | {"config": config}
        if self.directory is not None:
            try:
                metadata = identity | {"num_timesteps": step}
                write_json_atomic(self.directory / "config.json", metadata)
            except OSError as error:
                where = f"the run at environment step {step} is not extended"
                raise self.placed(error, where) from error
        self.identity = identity

    def best_timestep(self) -> int | None:
        """Return the environment step of the best checkpoint, None if there is none."""
        path = self._checkpoints.best() if self._checkpoints is not None else None
        return None if path is None else int(read_metadata(path)["num_timesteps"])

    def placed(self, error: BaseException, where: str) -> BaseException:
        """Return an error with a place and the last checkpoint in it, or in its notes."""
        latest = self._checkpoints.latest() if self._checkpoints is not None else None
        last = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
        if isinstance(error, (InputError, NonFiniteError)):
            return type(error)(f"{where}: {error}; {last}")
        if isinstance(error, OSError) and error.errno is not None:  # of a file
            name = f"{error.filename}: " if error.filename else ""
            return OSError(error.errno, f"{where}: {name}{error.strerror or error}; {last}")
        error.add_note(f"{where}; {last}")
        return error


def _check_tensorboard(wanted: bool, directory: Path | None) -> None:
    """Raise InputError where TensorBoard is wanted without a run directory, or not installed."""
    if wanted and directory is None:
        raise InputError("tensorboard=True needs a run_dir, got None")
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "tensorboard=True needs the extra 'tensorboard': "
            "pip install 'polygrad-fast[tensorboard]'"
        )


def _check_finite(weights: dict[str, Tensor]) -> None:
    numbers = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in numbers.values()]).tolist()
    for name, fine in zip(numbers, finite, strict=True):
        if not fine:
            raise NonFiniteError(f"the weight {name} is not finite")
