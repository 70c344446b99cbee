"""Worlds in which chance, or what an observation hides, decides what follows, with the truth to
compare imagined trajectories with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor

from harness.chance_tables import HORIZONS
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.policy_file import StoredPolicy, load_policy
from polygrad_fast.data.replay import ReplayBuffer
from polygrad_fast.diagnostics.mujoco_replay import MujocoReplay
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy

ENV_ID = "HalfCheetah-v5"
POLICY_FILE = Path(__file__).parents[1] / "policies" / f"{ENV_ID}.safetensors"
ACTION_NOISE = 0.3
"""Standard deviation of what the noisy environment adds to an action of [-1, 1]."""
POLICY_STD = 0.2
HIDDEN_STD = 0.5
POSITIONS = 8
"""Entries of HalfCheetah's observation that are positions; the others are velocities."""
WARM_UP = 50
"""Steps of an episode before a start of the noisy environment."""
CLONE_UPDATES = 2000

Policy = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sizes:
    """How much is played and compared."""

    steps: int = 30_000
    """Of the data."""
    starts: int = 32
    draws: int = 64
    """True and imagined trajectories from each start."""


@dataclass(frozen=True)
class Episode:
    """Steps of one episode: observations [T, S], actions [T, A], rewards [T]."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class Task:
    """What models learn from, and what they are asked.

    Args:
        episodes: the data, none of which ends by a terminal state.
        policy: that imagined trajectories follow.
        bounds: of its actions.
        starts: observations [M, S].
        draws: N, trajectories from each start.
        truth, again: observations [M, N, S] of true trajectories by steps after the start, twice:
            their distance is what two samples of the same distribution show.
        moments: exact mean [M, S] and covariance [M, S, S], where known.
    """

    episodes: list[Episode]
    policy: Policy
    bounds: tuple[np.ndarray, np.ndarray]
    starts: Tensor
    draws: int
    truth: Mapping[int, Tensor]
    again: Mapping[int, Tensor]
    moments: Mapping[int, tuple[Tensor, Tensor]] | None = None

    def replay(self, horizon: int) -> ReplayBuffer:
        """Return the data as a replay buffer of windows."""
        first = self.episodes[0]
        capacity = sum(len(episode.rewards) for episode in self.episodes)
        dims = first.observations.shape[1], first.actions.shape[1]
        buffer = ReplayBuffer(capacity, horizon, *dims)
        for episode in self.episodes:
            last = len(episode.rewards) - 1
            rows = zip(episode.observations, episode.actions, episode.rewards, strict=True)
            for t, (observation, action, reward) in enumerate(rows):
                buffer.add(observation, action, float(reward), False, t == last)
        return buffer

    def normalizer(self) -> Normalizer:
        """Return the moments of the data."""
        columns = (
            np.concatenate([getattr(episode, name) for episode in self.episodes])
            for name in ("observations", "actions", "rewards")
        )
        observations, actions, rewards = ((c.mean(0), c.std(0)) for c in columns)
        return Normalizer.from_moments(observations, actions, rewards, (0.0, 0.1))


# A linear-Gaussian system: o' = MOVES o + PUSHES a + CHANCE w, reward o[0]; two damped rotations,
# whose chance is correlated within each. Under its policy an influence of o is halved in 12 steps.
MOVES = np.array(
    [[0.95, 0.24, 0.05, 0.0], [-0.24, 0.95, 0.0, 0.05], [0.0, 0.0, 0.8, 0.5], [0.0, 0.0, -0.5, 0.8]]
)
PUSHES = np.array([[0.1, 0.0], [0.0, 0.1], [0.1, 0.1], [0.0, 0.2]])
CHANCE = 0.15 * np.array(
    [[1.0, 0.0, 0.0, 0.0], [0.9, 0.436, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, -0.9, 0.436]]
)
GAIN = np.array([[-0.3, 0.1, 0.0, 0.0], [0.0, -0.3, 0.1, 0.0]])
LINEAR_STD = 0.5
EPISODE = 200


def linear_policy(observations: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean GAIN o and standard deviation of the linear system's policy."""
    mean = observations @ torch.as_tensor(GAIN.T, dtype=observations.dtype)
    return mean, torch.full_like(mean, LINEAR_STD)


