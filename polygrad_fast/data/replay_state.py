"""What a replay buffer's saved state must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.errors import CheckpointError


def renewed(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state as it is written now; older ones are of one environment."""
    if "episode_start" not in state:
        return state
    added = {
        "num_environments": 1,
        "episode_starts": torch.tensor([state["episode_start"]]),
        "waiting": torch.zeros(0, 2, dtype=torch.int64),
    }
    return {**state, **added}


def check_replay_state(state: Mapping[str, Any], wanted: Mapping[str, Any], width: int) -> None:
    """Check a state of `ReplayBuffer.state_dict` before anything of it is used.

    Args:
        state: what is to be loaded.
        wanted: the entries that it must have in common with the buffer.
        width: numbers per step.

    Raises:
        CheckpointError: an entry is missing, of another shape, or of another configuration.
    """
    counts = ("total_steps", "total_episodes", "first_start", "moment_steps")
    vectors = ("moment_origin", "moment_mean", "moment_m2")
    for name in (*wanted, *counts, "episode_starts", "waiting", "steps", "starts", *vectors):
        if name not in state:
            raise CheckpointError(f"replay buffer: {name!r} is missing from the saved state")
    for name, value in wanted.items():
        if state[name] != value:
            raise CheckpointError(
                f"replay buffer: saved {name} must be {value!r}, this buffer's, got {state[name]!r}"
            )
    for name in counts:
        if not isinstance(state[name], int) or state[name] < 0:
            raise CheckpointError(
                f"replay buffer: saved {name} must be an integer of at least 0, got {state[name]!r}"
            )
    total = state["total_steps"]
    held = min(total, wanted["capacity"])
    for name in ("first_start", "moment_steps"):
        if state[name] > total:
            raise CheckpointError(
                f"replay buffer: saved {name} must be at most {total}, the steps, got {state[name]}"
            )
    if state["moment_steps"] < total - held:
        raise CheckpointError(
            f"replay buffer: saved moment_steps must be at least {total - held}, the steps no "
            f"longer held, got {state['moment_steps']}"
        )
    starts = state["starts"]
    num_environments = wanted["num_environments"]
    shapes = {
        "steps": (held, width),
        "episode_starts": (num_environments,),
        **dict.fromkeys(vectors, (width,)),
    }
    integers = ("episode_starts", "waiting", "starts")
    dtypes = {"steps": torch.float32, **dict.fromkeys(integers, torch.int64)}
    for name in ("steps", *vectors, *integers):
        tensor, dtype = state[name], dtypes.get(name, torch.float64)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"replay buffer: saved {name} must be a {dtype} tensor, got {got}"
            )
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"replay buffer: saved {name} must have shape {shapes[name]}, got "
                f"{tuple(tensor.shape)}"
            )
    for name in ("starts", "waiting"):
        rows = state[name]
        if rows.ndim != 2 or rows.shape[1] != 2 or len(rows) > held:
            raise CheckpointError(
                f"replay buffer: saved {name} must have shape (n, 2) with n at most {held}, got "
                f"{tuple(rows.shape)}"
            )
    begins, latest = state["episode_starts"], total + num_environments - 1
    if not ((begins >= 0) & (begins <= latest)).all():  # at the latest an environment's next step
        raise CheckpointError(
            f"replay buffer: saved episode_starts must be at most {latest}, got {begins.tolist()}"
        )
    if len(starts):
        first, last = starts.unbind(1)
        ordered = bool((first[1:] > first[:-1]).all() and (first <= last).all())
        if not ordered or int(first[0]) < total - held or int(last.max()) >= total:
            raise CheckpointError(
                f"replay buffer: saved starts must increase within steps {total - held} to "
                f"{total - 1}, got {int(first.min())} to {int(last.max())}"
            )
