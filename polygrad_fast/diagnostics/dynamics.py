"""Are imagined trajectories true? Their actions replayed in MuJoCo (figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from polygrad_fast.arguments import as_integer
from polygrad_fast.data import ActionScaler
from polygrad_fast.diagnostics.episodes import RecordedWindows, record_windows
from polygrad_fast.diagnostics.mujoco_replay import MujocoReplay, Played
from polygrad_fast.diagnostics.rollouts import imagine
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.sampling import TrajectoryBatch
from polygrad_fast.terminals import alive_steps
from polygrad_fast.world_models import WorldModel, check_horizon


@dataclass(frozen=True)
class TransitionErrors:
    """What is wrong with each of N x T transitions, in float64, beside the simulator's.

    A transition counts up to the first that is terminal in either, that one included; its next
    observation only if it is terminal in neither. What does not count is NaN.
    """

    squares: np.ndarray
    """Squared error of the next observation in normalized units, mean over its entries."""
    reward_squares: np.ndarray
    """Squared error of the normalized reward."""
    missed: np.ndarray
    """1 where terminal in the simulator only, else 0."""
    false: np.ndarray
    """1 where terminal in imagination only, else 0."""

    def first(self, num_steps: int) -> TransitionErrors:
        """Return those of the first transitions."""
        return TransitionErrors(*(part[:, :num_steps] for part in vars(self).values()))

    def steps(self) -> list[TransitionErrors]:
        """Return those of each transition, T times [N, 1]."""
        return [
            TransitionErrors(*(part[:, t : t + 1] for part in vars(self).values()))
            for t in range(self.squares.shape[1])
        ]

    @property
    def num_observations(self) -> int:
        """Next observations that count."""
        return int(np.isfinite(self.squares).sum())

    @property
    def num_transitions(self) -> int:
        """Transitions that count."""
        return int(np.isfinite(self.missed).sum())

    @property
    def share_left_out(self) -> float:
        """Share of the next observations that do not count."""
        return 1.0 - self.num_observations / self.squares.size

    @property
    def mse(self) -> float | None:
        """Mean of `squares`; None where none counts."""
        return _mean(self.squares)

    @property
    def standard_error(self) -> float | None:
        """Of `mse`, from the spread over trajectories; None where fewer than 2 count."""
        counts = np.isfinite(self.squares).sum(axis=1)
        if (counts > 0).sum() < 2:
            return None
        deviations = np.nansum(self.squares, axis=1) - self.mse * counts
        return float(np.sqrt(np.square(deviations).sum()) / counts.sum())

    def quantile(self, share: float) -> float | None:
        """Return a quantile of `squares`, over trajectories and transitions alike; None where none
        counts."""
        counted = self.squares[np.isfinite(self.squares)]
        return float(np.quantile(counted, share)) if len(counted) else None

    @property
    def reward_mse(self) -> float | None:
        """Mean of `reward_squares`; None where none counts."""
        return _mean(self.reward_squares)

    @property
    def terminal_agreement(self) -> float | None:
        """Share of the transitions that are terminal in both or in neither."""
        wrong = _mean(self.missed + self.false)
        return None if wrong is None else 1.0 - wrong


@dataclass(frozen=True)
class DynamicsReport:
    """Errors of imagined trajectories, and the simulator's own beside them."""

    horizons: tuple[int, ...]
    imagined: TransitionErrors
    """Of the longest horizon."""
    floor: TransitionErrors
    """What the simulator makes of recorded real actions from recorded states: an error that no
    model can be measured below."""
    num_episodes: int
    """From which the starts are."""
    is_native: bool
    """Whether mujoco.rollout simulated, or gymnasium's loop."""
    num_blown_up: int
    """Trajectories whose simulation blew up; they count up to there."""

    def summary(self) -> dict[str, Any]:
        """Return numbers by name, then by horizon h: of steps 1 to h - 1 together."""
        both = {
            str(h): (self.imagined.first(h - 1), self.floor.first(h - 1)) for h in self.horizons
        }

        def each(of: Any) -> dict[str, Any]:
            return {h: of(*pair) for h, pair in both.items()}

        return {
            "mse": each(lambda errors, floor: errors.mse),
            "floor": each(lambda errors, floor: floor.mse),
            "standard_error": each(lambda errors, floor: errors.standard_error),
            "median": each(lambda errors, floor: errors.quantile(0.5)),
            "floor_median": each(lambda errors, floor: floor.quantile(0.5)),
            "reward_mse": each(lambda errors, floor: errors.reward_mse),
            "reward_floor": each(lambda errors, floor: floor.reward_mse),
            "terminal_agreement": each(lambda errors, floor: errors.terminal_agreement),
            "missed_terminals": each(lambda errors, floor: _mean(errors.missed)),
            "false_terminals": each(lambda errors, floor: _mean(errors.false)),
            "left_out": each(lambda errors, floor: errors.share_left_out),
        }

    def rows(self) -> list[dict[str, float | None]]:
        """Return one row per step 1 to H - 1: of the observation at this step, and of reward and
        terminal flag of the transition to it."""
        return [
            {
                "step": t,
                "num": errors.num_observations,
                "mse": errors.mse,
                "standard_error": errors.standard_error,
                "quartile_1": errors.quantile(0.25),
                "median": errors.quantile(0.5),
                "quartile_3": errors.quantile(0.75),
                "floor_num": floor.num_observations,
                "floor_mse": floor.mse,
                "floor_median": floor.quantile(0.5),
                "transitions": errors.num_transitions,
                "reward_mse": errors.reward_mse,
                "reward_floor": floor.reward_mse,
                "missed_terminals": _mean(errors.missed),
                "false_terminals": _mean(errors.false),
            }
            for t, (errors, floor) in enumerate(
                zip(self.imagined.steps(), self.floor.steps(), strict=True), 1
            )
        ]


