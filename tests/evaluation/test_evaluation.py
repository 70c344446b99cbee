"""Evaluation: which environment, what it may return, and which policy is kept as the best."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.spaces import Box

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast.data.d4rl import d4rl_score
from polygrad_fast.evaluation.offline import OfflineEvaluator
from polygrad_fast.evaluation.returns import evaluate_policy
from polygrad_fast.evaluation.video import record_episode


def agent_on(env, **options) -> pg.PolyGRAD:
    return pg.PolyGRAD(env, config=options.pop("config", tiny_config()), **options)


def weak_pendulum() -> gymnasium.Env:
    env = gymnasium.make("Pendulum-v1")
    env.unwrapped.g = 1.0
    return env


class Counter(gymnasium.Env):
    """Counts its steps; `returned` changes what a step gives."""

    def __init__(self, returned=None, bound=1.0, length=20, first=None, dtype=np.float32):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Box(-bound, bound, (1,), dtype)
        self.returned, self.length, self.first = returned, length, first

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return (np.zeros(2), {}) if self.first is None else self.first

    def step(self, action):
        self.steps += 1
        result = (self.np_random.normal(size=2), 1.0, False, self.steps >= self.length, {})
        return result if self.returned is None else self.returned(self.steps, result)


def test_an_environment_object_is_evaluated_with_its_physics_and_wrappers():
    env = wrappers.TransformReward(weak_pendulum(), lambda reward: reward / 2)
    agent = agent_on(env)
    same = agent_on(lambda: wrappers.TransformReward(weak_pendulum(), lambda reward: reward / 2))
    fresh = agent_on("Pendulum-v1")
    returns = agent.evaluate(3, seed=1).returns
    assert np.array_equal(returns, same.evaluate(3, seed=1).returns)
    assert not np.allclose(2 * returns, fresh.evaluate(3, seed=1).returns, rtol=0.05)


def test_evaluating_copies_does_not_disturb_training():
    def metrics(env):
        rows = []
        agent_on(env).learn(100, callback=lambda agent, row: rows.append(row))
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    def make():
        return gymnasium.make("Pendulum-v1")

    assert metrics(make()) == metrics(make) == metrics("Pendulum-v1")


def test_changes_after_construction_are_not_evaluated_on():
    env = weak_pendulum()
    agent = agent_on(env)
    env.unwrapped.g = 30.0
    environments = agent.evaluator.environments.take(20)
    assert len(environments) == 16
    assert {environment.unwrapped.g for environment in environments} == {1.0}


def test_an_object_that_cannot_be_copied_needs_eval_env():
    class Logged(gymnasium.Wrapper):
        def __init__(self):
            super().__init__(weak_pendulum())
            self.file = open("/dev/null")

    with pytest.raises(pg.InputError, match=r"Logged.file .*; give eval_env=") as caught:
        agent_on(Logged())
    assert "\n" not in str(caught.value)
    given = Logged()
    agent = agent_on(Logged(), eval_env=given)
    returns = agent.evaluate(3, seed=1).returns
    assert given.unwrapped.last_u is not None
    wanted = agent_on(weak_pendulum).evaluate(3, seed=1).returns
    assert returns == pytest.approx(wanted, rel=1e-5)  # one by one instead of side by side
    assert agent.make_evaluation_environment() is given


def test_eval_env_as_object_function_and_id():
    wanted = agent_on(weak_pendulum).evaluate(3, seed=1).returns
    for eval_env in (weak_pendulum(), weak_pendulum):
        agent = agent_on("Pendulum-v1", eval_env=eval_env)
        assert agent.evaluate(3, seed=1).returns == pytest.approx(wanted, rel=1e-5)
        assert agent.environment.env.unwrapped.g == 10.0
    agent = agent_on(weak_pendulum, eval_env="Pendulum-v1")
    plain = agent_on("Pendulum-v1").evaluate(3, seed=1).returns
    assert np.array_equal(agent.evaluate(3, seed=1).returns, plain)


def test_eval_env_must_be_another_environment_with_the_same_spaces():
    env = weak_pendulum()
    with pytest.raises(pg.InputError, match="eval_env must be another .*, got that Pendulum-v1"):
        agent_on(env, eval_env=wrappers.RecordEpisodeStatistics(env))
    with pytest.raises(
        pg.InputError, match=r"dimensions \(3, 1\) as Pendulum-v1, got \(2, 1\) of MountainCar"
    ):
        agent_on("Pendulum-v1", eval_env="MountainCarContinuous-v0")
    other = wrappers.RescaleAction(weak_pendulum(), np.float32(-1), np.float32(1))
    with pytest.raises(pg.InputError, match=r"action space Box\(-2.0.*, got Box\(-1.0"):
        agent_on("Pendulum-v1", eval_env=other)


def test_a_function_that_returns_one_environment_twice_is_refused():
    env = weak_pendulum()
    with pytest.raises(
        pg.InputError, match="must return a new environment .*, got the same Pendulum-v1 twice"
    ):
        agent_on(lambda: env)
    made, calls = [weak_pendulum(), weak_pendulum()], []

    def alternating():
        calls.append(1)
        return made[0] if len(calls) == 1 else made[1]

    agent = agent_on(alternating)
    with pytest.raises(pg.InputError, match="twice"):
        agent.evaluate(2)


def test_eval_env_is_kept_by_checkpoints(tmp_path):
    agent_on("Pendulum-v1", eval_env="Pendulum-v1", run_dir=tmp_path / "id").learn(10)
    stored = json.loads((tmp_path / "id" / "config.json").read_text())
    assert stored["eval_env"] == {"id": "Pendulum-v1", "given_by_id": True}
    assert pg.PolyGRAD.resume(tmp_path / "id").run.identity["eval_env"]["id"] == "Pendulum-v1"

    run = tmp_path / "object"
    agent_on("Pendulum-v1", eval_env=weak_pendulum(), run_dir=run).learn(10)
    for load in (pg.PolyGRAD.resume, pg.PolyGRAD.load):
        with pytest.raises(pg.InputError, match=r"\(Pendulum-v1\): .* as eval_env="):
            load(run)
        given = weak_pendulum()
        assert load(run, eval_env=given).make_evaluation_environment() is given


def test_human_rendering_is_not_copied(monkeypatch):
    env = weak_pendulum()
    env.unwrapped.render_mode = "human"
    monkeypatch.setattr(type(env.unwrapped), "render", lambda self: shown.append(self))
    shown = []
    agent_on(env).evaluate(2)
    assert shown == []


@pytest.mark.parametrize(
    "wrap", [wrappers.NormalizeObservation, wrappers.NormalizeReward], ids=lambda w: w.__name__
)
def test_wrappers_with_running_statistics_give_a_warning(wrap):
    with pytest.warns(UserWarning, match=f"{wrap.__name__} keeps running statistics.*normed"):
        agent_on(wrap(weak_pendulum()))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda r: (r[0], math.nan, *r[2:]), "reward must be .*, got nan"),
        (lambda r: (r[0], math.inf, *r[2:]), "reward must be .*, got inf"),
        (lambda r: (r[0], 1e300, *r[2:]), r"reward must be .*, got 1e\+300"),
        (lambda r: (r[0], np.ones(1), *r[2:]), r"reward must have shape \(\), got \(1,\)"),
        (lambda r: (r[0], "much", *r[2:]), "reward must be numbers .*, got 'much'"),
        (lambda r: (r[0], None, *r[2:]), "reward must be .*, got None"),
        (lambda r: (r[0] * math.nan, *r[1:]), r"observation\[0\] must be .*, got nan"),
        (lambda r: (np.zeros(3), *r[1:]), r"ervation must have shape \(2,\), got \(3,\)"),
        (lambda r: ({"x": 1}, *r[1:]), r"ervation must be numbers .*, got \{'x': 1\}"),
        (lambda r: (*r[:2], math.nan, *r[3:]), "terminated must be True or False, got nan"),
        (lambda r: (*r[:3], None, r[4]), "truncated must be True or False, got None"),
        (
            lambda r: (*r[:3], r[4]),
            r"the environment must return \(observation, reward, .*, got 4 values",
        ),
        (lambda r: r[0], r"the environment must return \(observation, reward, .*, got one ndarray"),
    ],
)
def test_unusable_results_of_a_step_are_named(returned, message):
    def fourth(steps, result):
        return returned(result) if steps == 4 else result

    agent = agent_on(Counter, eval_env=lambda: Counter(fourth))
    with pytest.raises(
        pg.InputError, match=rf"^Counter, evaluation episode 1, step 4: (obs.*)?{message}"
    ):
        agent.evaluate(2)
    place = "Counter, step 4 of the episode: (obs.*)?"
    with pytest.raises(pg.InputError, match=place + message):
        agent_on(lambda: Counter(fourth), eval_env=Counter).learn(10)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (np.zeros(2), r"reset: .* must return \(observation, info\), got one ndarray"),
        ((np.array([0, math.inf]), {}), r"reset: observation\[1\] must be .*, got inf"),
        (
            (np.array([0, 1e300]), {}),
            r"reset: observation\[1\] must be a finite float32 value, got 1e\+300",
        ),
    ],
)
def test_unusable_results_of_a_reset_are_named(first, message):
    with pytest.raises(pg.InputError, match=rf"Counter, evaluation episode 1, {message}"):
        agent_on(Counter, eval_env=lambda: Counter(first=first)).evaluate(1)
    with pytest.raises(pg.InputError, match=rf"Counter, {message}"):
        agent_on(lambda: Counter(first=first), eval_env=Counter).learn(10)


def test_a_later_episode_is_named():
    environments, episodes = [Counter(length=2)], []

    def returned(steps, result):
        episodes.append(steps)
        return (result[0], math.nan, *result[2:]) if len(episodes) == 5 else result

    environments[0].returned = returned
    with pytest.raises(
        pg.InputError, match="evaluation episode 3, step 1: reward must be .*, got nan"
    ):
        evaluate_policy(lambda o: np.zeros((len(o), 1)), environments, [0, 1, 2])


@pytest.mark.parametrize("flag", [True, 1, np.True_, np.array(True), torch.tensor(True)])
def test_flags_of_every_kind_end_an_episode(flag):
    env = Counter(lambda steps, r: (*r[:2], flag if steps == 3 else False, *r[3:]))
    result = evaluate_policy(lambda o: np.zeros((len(o), 1)), [env], [0])
    assert result.lengths.tolist() == [3] and result.returns.tolist() == [3.0]


def test_nan_rewards_do_not_freeze_the_best(tmp_path):
    rewards = iter([*[1.0] * 40, *[math.nan] * 400])
    agent = agent_on(
        Counter,
        eval_env=lambda: Counter(lambda steps, r: (r[0], next(rewards), *r[2:])),
        run_dir=tmp_path,
    )
    with pytest.raises(pg.InputError, match="step 60: Counter, evaluation episode 1, step 1: rew"):
        agent.learn(100)
    assert agent.evaluator.best_mean_reward == 20.0


def test_a_best_of_nan_in_an_old_checkpoint_is_replaced(tmp_path):
    agent = agent_on("Pendulum-v1")
    agent.learn(50)
    agent.evaluator.best_mean_reward = math.nan
    agent.save(tmp_path / "old")
    resumed = pg.PolyGRAD.load(tmp_path / "old")
    rows = []
    resumed.learn(20, callback=lambda _, row: rows.append(row))
    means = [row["eval/mean_reward"] for row in rows if "eval/mean_reward" in row]
    assert len(means) == 2 and resumed.evaluator.best_mean_reward == max(means)


def test_evaluation_arguments():
    agent = agent_on(Counter)
    for number in (0, 1.5, "3"):
        with pytest.raises(pg.InputError, match="num_episodes must be an integer of at least 1"):
            agent.evaluate(number)
    for seed in (-1, 0.5):
        with pytest.raises(pg.InputError, match="seed must be an integer of at least 0"):
            agent.evaluate(1, seed=seed)
    assert agent.evaluate(np.int64(1), seed=np.int64(3)).returns.shape == (1,)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ([1e300, 0, 0], r"observation\[0\] must be a finite float32 value, got 1e\+300"),
        (
            [[0, 0, 0], [0, -1e39, 0]],
            r"observation\[1, 1\] must be a finite float32 value, got -1e\+39",
        ),
        ([0, 0, 3e38], r"observation\[2\] must be small enough .* policy's mean .* got 3e\+38"),
        ([[0, 0, 0], [0, 0]], "observation cannot be read as an array"),
        ([1j, 0, 0], "must be of real numbers, got dtype complex128"),
    ],
)
def test_predict_names_what_float32_or_the_policy_cannot_hold(observation, message):
    with pytest.raises(pg.InputError, match=message):
        agent_on("Pendulum-v1").predict(observation)


def test_predict_takes_a_tensor_with_gradient():
    agent, observation = agent_on("Pendulum-v1"), torch.ones(3, requires_grad=True)
    got, wanted = (agent.predict(o, deterministic=True)[0] for o in (observation, np.ones(3)))
    assert np.array_equal(got, wanted)


def test_an_overflowing_observation_in_training_is_named():
    taken = []

    def returned(steps, result):
        taken.append(steps)
        return (np.array([0, 3e38]), *result[1:]) if len(taken) == 55 else result

    agent = agent_on(lambda: Counter(returned), eval_env=Counter)
    with pytest.raises(
        pg.InputError, match=r"step 55: observation\[1\] must be small enough .* got 3e\+38"
    ):
        agent.learn(100)


@pytest.mark.parametrize("bound", [1e30, 3e38])
def test_huge_action_bounds_work_where_actions_are_rescaled(bound):
    agent = agent_on(lambda: Counter(bound=bound))
    agent.learn(80)
    action, _ = agent.predict([0.0, 0.0])
    assert 1e-3 * bound < abs(action[0]) <= bound
    assert torch.isfinite(agent.imagine(5).actions).all()


@pytest.mark.parametrize(
    ("bound", "rescale", "limit"),
    [(1e30, False, r"1e\+18"), (1e300, True, r"3.4e\+38"), (1e308, True, r"3.4e\+38")],
)
def test_action_bounds_that_overflow_are_refused_by_name(bound, rescale, limit):
    config = tiny_config(rescale_actions=rescale)
    shown = f"{bound:g}".replace("+", r"\+")
    message = rf"action space: low\[0\] must .* and {limit}, or be inf.*, got -{shown}"
    with pytest.raises(pg.InputError, match=message):
        agent_on(lambda: Counter(bound=bound, dtype=np.float64), config=config)
    agent_on(lambda: Counter(bound=np.inf, dtype=np.float64), config=config).learn(50)


def test_an_object_is_recorded_in_its_own_render_mode_or_refused(tmp_path):
    pytest.importorskip("imageio")

    class Painted(Counter):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
        closed = 0

        def __init__(self, render_mode=None):
            super().__init__(length=3)
            self.render_mode = render_mode

        def render(self):
            return np.full((16, 16, 3), 40 * self.steps, dtype=np.uint8)

        def close(self):
            Painted.closed += 1

    def record(agent, path):
        record_episode(agent.evaluator.environments, lambda o: agent.predict(o)[0], path, seed=0)

    for source in (Painted(), Painted):
        with pytest.raises(pg.InputError, match="with render_mode 'rgb_array' to .*, got None"):
            record(agent_on(source), tmp_path / "no.gif")
    assert list(tmp_path.iterdir()) == []
    record(agent_on(Painted("rgb_array")), tmp_path / "copy.gif")
    assert Painted.closed == 1
    agent = agent_on(Painted(), eval_env=Painted("rgb_array"))
    record(agent, tmp_path / "given.gif")
    assert Painted.closed == 1  # the user's own stays open
    assert {path.name for path in tmp_path.iterdir()} == {"copy.gif", "given.gif"}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_console_script_finds_environments_of_the_working_directory(tmp_path, command):
    script = Path(sysconfig.get_path("scripts")) / "polygrad-fast"
    if not script.exists():
        pytest.skip("the console script is not installed")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mypkg.py").write_text(
        "import gymnasium\n"
        "def make(**options):\n    return gymnasium.make('Pendulum-v1', **options).unwrapped\n"
        "gymnasium.register('Own-v0', 'mypkg:make', max_episode_steps=5)\n"
    )
    if command == "train":
        words = ["--env-id", "mypkg:Own-v0", *"--preset quick --run-dir ../run".split()]
        words += "--horizon 2 --learning-starts 9 --total-timesteps 9 --no-progress".split()
        # so that no window is missing: an episode lasts five steps
    else:
        config = tiny_config(eval_episodes=1)
        sys.path.insert(0, str(tmp_path / "here"))
        try:
            agent_on("mypkg:Own-v0", config=config, run_dir=tmp_path / "run").learn(10)
        finally:
            sys.path.remove(str(tmp_path / "here"))
            sys.modules.pop("mypkg", None)
            gymnasium.registry.pop("Own-v0")
        words = ["../run", "--episodes", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = [str(script), command, *words]
    result = subprocess.run(
        run, cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "mypkg:Own-v0" in result.stdout
    if command == "train":  # and as python asks for it, not elsewhere
        safe = {**environment, "PYTHONSAFEPATH": "1"}
        words = [*words[:-3], "--total-timesteps", "9", "--run-dir", "../other"]
        run = [sys.executable, str(script), command, *words]
        result = subprocess.run(run, cwd=tmp_path / "here", env=safe, capture_output=True)
        assert result.returncode == 2 and b"No module named 'mypkg'" in result.stderr


class Lasting(Counter):
    """Ends after as many steps as its seed says."""

    def reset(self, *, seed=None, options=None):
        self.length = seed
        return super().reset(seed=seed)


def test_episodes_that_take_too_long_are_left_out_on_request():
    def play(seeds, **options):
        environments = [Lasting(), Lasting()]
        return evaluate_policy(lambda o: np.zeros((len(o), 1)), environments, seeds, **options)

    assert play([3, 9, 5, 4]).lengths.tolist() == [3, 9, 5, 4]
    result = play([3, 9, 5, 4], max_episode_steps=5)
    assert (result.lengths.tolist(), result.returns.tolist()) == ([3, 5, 4], [3.0, 5.0, 4.0])
    assert result.mean_reward == 4
    with pytest.raises(pg.InputError, match="Lasting: an episode must end within 2 steps .* got 3"):
        play([3, 9, 5], max_episode_steps=2)


def test_offline_evaluation_plays_16_episodes_and_scores_them():
    evaluator = OfflineEvaluator("Hopper-v5", seed=1)
    seen = []

    def predict(observations):
        seen.append(len(observations))
        return np.full((len(observations), 3), 7.0, dtype=np.float32), None  # beyond the bounds

    result = evaluator.evaluate(predict)
    assert len(result.episodes.returns) == 16 and seen[0] == 16
    again = evaluator.evaluate(lambda o: (np.ones((len(o), 3)), None))
    assert np.array_equal(again.episodes.returns, result.episodes.returns)
    assert result.score == pytest.approx(d4rl_score("Hopper-v2", result.episodes.mean_reward))
    assert "Hopper-v5 is not Hopper-v2" in result.caveat
    other = OfflineEvaluator("Hopper-v5", 3, seed=2).evaluate(predict)
    assert len(other.episodes.returns) == 3
    assert not np.isin(other.episodes.returns, result.episodes.returns).all()

    pendulum = OfflineEvaluator("Pendulum-v1", 2)
    result = pendulum.evaluate(lambda o: (np.zeros((len(o), 1)), None))
    assert result.episodes.lengths.tolist() == [200, 200]
    assert result.score is None and "Pendulum-v1 has no D4RL score" in result.caveat
    with pytest.raises(pg.InputError, match="num_episodes must be an integer of at least 1"):
        OfflineEvaluator("Pendulum-v1", 0)


def test_offline_evaluation_ends_with_the_time_limit():
    class Endless(Counter):
        spec = gymnasium.envs.registration.EnvSpec("Endless-v0", max_episode_steps=30)

    with pytest.raises(pg.InputError, match="must end within 30 steps to be evaluated, got 2"):
        OfflineEvaluator(lambda: Endless(length=31), 2).evaluate(
            lambda o: (np.zeros((len(o), 1)), None)
        )
    result = OfflineEvaluator(lambda: Endless(length=30), 2).evaluate(
        lambda o: (np.zeros((len(o), 1)), None)
    )
    assert result.episodes.lengths.tolist() == [30, 30]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_play_the_same_episodes(num_processes):
    """More episodes than environments, and fewer environments than processes."""
    config = tiny_config(eval_processes=num_processes)
    here = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    there = pg.PolyGRAD("Pendulum-v1", config=config)
    for number in (1, 3, 18):
        wanted, got = (agent.evaluate(number, seed=number) for agent in (here, there))
        assert wanted.returns.tolist() == got.returns.tolist()
        assert wanted.lengths.tolist() == got.lengths.tolist()


def test_processes_need_an_environment_that_can_be_made_there():
    config = tiny_config(eval_processes=2)
    with pytest.raises(pg.InputError, match="eval_processes must be 0 for .*Pendulum-v1"):
        pg.PolyGRAD(gymnasium.make("Pendulum-v1"), config=config)
