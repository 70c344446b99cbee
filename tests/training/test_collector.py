"""Several training environments: every step counted, stored and resumed as of one of them."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast.evaluation.environments import check_new
from polygrad_fast.training.environments import training_environments
from polygrad_fast.training.estimate import num_updates

LENGTHS = ((4, "terminated"), (6, "truncated"), (9, "terminated"), (5, "truncated"))


class Numbered(gymnasium.Env):
    """Observation (t, episode, number of the environment); the reward says all three."""

    def __init__(self, number: int):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,))
        self.number, self.episode, self.steps = number, -1, 0

    def reset(self, *, seed=None, options=None):
        self.t, self.episode = 0, self.episode + 1
        return self._observation(), {}

    def step(self, action):
        reward = self.t + 100.0 * self.episode + 10_000.0 * self.number
        length, end = LENGTHS[(self.episode + self.number) % len(LENGTHS)]
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t == length
        return self._observation(), reward, over and end == "terminated", over, {}

    def _observation(self):
        return np.array([self.t, self.episode, self.number], dtype=np.float32)


class Begun(gymnasium.Wrapper):
    """Steps in this process, at the time that a process would be asked to."""

    def __init__(self, env):
        super().__init__(env)
        self.begun = None

    def start(self, action):
        assert self.begun is None
        self.begun = self.env.step(action)

    def step(self, action):
        result, self.begun = self.begun or self.env.step(action), None
        return result

    def reset(self, **options):
        self.begun = None
        return self.env.reset(**options)


def numbered() -> callable:
    """A function that makes environments of ascending numbers, those to evaluate on as well."""
    numbers = itertools.count()
    return lambda: Numbered(next(numbers))


def weights_of(agent: pg.PolyGRAD) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.training.weights().items()}


def assert_same(wanted: pg.PolyGRAD, got: pg.PolyGRAD) -> None:
    found = weights_of(got)
    for name, tensor in weights_of(wanted).items():
        assert torch.equal(tensor, found[name]), name
    ours, theirs = (agent.replay.state_dict() for agent in (wanted, got))
    for name in ("steps", "starts", "waiting", "episode_starts"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_no_window_crosses_environments_or_episodes(num_envs):
    config = tiny_config(horizon=3, num_envs=num_envs, eval_interval=1000, total_timesteps=100)
    agent = pg.PolyGRAD(numbered(), config=config, eval_env=Numbered(99))
    updates = []
    update = agent.world_model.update
    agent.world_model.update = lambda windows, generator: (
        updates.append(windows) or update(windows, generator)
    )
    agent.learn(100)
    environments = [each.env for each in agent.training.collector.environments]
    assert [env.steps for env in environments] == [
        len(range(i, 100, num_envs)) for i in range(num_envs)
    ]
    assert agent.num_timesteps == agent.replay.total_steps == 100
    per_step = config.world_model_training.updates_per_env_step
    assert len(updates) == 5 + num_updates(100 - config.learning_starts, per_step)
    for windows in updates:
        t, episode, number = windows.observations.unbind(-1)  # [B, H]
        assert (episode == episode[:, :1]).all() and (number == number[:, :1]).all()
        padded = windows.terminals.cumsum(1) - windows.terminals > 0
        assert torch.equal(t.diff(dim=1) == 1, ~padded[:, 1:])
        wanted = t + 100 * episode + 10_000 * number
        assert torch.equal(windows.rewards, wanted.masked_fill(padded, 0.0))
    seen = torch.cat([windows.observations for windows in updates])[..., 2]
    assert set(seen.flatten().tolist()) == {float(env.number) for env in environments}
    assert agent.replay.num_episodes == sum(
        env.episode + (env.t == LENGTHS[(env.episode + env.number) % len(LENGTHS)][0])
        for env in environments
    )


@pytest.mark.parametrize("options", [{"num_envs": 3}, {"env_processes": True}])
def test_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path, options):
    """From a checkpoint in the middle of a round."""
    config = tiny_config(checkpoint_interval=55, policy_delay_steps=0, **options)
    whole = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "whole")
    whole.learn(55)
    whole.learn(40)
    part = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "part")
    part.learn(55)
    resumed = pg.PolyGRAD.resume(tmp_path / "part")
    resumed.learn(40)
    assert_same(whole, resumed)
    for ours, theirs in zip(
        whole.training.collector.environments,
        resumed.training.collector.environments,
        strict=True,
    ):
        assert np.array_equal(ours.observation, theirs.observation)
        assert ours.episode_length == theirs.episode_length > 0


def begun_agent(config: pg.TrainConfig, make) -> pg.PolyGRAD:
    """An agent whose environments step ahead in this process."""
    agent = pg.PolyGRAD(make, config=config, eval_env="Pendulum-v1")
    agent.training.collector.ahead = True
    return agent


def test_processes_change_nothing_but_who_steps():
    config = tiny_config(num_envs=2, policy_delay_steps=0)

    def make():
        return Begun(gymnasium.make("Pendulum-v1"))

    wanted = begun_agent(config, make)
    wanted.learn(80)
    remote = tiny_config(num_envs=2, policy_delay_steps=0, env_processes=True)
    got = pg.PolyGRAD("Pendulum-v1", config=remote)
    got.learn(80)
    assert_same(wanted, got)


@pytest.mark.parametrize(("num_envs", "ahead"), [(1, False), (3, False), (1, True), (3, True)])
def test_how_old_the_acting_policy_is(num_envs, ahead):
    """An action is drawn after the updates due after the step before; with environments ahead,
    before those due after the last num_envs steps."""
    config = tiny_config(
        num_envs=num_envs, policy_delay_steps=0, policy_updates_per_env_step=0.5, eval_interval=1000
    )
    agent = begun_agent(config, lambda: Begun(gymnasium.make("Pendulum-v1")))
    collector = agent.training.collector
    collector.ahead = ahead
    draw, age = collector.draw, {}
    policy_updates = []
    update = agent.training.learner.step
    agent.training.learner.step = lambda *a, **k: policy_updates.append(1) or update(*a, **k)

    def watched(step):
        age.setdefault(step, len(policy_updates))
        draw(step)

    collector.draw = watched
    agent.learn(70)
    start = config.learning_starts

    def due_after(step: int) -> int:
        return num_updates(step + 1 - start, 0.5)

    for step in range(start + num_envs, 70):
        last = step - num_envs - 1 if ahead else step - 1
        assert age[step] == due_after(last), step
    assert due_after(69) - age[69] >= (2 if ahead and num_envs == 3 else 0)


def test_an_error_in_one_environment_leaves_a_state_to_continue_from(tmp_path):
    def make_failing(where: list[int]):
        class Failing(gymnasium.Wrapper):
            def step(self, action):
                where[0] -= 1
                if where[0] == 0:
                    raise RuntimeError("the simulator is gone")
                return self.env.step(action)

        return lambda: Failing(gymnasium.make("Pendulum-v1"))

    config = tiny_config(num_envs=3, policy_delay_steps=0)
    options = {"config": config, "eval_env": "Pendulum-v1"}
    whole = pg.PolyGRAD(make_failing([0]), **options)
    whole.learn(80)
    failing = pg.PolyGRAD(make_failing([65]), run_dir=tmp_path, **options)
    with pytest.raises(RuntimeError, match="the simulator is gone"):
        failing.learn(80)
    assert failing.num_timesteps == 64
    failing.learn(16)  # the same object goes on, and so does another process
    resumed = pg.PolyGRAD.resume(tmp_path, env=make_failing([0]))
    assert resumed.num_timesteps == 80
    steps = whole.replay.state_dict()["steps"]
    assert torch.equal(steps[:65], failing.replay.state_dict()["steps"][:65])


def test_what_training_environments_are_made_from():
    first = gymnasium.make("Pendulum-v1", g=3.0)
    copies = training_environments(first, first, 3, in_processes=False)
    assert copies[0] is first
    assert len({id(each.unwrapped) for each in copies}) == 3
    assert [each.unwrapped.g for each in copies] == [3.0] * 3
    with pytest.raises(pg.InputError, match="needs an environment id or a function .*Pendulum-v1"):
        training_environments(first, first, 1, in_processes=True)
    with pytest.raises(pg.InputError, match="must return a new environment at each call"):
        training_environments(first, lambda: first, 2, in_processes=False)
    other = gymnasium.make("MountainCarContinuous-v0")
    with pytest.raises(pg.InputError, match="the training environment must have .observation"):
        training_environments(first, lambda: other, 2, in_processes=False)
    check_new(other, [first])


def test_a_checkpoint_of_another_number_of_environments_is_refused(tmp_path):
    config = tiny_config(num_envs=2)
    agent = pg.PolyGRAD("Pendulum-v1", config=config)
    agent.learn(10)
    other = pg.PolyGRAD("Pendulum-v1", config=tiny_config(num_envs=3))
    with pytest.raises(pg.CheckpointError, match="must be of 3 environments, got 2"):
        other.training.collector.load_state_dict(agent.training.state_dict())


@pytest.mark.parametrize("name", ["learning_starts", "replay_capacity"])
def test_every_environment_has_room_for_a_window(name):
    with pytest.raises(pg.InputError, match=f"{name} must be at least the horizon, 4 times num_en"):
        tiny_config(num_envs=20, **{"learning_starts": 80, "replay_capacity": 80, name: 79})
