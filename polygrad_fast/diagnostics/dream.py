"""One imagined trajectory beside the real one of the same actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from polygrad_fast.arguments import as_integer
from polygrad_fast.data import ActionScaler
from polygrad_fast.data.environment import (
    check_spaces,
    environment_name,
    reset_environment,
    step_environment,
)
from polygrad_fast.diagnostics.episodes import draw_action
from polygrad_fast.diagnostics.rollouts import imagine
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.world_models import WorldModel, check_horizon

CHECKED_STEPS = 256
"""Fresh steps by which it is checked that observations fix the pose."""
_STREAM = 17
"""Parts the seeds of these episodes from those of training and evaluation."""


@dataclass(frozen=True)
class Dream:
    """H observations of a trajectory, imagined and real, from one start under the same actions.

    Past an end each of them stays as it was.
    """

    imagined: np.ndarray  # [H, S], raw
    real: np.ndarray  # [H, S], raw
    errors: np.ndarray
    """Squared error in normalized units, mean over the entries, [H]; NaN past an end of either."""
    imagined_length: int
    """Observations up to the imagined end, or H."""
    real_length: int
    frames: list[tuple[np.ndarray, np.ndarray]]
    """H pairs of pictures, imagined and real, uint8 [height, width, 3]; empty without a renderer of
    poses."""


class _Stage:
    """An environment with a policy in it."""

    def __init__(
        self,
        environment: gymnasium.Env,
        policy: Any,
        normalizer: Normalizer,
        action_scaler: ActionScaler,
        seed: int,
    ):
        self.environment, self.name = environment, environment_name(environment)
        self._policy, self._normalizer, self._scaler = policy, normalizer, action_scaler
        self._size, _ = check_spaces(environment)
        seeds = np.random.default_rng([_STREAM, seed])
        self._seeds, self._noise = seeds, torch.Generator().manual_seed(int(seeds.integers(2**63)))

    def reset(self) -> np.ndarray:
        """Begin another episode."""
        seed = int(self._seeds.integers(2**31))
        return reset_environment(self.environment, seed, self._size, f"{self.name}, reset")

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Draw an action, in the environment's units."""
        return draw_action(self._policy, self._normalizer, self._scaler, observation, self._noise)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Take an action in the environment's units."""
        return step_environment(self.environment, action, self._size, self.name)


def pose_simulator(
    environment: gymnasium.Env,
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    seed: int = 0,
) -> Simulator | None:
    """Return the environment as a simulator that takes the pose an observation shows, checked by
    fresh steps of the policy; None where observations do not fix it."""
    stage = _Stage(environment, policy, normalizer, action_scaler, seed)
    steps = []
    observation = stage.reset()
    while len(steps) < CHECKED_STEPS:
        action = stage.act(observation)
        following, reward, terminated, truncated = stage.step(action)
        steps.append((observation, action, reward, float(terminated), following))
        observation = stage.reset() if terminated or truncated else following
    columns = [np.array(column) for column in zip(*steps, strict=True)]
    scales = tuple(
        getattr(normalizer, name).cpu().numpy() for name in ("observations_scale", "rewards_scale")
    )
    try:
        return Simulator(environment, *columns, scales)
    except InputError:
        return None


def dream(
    environment: gymnasium.Env,
    simulator: Simulator | None,
    world_model: WorldModel,
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    horizon: int,
    start: int = 0,
    seed: int = 0,
) -> Dream:
    """Imagine one trajectory from a real state and play its actions, clipped to the bounds, in the
    environment itself, which is in that state.

    Args:
        environment: is reset, stepped and left as it then is; with a simulator, its `render`
            returns pictures.
        simulator: `pose_simulator` of this environment: then there are frames; or None.
        world_model, policy, normalizer, action_scaler: of the run; nothing of them changes.
        horizon: H, at least 2.
        start: steps of the policy before.
        seed: of the episode, its actions and the imagination.

    Raises:
        InputError: an argument out of range, or an episode that ends before the start.
        NonFiniteError: something imagined is not finite.
    """
    horizon = check_horizon(world_model, as_integer(horizon, "horizon", 2))
    start, seed = as_integer(start, "start", 0), as_integer(seed, "seed", 0, below=2**32)
    stage = _Stage(environment, policy, normalizer, action_scaler, seed)
    observation = stage.reset()
    for step in range(start):
        observation, _, terminated, truncated = stage.step(stage.act(observation))
        if terminated or truncated:
            raise InputError(
                f"start must lie within the episode of {stage.name}, which ended after {step + 1} "
                f"steps, got {start}; another seed gives another episode"
            )
    device = normalizer.observations_mean.device
    batch = imagine(
        world_model,
        policy,
        normalizer.normalize(torch.from_numpy(observation)[None].to(device), "observations"),
        torch.Generator(device).manual_seed(seed),
        1,
        horizon,
    )
    imagined, actions, terminals = (
        normalizer.unnormalize(getattr(batch, name)[0], name).cpu().numpy()
        for name in ("observations", "actions", "terminals")
    )
    hidden = None if simulator is None else simulator.hidden()
    real, real_length, real_frames = _play(
        stage, observation, action_scaler.to_environment(actions[:-1]), simulator is not None
    )
    ends = np.flatnonzero(terminals[:-1] > 0.5)
    imagined_length = int(ends[0]) + 1 if len(ends) else horizon
    imagined[imagined_length:] = imagined[imagined_length - 1]
    frames = []
    if simulator is not None:
        shown = _pictures(simulator, imagined[:imagined_length], hidden)
        shown += [shown[-1]] * (horizon - imagined_length)
        frames = list(zip(shown, real_frames, strict=True))
    scale = normalizer.observations_scale.cpu().numpy()
    errors = np.square((imagined - real) / scale).mean(axis=1)
    errors[min(imagined_length, real_length) :] = np.nan
    return Dream(imagined, real, errors, imagined_length, real_length, frames)


def _play(
    stage: _Stage, observation: np.ndarray, actions: np.ndarray, renders: bool
) -> tuple[np.ndarray, int, list[np.ndarray]]:
    """Return observations [T + 1, S] of T actions, how many come up to an end, and pictures."""
    observations, frames, length = [observation], [], 1

    def show() -> None:
        if renders:
            frames.append(np.asarray(stage.environment.render()))

    show()
    for action in actions:
        if length == len(observations):
            observation, _, terminated, _ = stage.step(action)
            show()
            length += not terminated
        elif renders:
            frames.append(frames[-1])  # of the end itself
        observations.append(observation)
    return np.array(observations), length, frames


def _pictures(
    simulator: Simulator, observations: np.ndarray, hidden: np.ndarray
) -> list[np.ndarray]:
    """Return pictures of the poses that observations [T, S] show; what they hide moves on by their
    velocities."""
    frames = []
    for t, observation in enumerate(observations):
        hidden = simulator.moved(hidden, observation) if t else hidden
        simulator.set(observation, hidden)
        frames.append(np.asarray(simulator.environment.render()))
    return frames
