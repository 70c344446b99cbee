"""Environment steps, dynamics replay in the simulator, and windows of the replay buffer.

    pytest benchmarks/bench_data.py --benchmark-only --rows rows.jsonl

- Environment steps: `ResumableEnvironment`, which the agent acts in, beside the bare gymnasium
  environment on the same actions.
- Dynamics replay: from each of several given states (positions and velocities), H given actions in
  the MuJoCo simulator. The simulator's share of the paper's dynamics error, which the library does
  not have yet.
- Replay windows: one batch of training windows from a full buffer.
"""

import gymnasium
import numpy as np
import pytest
import torch

from harness.work import Work
from polygrad_fast.data import ReplayBuffer, ResumableEnvironment, make_environment

try:
    import mujoco
except ImportError:
    mujoco = None

CPU = torch.device("cpu")
ENVIRONMENTS = ("InvertedPendulum-v5", "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")


def step_cases(setting):
    """Return environments and numbers of steps."""
    if setting.smoke:
        return [(0, {"env_id": "Pendulum-v1", "steps": 20})]
    return [(2, {"env_id": env_id, "steps": 500}) for env_id in ENVIRONMENTS]


def replay_cases(setting):
    """Return environments, numbers of trajectories and horizons."""
    if setting.smoke:
        return [(0, {"env_id": "InvertedPendulum-v5", "trajectories": 3, "horizon": 4})]
    return [
        (importance, {"env_id": env_id, "trajectories": 600 // horizon, "horizon": horizon})
        for importance, horizon in ((2, 10), (3, 50), (4, 200))
        for env_id in ENVIRONMENTS
    ]


def window_cases(setting):
    """Return batch sizes and horizons."""
    if setting.smoke:
        return [(0, {"batch": 5, "horizon": 3})]
    return [(2, {"batch": 256, "horizon": 10}), (4, {"batch": 256, "horizon": 200})]


@pytest.mark.cases(of=step_cases)
def test_environment_steps(bench, env_id, steps):
    with bench.case("environment step", "float64", device=CPU, env_id=env_id) as case:
        wrapped = ResumableEnvironment(make_environment(env_id), seed=0)
        bare = gymnasium.make(env_id)
        actions = [bare.action_space.sample() for _ in range(steps)]

        def play_wrapped(record=None):
            wrapped.reset()
            for action in actions:
                observation, *numbers = wrapped.step(action)
                if record is not None:
                    seed = wrapped.state_dict()["episode_seed"]
                    record.append((seed, np.append(observation, numbers)))
                if not wrapped.running:
                    wrapped.reset()

        def play_bare(seeds=None, record=None):
            bare.reset(seed=seeds[0] if seeds else None)
            for i, action in enumerate(actions):
                observation, reward, terminated, truncated, _ = bare.step(action)
                if record is not None:
                    numbers = reward, terminated, truncated
                    record.append(np.append(observation.astype(np.float32), numbers))
                if terminated or truncated:
                    bare.reset(seed=seeds[min(i + 1, steps - 1)] if seeds else None)

        def largest_difference() -> float:
            mine, theirs = [], []
            play_wrapped(mine)
            play_bare([seed for seed, _ in mine], theirs)
            return np.abs(np.array([numbers for _, numbers in mine]) - theirs).max()

        case.check("largest difference from the bare environment", largest_difference(), 0.0)
        case.time(play_wrapped, 1, "step", repeats=steps, beside={"bare": play_bare}, seconds=0.6)


class Simulator:
    """A MuJoCo environment without limits of time, and a recording of it."""

    def __init__(self, env_id: str):
        self.env = make_environment(env_id).unwrapped  # says so where mujoco is missing
        self.env.reset(seed=0)
        self.env.action_space.seed(0)

    def _begin(self, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Set the state and nothing else: what the solver remembers of the steps before (its warm
        start) changes results by rounding, which contacts amplify to 1e-2 within 50 steps."""
        mujoco.mj_resetData(self.env.model, self.env.data)
        self.env.set_state(positions, velocities)

    def record(self, trajectories: int, horizon: int):
        """Return states (positions, velocities), actions [N, H, A] and next observations [N, H, S]
        of random actions, episodes begun anew after each trajectory."""
        starts, actions, observations = [], [], []
        for seed in range(trajectories):
            self.env.reset(seed=seed)
            for _ in range(3):  # away from rest
                self.env.step(self.env.action_space.sample())
            starts.append((self.env.data.qpos.copy(), self.env.data.qvel.copy()))
            self._begin(*starts[-1])
            actions.append([self.env.action_space.sample() for _ in range(horizon)])
            observations.append([self.env.step(action)[0] for action in actions[-1]])
        return starts, np.array(actions), np.array(observations)

    def replay(self, starts, actions) -> np.ndarray:
        """Return the observations [N, H, S] after each of the actions from each start."""
        observations = []
        for (positions, velocities), sequence in zip(starts, actions, strict=True):
            self._begin(positions, velocities)
            observations.append([self.env.step(action)[0] for action in sequence])
        return np.array(observations)


@pytest.mark.cases(of=replay_cases)
def test_dynamics_replay(bench, env_id, trajectories, horizon):
    names = {"env_id": env_id, "trajectories": trajectories, "horizon": horizon}
    with bench.case("dynamics replay", "float64", device=CPU, **names) as case:
        simulator = Simulator(env_id)
        starts, actions, observations = simulator.record(trajectories, horizon)

        def largest_difference() -> float:
            return np.abs(simulator.replay(starts, actions) - observations).max()

        case.check("largest difference from the recording", largest_difference(), 0.0)
        steps = trajectories * horizon
        case.time(lambda: simulator.replay(starts, actions), 1, "step", repeats=steps, seconds=0.3)


@pytest.mark.cases(of=window_cases)
def test_replay_windows(bench, batch, horizon):
    with bench.case("replay windows", "float32", batch=batch, horizon=horizon) as case:
        observation_dim, action_dim, capacity = 17, 6, 64 if bench.session.small else 8192
        replay = ReplayBuffer(capacity, horizon, observation_dim, action_dim, bench.device)
        last = {}  # last step of each step's episode
        begin, length = 0, 2 * horizon
        for n in range(capacity):
            ends = n - begin == length - 1
            observation = np.full(observation_dim, n, np.float32)
            replay.add(observation, np.full(action_dim, -n, np.float32), 2.0 * n, ends, False)
            if ends or n == capacity - 1:
                last |= dict.fromkeys(range(begin, n + 1), n)
                begin, length = n + 1, 2 * horizon + n % 7

        def largest_difference() -> float:
            windows = replay.sample(batch)
            steps = windows.observations[:, 0, 0].long().tolist()
            wanted = torch.tensor(
                [[min(n + t, last[n]) for t in range(horizon)] for n in steps], device=bench.device
            )
            padded = torch.tensor(
                [[n + t > last[n] for t in range(horizon)] for n in steps], device=bench.device
            )
            ended = torch.tensor(
                [[n + t >= last[n] != capacity - 1 for t in range(horizon)] for n in steps],
                device=bench.device,
            )
            differences = (
                windows.observations - wanted[..., None],
                windows.actions + wanted[..., None],
                windows.rewards - 2.0 * wanted * ~padded,
                windows.terminals - ended.float(),
            )
            return torch.stack([d.abs().max() for d in differences]).max().item()

        case.check("largest difference from the steps added", largest_difference(), 0.0)
        starts = replay.sample(batch).observations[:, 0, 0]
        case.check("share of repeated starts", 1 - len(starts.unique()) / batch, 0.5)
        moved = 2 * 4 * batch * horizon * (observation_dim + action_dim + 2)
        case.time(lambda: replay.sample(batch), batch, "window", Work(bytes=moved), seconds=0.3)