def dynamics_table(report: DynamicsReport) -> str:
    """Return a report as lines of text."""
    columns = {
        "mse": "MSE",
        "standard_error": "(s.e.)",
        "median": "median",
        "floor": "floor MSE",
        "reward_mse": "reward MSE",
        "terminal_agreement": "terminals agree",
        "left_out": "left out",
    }
    summary = report.summary()
    widths = {name: max(10, len(heading) + 2) for name, heading in columns.items()}
    lines = [
        f"{'horizon':>8}" + "".join(f"{columns[name]:>{widths[name]}}" for name in columns),
    ]
    for horizon in map(str, report.horizons):
        cells = []
        for name, width in widths.items():
            value = summary[name][horizon]
            share = name in ("terminal_agreement", "left_out")
            text = "-" if value is None else f"{value:.2%}" if share else f"{value:.3g}"
            cells.append(f"{text:>{width}}")
        lines.append(f"{horizon:>8}" + "".join(cells))
    counted = report.imagined.num_observations
    total = report.imagined.squares.size
    lines.append(
        f"{counted:,} of {total:,} imagined observations count; the others follow an end, imagined "
        f"or simulated"
    )
    if report.num_blown_up:
        lines.append(f"{report.num_blown_up} simulations blew up and count up to there")
    return "\n".join(lines)


def check_horizons(horizons: Sequence[int], world_model: WorldModel) -> tuple[int, ...]:
    """Return the horizons in rising order, each once.

    Raises:
        InputError: none, one below 2, or one that the world model cannot imagine.
    """
    if not horizons:
        raise InputError("horizons must be at least one integer, got none")
    found = sorted({as_integer(horizon, "horizon", 2) for horizon in horizons})
    check_horizon(world_model, found[-1])
    return tuple(found)