def linear_moments(starts: np.ndarray, horizon: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return mean [M, S] and covariance [S, S] after 0, 1, .. horizon steps under the policy."""
    closed = MOVES + PUSHES @ GAIN
    added = CHANCE @ CHANCE.T + LINEAR_STD**2 * PUSHES @ PUSHES.T
    mean, covariance = starts, np.zeros((4, 4))
    found = [(mean, covariance)]
    for _ in range(horizon):
        mean, covariance = mean @ closed.T, closed @ covariance @ closed.T + added
        found.append((mean, covariance))
    return found


def play_linear(
    starts: np.ndarray, steps: int, std: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return observations [B, T + 1, S] and actions [B, T, A] of the linear system."""
    observations, actions = [starts], []
    for _ in range(steps):
        now = observations[-1]
        action = now @ GAIN.T + std * generator.standard_normal((len(now), 2))
        chance = generator.standard_normal(now.shape) @ CHANCE.T
        observations.append(now @ MOVES.T + action @ PUSHES.T + chance)
        actions.append(action)
    return np.stack(observations, axis=1), np.stack(actions, axis=1)


def linear_task(sizes: Sizes) -> Task:
    """Data by a wider policy than the one that is imagined; mean and covariance are exact, which
    takes more draws from fewer starts."""
    generator = np.random.default_rng(0)
    wide, horizon = 2 * LINEAR_STD, max(HORIZONS)
    begin = generator.standard_normal((-(-sizes.steps // EPISODE), 4))
    observations, actions = play_linear(begin, EPISODE, wide, generator)
    episodes = [Episode(o[:-1], a, o[:-1, 0]) for o, a in zip(observations, actions, strict=True)]
    starts, draws = observations[: sizes.starts // 4, EPISODE // 2], 8 * sizes.draws
    repeated = np.repeat(starts, draws, axis=0)
    exact = linear_moments(starts, horizon)
    shape = len(starts), draws, 4

    def draw() -> dict[int, Tensor]:
        played, _ = play_linear(repeated, horizon, LINEAR_STD, generator)
        return {h: _tensor(played[:, h].reshape(shape)) for h in HORIZONS}

    return Task(
        episodes,
        linear_policy,
        (np.full(2, -100, np.float32), np.full(2, 100, np.float32)),
        _tensor(starts),
        draws,
        draw(),
        draw(),
        {h: (_tensor(exact[h][0]), _tensor(exact[h][1]).expand(len(starts), 4, 4))
         for h in HORIZONS},
    )  # fmt: skip


def clone(stored: StoredPolicy, observations: np.ndarray, std: float) -> GaussianPolicy:
    """Return a policy of this library that acts about as the stored one's mean does at
    observations [N, S], with a standard deviation of its own."""
    torch.manual_seed(0)
    policy = _constant_std(*stored.dims, std)
    inputs, means = _tensor(observations), _tensor(stored.act(observations))
    optimizer = torch.optim.Adam(policy.network.parameters(), 1e-3)
    for _ in range(CLONE_UPDATES):
        rows = torch.randint(len(inputs), (256,))
        loss = (policy(inputs[rows])[0] - means[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy.requires_grad_(False)


def _constant_std(observation_dim: int, action_dim: int, std: float) -> GaussianPolicy:
    return GaussianPolicy(observation_dim, action_dim, 64).with_std(std)


class _Noisy:
    """HalfCheetahs, side by side, whose motors add noise that no one sees."""

    def __init__(self, num: int):
        self.environments = [make_environment(ENV_ID) for _ in range(num)]
        self.bare = [environment.unwrapped for environment in self.environments]
        self.generator = np.random.default_rng(0)

    def reset(self) -> np.ndarray:
        """Begin an episode in each; return observations [B, S]."""
        seeds = self.generator.integers(2**31, size=len(self.bare)).tolist()
        first = [bare.reset(seed=seed)[0] for bare, seed in zip(self.bare, seeds, strict=True)]
        return np.array(first, dtype=np.float32)

    def step(self, means: np.ndarray, std: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw actions at these means [B, A] and take them; return them, clipped, and rewards [B]
        and observations [B, S] that follow."""
        normals = self.generator.standard_normal((2, *means.shape))
        actions = np.clip(means + std * normals[0], -1, 1)
        moved = np.clip(actions + ACTION_NOISE * normals[1], -1, 1)
        found = [bare.step(action)[:2] for bare, action in zip(self.bare, moved, strict=True)]
        observations, rewards = zip(*found, strict=True)
        return actions, np.array(rewards), np.array(observations, dtype=np.float32)

    def episodes(self, stored: StoredPolicy, length: int, std: float) -> list[Episode]:
        """Play one in each by a stored policy's mean and noise of this standard deviation."""
        observations, rows = self.reset(), []
        for _ in range(length):
            actions, rewards, following = self.step(stored.act(observations), std)
            rows.append((observations, actions, rewards))
            observations = following
        columns = [np.stack(column, axis=1) for column in zip(*rows, strict=True)]
        return [Episode(*(column[i] for column in columns)) for i in range(len(self.bare))]


def noisy_actions_task(sizes: Sizes) -> Task:
    """Noise is added to HalfCheetah's actions; data by the stored policy with less and more noise
    of its own than is imagined."""
    stored = load_policy(POLICY_FILE, ENV_ID)
    world = _Noisy(sizes.draws)
    levels = (0.5 * POLICY_STD, POLICY_STD, 3 * POLICY_STD)
    length = max(sizes.steps // (len(levels) * sizes.draws), max(HORIZONS) + 1)
    episodes = [episode for std in levels for episode in world.episodes(stored, length, std)]
    seen = np.concatenate([episode.observations for episode in episodes])
    policy = clone(stored, seen, POLICY_STD)
    replays = [MujocoReplay(environment) for environment in world.environments]

    def means(observations: np.ndarray) -> np.ndarray:
        return policy(torch.from_numpy(observations))[0].numpy()

    starts, states = [], []
    while len(starts) < sizes.starts:
        observations = world.reset()
        for _ in range(WARM_UP):
            *_, observations = world.step(means(observations), POLICY_STD)
        starts += list(observations)
        states += [replay.state() for replay in replays]
    starts, states = np.array(starts[: sizes.starts]), states[: sizes.starts]

    def draw() -> dict[int, Tensor]:
        found: dict[int, list[np.ndarray]] = {h: [] for h in HORIZONS}
        for start, state in zip(starts, states, strict=True):
            for replay in replays:
                replay.set(state)
            observations = np.tile(start, (sizes.draws, 1))
            for t in range(1, max(HORIZONS) + 1):
                *_, observations = world.step(means(observations), POLICY_STD)
                if t in found:
                    found[t].append(observations)
        return {h: _tensor(np.array(observed)) for h, observed in found.items()}

    return Task(episodes, policy, stored.bounds, _tensor(starts), sizes.draws, draw(), draw())


def _random_policy(observation_dim: int, action_dim: int, std: float) -> GaussianPolicy:
    """Return a policy whose mean is 0 at every observation."""
    policy = _constant_std(observation_dim, action_dim, std).requires_grad_(False)
    policy.network[-1].weight.zero_()
    policy.network[-1].bias.zero_()
    return policy


def hidden_velocities_task(sizes: Sizes) -> Task:
    """HalfCheetah's positions without its velocities, under random actions: many starts, one true
    trajectory from each, that of data held out."""
    environment: gymnasium.Env = make_environment(ENV_ID)
    generator = np.random.default_rng(0)
    length, horizon = min(500, sizes.steps // 4), max(HORIZONS)

    def play(count: int) -> list[Episode]:
        episodes = []
        for _ in range(count):
            observation, _ = environment.reset(seed=int(generator.integers(2**31)))
            rows = []
            for _ in range(length):
                action = np.clip(HIDDEN_STD * generator.standard_normal(6), -1, 1)
                following, reward, *_ = environment.step(action.astype(np.float32))
                rows.append((observation[:POSITIONS], action, reward))
                observation = following
            episodes.append(Episode(*(np.array(column) for column in zip(*rows, strict=True))))
        return episodes

    def windows(episodes: list[Episode], num: int) -> np.ndarray:
        """Return windows [num, horizon + 1, S] at places drawn at random."""
        which = generator.integers(len(episodes), size=num)
        first = generator.integers(length - horizon, size=num)
        return np.stack(
            [
                episodes[i].observations[t : t + horizon + 1]
                for i, t in zip(which, first, strict=True)
            ]
        )

    episodes = play(-(-sizes.steps // length))
    num = sizes.starts * sizes.draws
    held_out = [windows(play(len(episodes) // 2), num) for _ in range(2)]
    truth, again = (
        {h: _tensor(np.concatenate([found[:, 0], found[:, h]], axis=1))[None] for h in HORIZONS}
        for found in held_out
    )
    bounds = environment.action_space.low, environment.action_space.high
    policy = _random_policy(POSITIONS, len(bounds[0]), HIDDEN_STD)
    return Task(episodes, policy, bounds, _tensor(held_out[0][:, 0]), 1, truth, again)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float32)


TASKS = {
    "linear-Gaussian": linear_task,
    "noisy actions": noisy_actions_task,
    "hidden velocities": hidden_velocities_task,
}


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples [M, N, S], mean over M (Szekely and
    Rizzo 2013); 0 only for equal samples, and above 0 also for two of one distribution."""
    between, own, other = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return (2 * between - own - other).item()


def score(task: Task, observations: Tensor, scale: Tensor) -> dict[str, float]:
    """Return how far imagined observations are from the true ones, at each of `HORIZONS` that they
    reach: names end in its number.

    - energy: distance of the observations in normalized units; where there is one trajectory per
      start, of observations joined with their starts.
    - mean_error, std_error: root mean square over starts and entries, in units of the data's
      deviation; not where there is one trajectory per start.
    - covariance_error: Frobenius norm of the error over that of the truth, mean over starts; where
      the truth is known.

    Args:
        observations: imagined, [M N, H, S], the start first, trajectories of a start together.
        scale: of the data, [S].
    """
    num, draws = len(task.starts), task.draws
    found = {}
    for h in HORIZONS:
        if h >= observations.shape[1]:
            continue
        imagined, truth = observations[:, h], task.truth[h]
        if draws == 1:
            joined = torch.cat([task.starts, imagined], dim=1)[None] / scale.repeat(2)
            found[f"energy_{h}"] = energy_distance(joined, truth / scale.repeat(2))
            continue
        imagined = imagined.view(num, draws, -1)
        found[f"energy_{h}"] = energy_distance(imagined / scale, truth / scale)
        mean, covariance = _moments(truth) if task.moments is None else task.moments[h]
        own_mean, own_covariance = _moments(imagined)
        stds = [c.diagonal(dim1=-2, dim2=-1).sqrt() for c in (own_covariance, covariance)]
        found[f"mean_error_{h}"] = _rms((own_mean - mean) / scale)
        found[f"std_error_{h}"] = _rms((stds[0] - stds[1]) / scale)
        if task.moments is not None:
            error = torch.linalg.matrix_norm(own_covariance - covariance)
            norm = torch.linalg.matrix_norm(covariance)
            found[f"covariance_error_{h}"] = (error / norm).mean().item()
    return found


def floor(task: Task, scale: Tensor) -> dict[str, float]:
    """Return what `score` says of the second true sample."""
    joined = torch.zeros(len(task.starts) * task.draws, max(HORIZONS) + 1, len(scale))
    for h, found in task.again.items():
        joined[:, h] = found.reshape(len(joined), -1)[:, -len(scale) :]
    if task.draws == 1:  # the second sample has starts of its own
        scales = scale.repeat(2)
        return {
            f"energy_{h}": energy_distance(task.again[h] / scales, task.truth[h] / scales)
            for h in HORIZONS
        }
    return score(task, joined, scale)


def _moments(observations: Tensor) -> tuple[Tensor, Tensor]:
    mean = observations.mean(1)
    centered = observations - mean[:, None]
    return mean, centered.mT @ centered / observations.shape[1]


def _rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()
