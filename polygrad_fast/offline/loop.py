"""Updates of a training with rows of metrics, checkpoints and a progress bar."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from polygrad_fast.config import DiffuseConfig, DynamicsConfig, OfflineTrainConfig, TrainConfig
from polygrad_fast.errors import CheckpointError, NonFiniteError
from polygrad_fast.runs.interrupts import stop_on_signals
from polygrad_fast.runs.run import Run
from polygrad_fast.threads import cpu_threads


class Training(Protocol):
    """What takes the updates.

    Attributes:
        num_updates, total_updates: taken so far, and of the whole training.
        improved: whether the evaluation in the last row is the best one so far.
    """

    config: DiffuseConfig | DynamicsConfig | TrainConfig | OfflineTrainConfig
    device: torch.device
    num_updates: int
    total_updates: int
    improved: bool

    def update(self) -> None:
        """Take one."""

    def metrics(self) -> dict[str, float]:
        """Return the row due after `num_updates` updates, or nothing; quantities that were
        averaged for it begin anew."""

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that continues the training exactly."""

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
        """Continue from what `weights` and `state_dict` returned; errors name `source`."""

    def close(self) -> None:
        """Delete what only an unfinished training needs."""


class Averages:
    """Means of quantities over the updates since they were read last."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, quantities: Mapping[str, Tensor | float]) -> None:
        """Add an update's; nothing is read on the host."""
        for name, value in quantities.items():
            value = torch.as_tensor(value, dtype=torch.float32)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, step: int) -> dict[str, float]:
        """Return the means and begin anew.

        Raises:
            NonFiniteError: one of them is NaN or infinite; the message names it.
        """
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} must be finite, got {value} by update {step:,}")
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])


def run_updates(training: Training, run: Run, progress: bool = True) -> bool:
    """Train until the training's last update, or until Ctrl-C or SIGTERM, which end it after the
    current one; the state is saved at the end.

    Returns:
        Whether it took its last update.

    Raises:
        InputError, NonFiniteError, OSError: naming update and last checkpoint.
        KeyboardInterrupt: a second Ctrl-C came.
    """
    stopped: list[bool] = []
    total, config = training.total_updates, training.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_threads(config.cpu_threads, training.device))
        stack.enter_context(run.locked())
        signals = (signal.SIGINT, signal.SIGTERM)
        stack.enter_context(stop_on_signals(lambda: stopped.append(True), signals))
        logs = [stack.enter_context(log) for log in run.open_logs(training.num_updates)]
        bar = stack.enter_context(
            tqdm(
                total=total,
                initial=training.num_updates,
                unit="update",
                disable=not progress,
                dynamic_ncols=True,
            )
        )
        begun, first = time.perf_counter(), training.num_updates

        def write_due_row() -> None:
            row = training.metrics()
            if not row:
                return
            if training.improved:
                run.save_best(training.num_updates, training.weights())
            taken = training.num_updates - first
            speed = {"time/updates_per_s": taken / (time.perf_counter() - begun)} if taken else {}
            for log in logs:
                log.write(training.num_updates, row | speed)
            bar.set_postfix_str(", ".join(f"{name} {row[name]:.4g}" for name in list(row)[:2]))

        try:
            if training.num_updates == 0:
                write_due_row()
            unsaved = False
            while training.num_updates < total and not stopped:
                training.update()
                unsaved = True
                write_due_row()
                bar.update(1)
                if training.num_updates % config.checkpoint_interval == 0:
                    run.save(training.num_updates, training.weights(), training.state_dict())
                    unsaved = False
            if unsaved:
                run.save(training.num_updates, training.weights(), training.state_dict())
            if training.num_updates == total:
                training.close()
        except BaseException as error:
            where = f"training stopped after update {training.num_updates:,}"
            explained = run.placed(error, where)
            if explained is error:
                raise
            raise explained from error
    return training.num_updates == total


def named_weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the weights and buffers of modules as "module.name"."""
    return {
        f"{module}.{name}": tensor
        for module, network in modules.items()
        for name, tensor in network.state_dict().items()
    }


def load_named_weights(
    modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor], source: str
) -> None:
    """Load what `named_weights` returned, of these modules at least.

    Raises:
        CheckpointError: a name is missing or a shape differs; the message names `source`.
    """
    for module, network in modules.items():
        own = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"{module}.")
        }
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in own.items()}
        for name in {**wanted, **got}:
            if wanted.get(name) != got.get(name):
                raise CheckpointError(
                    f"{source}: the weight {module}.{name} must have shape {wanted.get(name)}, got "
                    f"{got.get(name)}"
                )
        network.load_state_dict(own)
