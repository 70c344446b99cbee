"""Replay buffer: environment steps in a ring of tensors, training windows gathered by index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.arguments import as_integer
from polygrad_fast.data.checks import as_finite_float32, as_flag
from polygrad_fast.data.moments import RunningMoments
from polygrad_fast.data.replay_state import check_replay_state, renewed
from polygrad_fast.errors import InputError
from polygrad_fast.profiling import annotate

_FORMAT = "polygrad_fast.replay.v1"
# Steps that may wait to be merged into the moments: bounds the float64 copy one merge makes.
_MAX_PENDING_STEPS = 65_536


@dataclass(frozen=True)
class Windows:
    """A batch of windows, raw (unnormalized) contiguous float32 tensors on the buffer's device.

    Past a terminal step a window is padded: last observation and action, reward 0, terminal 1.
    """

    observations: Tensor  # [B, H, S]
    actions: Tensor  # [B, H, A]
    rewards: Tensor  # [B, H]
    terminals: Tensor  # [B, H], 0 or 1


class ReplayBuffer:
    """Keep the newest `capacity` steps and draw windows of `horizon` steps of one episode.

    A window starts anywhere in an episode (windows of Algorithm 1 of arXiv 2312.08533). Past a
    terminal step it is padded with the last observation and action, terminal 1 and reward 0, so
    every step of a terminated episode is a start. Truncation is not a terminal: windows of a
    truncated or running episode lie inside it, and a truncated episode shorter than the horizon
    gives none. A window whose first step has been overwritten is no longer drawn, so episodes and
    stale steps never mix.

    Step n, counted from 0 and never reused, lies in row n % capacity of one preallocated tensor
    [capacity, S + A + 2]. The valid starts lie in a second ring [capacity, 2] of (start, last real
    step), in chronological order: those that use overwritten steps are always at its head.

    Steps of N environments come in turns, step n from environment n % N, and each environment has
    episodes of its own: a window is every N-th step. So that the starts stay in order, one found at
    a terminal step waits, H - 1 turns at most, until no environment can give an earlier one.

    Args:
        capacity: steps kept, at least `horizon` times `num_environments`.
        horizon: window length H, at least 1.
        observation_dim: S, at least 1.
        action_dim: A, at least 1.
        device: where the steps are kept and the windows are returned.
        num_environments: N, at least 1.

    Raises:
        InputError: a size outside the ranges above.
    """

    def __init__(
        self,
        capacity: int,
        horizon: int,
        observation_dim: int,
        action_dim: int,
        device: torch.device | str = "cpu",
        num_environments: int = 1,
    ) -> None:
        self.horizon = as_integer(horizon, "horizon", 1)
        self.num_environments = as_integer(num_environments, "num_environments", 1)
        self.observation_dim = as_integer(observation_dim, "observation_dim", 1)
        self.action_dim = as_integer(action_dim, "action_dim", 1)
        self.capacity = as_integer(capacity, "capacity", 1)
        if self.capacity < self.horizon * self.num_environments:
            each = f" for each of {num_environments} environments" if num_environments > 1 else ""
            raise InputError(
                f"capacity must be at least the horizon, {horizon}{each}, got {capacity}"
            )
        self.device = torch.device(device)

        self._field_sizes = (self.observation_dim, self.action_dim, 1, 1)
        width = sum(self._field_sizes)
        self._steps = torch.zeros(self.capacity, width, device=self.device)
        self._starts = torch.zeros(self.capacity, 2, dtype=torch.int64, device=self.device)
        self._offsets = self.num_environments * torch.arange(self.horizon, device=self.device)
        # Whether the step in a row is a start: known on the host, so evicting one never syncs.
        self._is_start = bytearray(self.capacity)
        self._first_start = 0  # starts dropped so far
        self._end_start = 0  # starts found so far
        self._total_steps = 0
        self._episode_starts = list(range(self.num_environments))  # of the running episodes
        self._waiting: list[tuple[int, int]] = []  # rows of the second ring, found out of order
        self._total_episodes = 0
        self._moments = RunningMoments(width)

    @property
    def num_steps(self) -> int:
        """Steps held now."""
        return min(self._total_steps, self.capacity)

    @property
    def total_steps(self) -> int:
        """Steps ever added."""
        return self._total_steps

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that the buffer takes."""
        return self._steps.nbytes + self._starts.nbytes

    @property
    def num_windows(self) -> int:
        """Windows that can be drawn now, one per valid start."""
        return self._end_start - self._first_start

    @property
    def num_episodes(self) -> int:
        """Episodes finished so far, those since overwritten included, the running one not."""
        return self._total_episodes

    def add(
        self,
        observation: np.ndarray | Tensor,
        action: np.ndarray | Tensor,
        reward: float,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Append one step of the running episode of the environment whose turn it is; no host
        synchronization for numpy input.

        Args:
            observation: [S], the observation the action was taken at.
            action: [A], in the policy's space.
            reward: scalar.
            terminated: the step ended in a terminal state; stored as the step's terminal flag.
            truncated: the episode was cut off after this step. If both are true, terminated wins.

        Raises:
            InputError: another shape, NaN or infinity, or a flag that is none, naming field, index
                and value. Nothing is stored then.
        """
        n = self._total_steps
        terminated = as_flag(terminated, f"step {n}: terminated")
        truncated = as_flag(truncated, f"step {n}: truncated")
        row = np.empty(sum(self._field_sizes), dtype=np.float32)
        s, a = self.observation_dim, self.action_dim
        row[:s] = as_finite_float32(observation, (s,), f"step {n}: observation")
        row[s : s + a] = as_finite_float32(action, (a,), f"step {n}: action")
        row[s + a] = as_finite_float32(reward, (), f"step {n}: reward")
        row[s + a + 1] = terminated

        if n - self._moments.count >= min(self.capacity, _MAX_PENDING_STEPS):
            self._merge_moments()
        slot = n % self.capacity
        if self._is_start[slot]:
            self._is_start[slot] = 0
            self._first_start += 1
        _write(self._steps[slot], row)
        self._total_steps = n + 1

        environment, stride = n % self.num_environments, self.num_environments
        begin = self._episode_starts[environment]
        full = n - (self.horizon - 1) * stride  # the start whose window ends at this step
        if terminated:
            self._waiting += [(start, n) for start in range(max(full, begin), n + 1, stride)]
        elif full >= begin:
            self._waiting.append((full, n))
        if terminated or truncated:
            self.end_episode(environment)
        self._add_starts()

    def end_episode(self, environment: int = 0) -> None:
        """Close an environment's running episode as truncated after its newest step; nothing if
        none is running.

        For a caller that must leave an episode without a further step, as when an environment could
        not be restored: its next step belongs to a new episode.
        """
        if self._episode_starts[environment] < self._total_steps:
            self._episode_starts[environment] = self._next_step(environment)
            self._total_episodes += 1

    def _next_step(self, environment: int) -> int:
        """Return the number of an environment's next step."""
        return self._total_steps + (environment - self._total_steps) % self.num_environments

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Windows:
        """Draw windows uniformly over the valid starts, with replacement.

        One `torch.randint` call, on the generator's device (the buffer's without one), so a seeded
        generator gives the same windows again. Does not synchronize; not to be captured in a CUDA
        graph, for the number of valid starts is a host value.

        Args:
            batch_size: B, at least 1.
            generator: source of the draw; the default generator if None.

        Returns:
            Windows of B windows.

        Raises:
            InputError: batch_size below 1, or no valid window yet.
        """
        return self.windows(self.draw(batch_size, generator))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw windows as `sample` does, and return where they are: int64 [B], for `windows`."""
        with annotate("replay_sample"):
            return (self._draw(batch_size, generator) + self._first_start) % self.capacity

    def windows(self, places: Tensor) -> Windows:
        """Gather the windows that `draw` has drawn, before a step is added; may be captured in a
        CUDA graph."""
        with annotate("replay_sample"):
            starts, lasts = self._starts[places].unbind(1)
            steps = starts[:, None] + self._offsets  # [B, H]
            padded = steps > lasts[:, None]
            # Repeating the last step repeats its observation, action, terminal flag and its reward.
            rows = self._steps[torch.minimum(steps, lasts[:, None]) % self.capacity]
            observations, actions, rewards, terminals = rows.split(self._field_sizes, dim=-1)
            return Windows(
                observations=observations.contiguous(),
                actions=actions.contiguous(),
                rewards=rewards.squeeze(-1).masked_fill(padded, 0.0),
                terminals=terminals.squeeze(-1).contiguous(),
            )

    def sample_initial_observations(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        num_newest: int = 1,
        share_of_newest: float = 0.0,
    ) -> Tensor:
        """Draw the first observations of windows, without gathering the rest.

        Without a share of the newest, and with a generator in the same state, these are the first
        observations of what `sample` gives.

        Args:
            batch_size: B, at least 1.
            generator: source of the draw; the default generator if None.
            num_newest: how many windows count as the newest, at least 1.
            share_of_newest: in [0, 1]; so many of the B, rounded down, come first and are drawn
                from the newest windows, the others from all.

        Returns:
            float32 [B, S], raw.

        Raises:
            InputError: batch_size below 1, or no valid window yet.
        """
        with annotate("replay_sample"):
            count = int(share_of_newest * as_integer(batch_size, "batch_size", 1))
            oldest = max(0, self.num_windows - num_newest)
            parts = [self._draw(count, generator, oldest)] if count else []
            parts += [self._draw(batch_size - count, generator)] if count < batch_size else []
            picks = torch.cat(parts)
            starts = self._starts[(picks + self._first_start) % self.capacity, 0]
            return self._steps[starts % self.capacity, : self.observation_dim]

    def initial_observations(self) -> Tensor:
        """Return the first observations of all windows, oldest first: float32 [N, S], raw."""
        ring = torch.arange(self._first_start, self._end_start, device=self.device)
        starts = self._starts[ring % self.capacity, 0]
        return self._steps[starts % self.capacity, : self.observation_dim]

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return mean and population standard deviation of every field over all steps ever added.

        Steps since overwritten and those of the running episode count; the padding of windows does
        not. Only steps added since the last call are read, in float64 on the host, which
        synchronizes. A constant field has a deviation of exactly 0.

        Returns:
            "observations" [S], "actions" [A], "rewards" [] and "terminals" [], each a pair (mean,
            standard deviation) of float32 tensors on the buffer's device.

        Raises:
            InputError: no step has been added.
        """
        if self._total_steps == 0:
            raise InputError("moments need at least 1 step in the buffer, got 0")
        self._merge_moments()
        mean = self._moments.mean.to(self.device, torch.float32)
        std = self._moments.std.to(self.device, torch.float32)
        s, a = self.observation_dim, self.action_dim
        fields = {
            "observations": slice(0, s),
            "actions": slice(s, s + a),
            "rewards": s + a,
            "terminals": s + a + 1,
        }
        return {name: (mean[i].clone(), std[i].clone()) for name, i in fields.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue identically, the running episode included.

        Returns:
            Host tensors, numbers and strings only (`torch.load(weights_only=True)` reads them). Of
            the rings, only the filled part, oldest first.
        """
        held = torch.arange(self._total_steps - self.num_steps, self._total_steps)
        starts = torch.arange(self._first_start, self._end_start)
        return {
            **self._sizes(),
            "total_steps": self._total_steps,
            "total_episodes": self._total_episodes,
            "episode_starts": torch.tensor(self._episode_starts),
            "waiting": torch.tensor(self._waiting, dtype=torch.int64).reshape(-1, 2),
            "steps": self._steps[(held % self.capacity).to(self.device)].cpu(),
            "first_start": self._first_start,
            "starts": self._starts[(starts % self.capacity).to(self.device)].cpu(),
            **self._moments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of a buffer with the same capacity, horizon and dimensions.

        Raises:
            CheckpointError: an entry is missing, of another shape, or of another configuration; the
                message names both values. The buffer is unchanged then.
        """
        state = renewed(state)
        check_replay_state(state, self._sizes(), sum(self._field_sizes))
        steps, starts = state["steps"], state["starts"]
        self._total_steps = state["total_steps"]
        self._total_episodes = state["total_episodes"]
        self._episode_starts = state["episode_starts"].tolist()
        self._waiting = [(start, last) for start, last in state["waiting"].tolist()]
        self._first_start = state["first_start"]
        self._end_start = self._first_start + len(starts)
        held = torch.arange(self._total_steps - len(steps), self._total_steps) % self.capacity
        self._steps.zero_()
        self._steps[held.to(self.device)] = steps.to(self.device)
        ring = torch.arange(self._first_start, self._end_start) % self.capacity
        self._starts.zero_()
        self._starts[ring.to(self.device)] = starts.to(self.device)
        self._is_start = bytearray(self.capacity)
        for slot in (starts[:, 0] % self.capacity).tolist():
            self._is_start[slot] = 1
        self._moments.load_state_dict(state)

    def _sizes(self) -> dict[str, Any]:
        """Return what a state and the buffer that it is loaded into have in common."""
        return {
            "format": _FORMAT,
            "capacity": self.capacity,
            "horizon": self.horizon,
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "num_environments": self.num_environments,
        }

    def _add_starts(self) -> None:
        """Append the starts that no earlier one can follow."""
        reach = (self.horizon - 1) * self.num_environments
        undecided = min(
            [
                max(begin, self._next_step(environment) - reach)
                for environment, begin in enumerate(self._episode_starts)
            ]
        )
        ready = sorted([row for row in self._waiting if row[0] < undecided])
        if not ready:
            return
        self._waiting = [row for row in self._waiting if row[0] >= undecided]
        for start, _ in ready:
            self._is_start[start % self.capacity] = 1
        rows = np.array(ready, dtype=np.int64)
        ring = self._end_start % self.capacity
        ahead = self.capacity - ring  # rows before the ring's end
        for begin, part in ((ring, rows[:ahead]), (0, rows[ahead:])):
            if len(part):
                _write(self._starts[begin : begin + len(part)], part)
        self._end_start += len(ready)

    def _draw(self, batch_size: int, generator: torch.Generator | None, oldest: int = 0) -> Tensor:
        """Draw B numbers in [oldest, num_windows), int64 [B] on the buffer's device."""
        batch_size = as_integer(batch_size, "batch_size", 1)
        if self.num_windows == 0:
            raise InputError(
                f"sample needs at least one window of horizon {self.horizon} inside an episode or "
                f"up to a terminal step, got {self.num_steps} steps and no valid window"
            )
        device = self.device if generator is None else generator.device
        highest = self.num_windows
        picks = torch.randint(oldest, highest, (batch_size,), generator=generator, device=device)
        return picks.to(self.device)

    def _merge_moments(self) -> None:
        """Merge the steps added since the last merge into the moments."""
        merged = self._moments.count
        if merged < self._total_steps:
            pending = torch.arange(merged, self._total_steps, device=self.device) % self.capacity
            self._moments.merge(self._steps[pending].to("cpu", torch.float64))


def _write(place: Tensor, rows: np.ndarray) -> None:
    """Copy rows to a part of a ring; to a GPU by way of pinned memory, or the host would wait until
    the device has done everything before."""
    on_gpu, rows = place.device.type == "cuda", torch.from_numpy(rows)
    place.copy_(rows.pin_memory() if on_gpu else rows, non_blocking=on_gpu)