def dynamics_report(
    environment: gymnasium.Env,
    world_model: WorldModel,
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    horizons: Sequence[int] = (10,),
    num: int = 256,
    seed: int = 0,
    batch_size: int = 1024,
    threads: int = 1,
    progress: bool = False,
) -> DynamicsReport:
    """Imagine trajectories from real states of fresh episodes of the policy, which no training has
    seen, and replay their actions, clipped to the bounds, in MuJoCo from the very same states.

    Args:
        environment: like the one trained on, of MuJoCo; it is reset, stepped and left as it then
            is.
        world_model, policy, normalizer, action_scaler: of the run; nothing of them changes.
        horizons: numbers of steps, at least 2 each; the model imagines the longest.
        num: trajectories.
        seed: of episodes, starts and imagination.
        batch_size: trajectories imagined at a time.
        threads: of `mujoco.rollout`.
        progress: show progress bars.

    Raises:
        InputError: an argument out of range, another kind of environment, a horizon that the model
            cannot imagine, or episodes shorter than it.
    """
    num, seed = as_integer(num, "num", 1), as_integer(seed, "seed", 0, below=2**32)
    horizons = check_horizons(horizons, world_model)
    replay = MujocoReplay(environment, threads, progress)
    windows = record_windows(
        replay, policy, normalizer, action_scaler, num, horizons[-1] - 1, seed, progress
    )
    device = normalizer.observations_mean.device
    batch = imagine(
        world_model,
        policy,
        normalizer.normalize(torch.from_numpy(windows.observations).to(device), "observations"),
        torch.Generator(device).manual_seed(seed),
        batch_size,
        horizons[-1],
        progress,
    )
    return windows_report(replay, windows, batch, normalizer, action_scaler, horizons)


def windows_report(
    replay: MujocoReplay,
    windows: RecordedWindows,
    batch: TrajectoryBatch,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    horizons: tuple[int, ...],
) -> DynamicsReport:
    """Compare a normalized batch that was imagined from the starts of windows with what the
    simulator makes of its actions, and the windows with what it makes of theirs.

    Args:
        replay: of the windows' environment.
        windows: of at least the longest horizon less one step.
        batch: of the longest horizon.
        horizons: in rising order.
    """
    num_steps = horizons[-1] - 1
    recorded = windows.actions[:, :num_steps]
    replay.check(windows.states, recorded)
    floor = replay.play(windows.states, recorded)
    actions = normalizer.unnormalize(batch.actions, "actions")[:, :num_steps].cpu().numpy()
    taken = action_scaler.to_environment(actions.reshape(-1, actions.shape[-1]))
    true = replay.play(windows.states, taken.reshape(actions.shape))
    return DynamicsReport(
        horizons,
        transition_errors(imagined_outcomes(batch, normalizer), true, normalizer),
        transition_errors(windows.played.first(num_steps), floor, normalizer),
        windows.num_episodes,
        replay.is_native,
        int((np.isnan(true.rewards) & ~true.terminals).any(axis=1).sum()),
    )


def imagined_outcomes(batch: TrajectoryBatch, normalizer: Normalizer) -> Played:
    """Return what a normalized batch of N trajectories of H steps says of their first H - 1
    transitions, raw."""
    observations, rewards, terminals = (
        normalizer.unnormalize(getattr(batch, name).double(), name).cpu().numpy()
        for name in ("observations", "rewards", "terminals")
    )
    return Played(observations[:, 1:], rewards[:, :-1], terminals[:, :-1] > 0.5)


def transition_errors(found: Played, true: Played, normalizer: Normalizer) -> TransitionErrors:
    """Compare transitions with the simulator's; see `TransitionErrors`."""
    scales, reward_scale = (
        getattr(normalizer, name).double().cpu().numpy()
        for name in ("observations_scale", "rewards_scale")
    )
    alive = [alive_steps(torch.from_numpy(each.terminals).int()).numpy() for each in (found, true)]
    counts = alive[0] & alive[1] & np.isfinite(true.rewards)
    goes_on = counts & ~found.terminals & ~true.terminals
    squares = np.square((found.observations - true.observations) / scales).mean(axis=-1)
    reward_squares = np.square((found.rewards - true.rewards) / reward_scale)
    return TransitionErrors(
        np.where(goes_on, squares, np.nan),
        np.where(counts, reward_squares, np.nan),
        np.where(counts, true.terminals & ~found.terminals, np.nan),
        np.where(counts, found.terminals & ~true.terminals, np.nan),
    )


def _mean(values: np.ndarray) -> float | None:
    counted = values[np.isfinite(values)]
    return float(counted.mean()) if len(counted) else None
