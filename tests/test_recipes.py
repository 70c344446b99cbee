"""Datasets whose behaviour policy is trained first."""

import json
import shutil

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

import polygrad_fast as pg
from cases import changed, tiny_config
from polygrad_fast import cli, recipes
from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.data.collect import collect_episodes, random_actions
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.replay import ReplayBuffer
from polygrad_fast.recipes import Behaviour, collect_recipe, level_returns, replay_dataset

ENV = "InvertedPendulum-v5"
RETURNS = {"medium": 1.0, "expert": 1.0}


def tiny_behaviour(env_id=ENV):
    """Any policy reaches the returns above; evaluations after steps 60, 80 and 100."""
    options = {"world_model": "autoregressive", "eval_interval": 20, "total_timesteps": 100}
    return changed(tiny_config(), **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with both levels."""
    path = tmp_path_factory.mktemp("behaviour") / "run"
    assert Behaviour(ENV, path, 0, RETURNS, tiny_behaviour()).reach("medium").num_timesteps == 60
    return path


@pytest.fixture
def behaviour(trained, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    return Behaviour(ENV, path, 0, RETURNS, tiny_behaviour())


def test_levels_are_the_first_evaluations_that_reach_them(behaviour):
    metrics = behaviour.run_dir / "metrics.csv"
    assert list(recipes.evaluations(metrics)) == [0, 60]
    assert behaviour.reach("medium").num_timesteps == 60
    assert behaviour.reach("expert").num_timesteps == 60  # the same evaluation reached it
    assert list(recipes.evaluations(metrics)) == [0, 60]
    shutil.rmtree(behaviour.run_dir / "expert")
    behaviour.returns = RETURNS | {"expert": 1e6}
    with pytest.raises(pg.InputError, match="must reach a mean return of 1e.06 .* within 100 st"):
        behaviour.reach("expert")
    assert list(recipes.evaluations(metrics)) == [0, 60, 80, 100]
    assert not (behaviour.run_dir / "expert").exists()
    assert behaviour.reach("medium").num_timesteps == 60


def test_other_returns_do_not_take_the_policy_that_is_kept(behaviour):
    behaviour.returns = {"medium": 1e6}
    message = "medium policy in .* must reach a mean return of 1e.06 .*, got that of step 60"
    with pytest.raises(pg.InputError, match=message):
        behaviour.reach("medium")


def test_medium_is_episodes_of_that_policy_drawn_stochastically(behaviour):
    finished = []
    dataset = collect_recipe(
        "medium", behaviour, num_steps=30, seed=5, on_episode=lambda *e: finished.append(e)
    )
    assert len(dataset) >= 30 > len(dataset) - finished[-1][1]
    recipe = dataset.recipe
    assert recipe["recipe"] == recipe["policy"] == "medium" and recipe["env_step"] == 60
    assert recipe["wanted_return"] == 1.0 <= recipe["evaluated_return"]
    assert recipe["seed"] == 5 and recipe["training_seed"] == 0
    assert recipe["mean_return"] == pytest.approx(dataset.episode_returns().mean())
    assert "preset laptop, world model autoregressive" in recipe["trained_by"]
    agent = behaviour.reach("medium")
    mean = agent.predict(dataset.observations, deterministic=True)[0]
    assert not np.allclose(mean, dataset.actions)
    again = collect_recipe("medium", behaviour, num_steps=30, seed=5)
    assert np.array_equal(again.actions, dataset.actions)
    json.dumps(recipe)


def test_medium_expert_is_half_of_each(behaviour):
    dataset = collect_recipe("medium-expert", behaviour, num_episodes=6)
    assert dataset.num_episodes == 6 == dataset.recipe["episodes"]
    parts = dataset.recipe["parts"]
    assert [part["policy"] for part in parts] == ["medium", "expert"]
    assert [part["episodes"] for part in parts] == [3, 3]
    assert parts[0]["seed"] != parts[1]["seed"]
    assert dataset.recipe["mean_return"] == pytest.approx(dataset.episode_returns().mean())


def test_mixed_noise_is_medium_with_noise_in_turn(behaviour):
    still = collect_recipe("medium", behaviour, num_episodes=3, seed=1)
    mixed = collect_recipe("mixed-noise", behaviour, 3, seed=1, noise_std=(0.0, 0.5))
    first = int(np.flatnonzero(still.ends)[0]) + 1
    assert np.array_equal(mixed.actions[:first], still.actions[:first])
    assert mixed.recipe["noise_std"] == [0.0, 0.5] and mixed.recipe["recipe"] == "mixed-noise"
    assert not np.array_equal(mixed.actions[first:], still.actions[first : len(mixed)])


def test_medium_replay_is_every_step_of_the_training(behaviour):
    dataset = collect_recipe("medium-replay", behaviour)
    agent = behaviour.reach("medium")
    state = agent.replay.state_dict()
    assert dataset.recipe["env_step"] == 60 == state["total_steps"]
    assert 40 < len(dataset) <= 60  # a running or cut-off episode loses its last step
    inside = ~dataset.ends[:-1]
    assert np.array_equal(dataset.next_observations[:-1][inside], dataset.observations[1:][inside])
    assert dataset.terminals.sum() == (state["steps"][:, -1] == 1).sum()
    assert dataset.recipe["terminal_next_observations"] == "repeated"
    assert np.abs(dataset.actions).max() <= 3 and np.abs(dataset.actions).max() > 1.5


def filled_buffer(horizon=3):
    """Episodes: 4 steps cut off, 5 steps to a terminal, 2 steps to a terminal, 4 running."""
    buffer, step = ReplayBuffer(50, horizon, 1, 1), 0
    for length, end in ((4, "cut"), (5, "terminal"), (2, "terminal"), (4, "")):
        for t in range(length):
            last = t == length - 1
            flags = last and end == "terminal", last and end == "cut"
            buffer.add(np.array([float(step)]), np.array([0.5]), 10.0 + step, *flags)
            step += 1
    return buffer


def test_a_replay_buffer_becomes_whole_episodes():
    scaler = ActionScaler(Box(-2, 2, (1,), np.float32), rescale=True)
    dataset = replay_dataset(filled_buffer(), scaler, "Walk", {"policy": "p"})
    # steps 3 and 14 end an episode that goes on elsewhere: their next observation is not known
    assert dataset.observations[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert dataset.next_observations[:, 0].tolist() == [1, 2, 3, 5, 6, 7, 8, 8, 10, 10, 12, 13, 14]
    assert np.flatnonzero(dataset.terminals).tolist() == [7, 9]
    assert np.flatnonzero(dataset.timeouts).tolist() == [2, 12]
    assert np.flatnonzero(dataset.ends).tolist() == [2, 7, 9, 12]
    assert (dataset.actions == 1.0).all()  # the environment's
    assert dataset.rewards.tolist() == [10 + o for o in dataset.observations[:, 0]]
    assert dataset.recipe["episodes"] == 4 and dataset.recipe["steps"] == 13


def test_a_replay_buffer_up_to_a_step():
    scaler = ActionScaler(Box(-2, 2, (1,), np.float32), rescale=True)
    dataset = replay_dataset(filled_buffer(), scaler, "Walk", {}, until=7)
    assert dataset.observations[:, 0].tolist() == [0, 1, 2, 4, 5]
    assert dataset.next_observations[-1, 0] == 6 and not dataset.terminals.any()
    with pytest.raises(pg.InputError, match="must hold steps of whole windows, got 0 steps"):
        replay_dataset(filled_buffer(), scaler, "Walk", {}, until=0)


def test_steps_or_episodes_are_collected():
    env = gymnasium.make("Pendulum-v1")
    whole = collect_episodes(env, random_actions(env, 0), 3)
    by_steps = collect_episodes(env, random_actions(env, 0), None, num_steps=401)
    assert np.array_equal(whole.rewards, by_steps.rewards) and by_steps.recipe["episodes"] == 3
    with pytest.raises(pg.InputError, match="one of num_episodes and num_steps must be given"):
        collect_episodes(env, random_actions(env, 0), 3, num_steps=3)


def test_returns_of_levels():
    assert level_returns("Hopper-v5", ("medium",), {}) == {"medium": 1000.0}
    found = level_returns("ns/Hopper-v4", ("medium", "expert"), {"medium": 2.0, "expert": None})
    assert found == {"medium": 2.0, "expert": 3000.0}
    with pytest.raises(pg.InputError, match="--medium-return must be given for Pendulum-v1: known"):
        level_returns("Pendulum-v1", ("medium",), {"medium": None})
    with pytest.raises(pg.InputError, match="at most --expert-return, 3000, got 4000"):
        level_returns("Hopper-v5", ("medium", "expert"), {"medium": 4000.0})


def test_the_behaviour_is_the_laptops_policy():
    config = recipes.behaviour_config("Hopper-v5")
    laptop = pg.TrainConfig.from_preset("laptop")
    assert config.world_model == "autoregressive" and config.policy_updates_per_env_step == 0.5
    assert config.a2c == laptop.a2c and config.total_timesteps == laptop.total_timesteps


def collect(out, *more):
    words = f"data collect --env-id {ENV} --out {out} --no-progress"
    return cli.main([*words.split(), *map(str, more)])


def test_the_command_trains_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "behaviour_config", tiny_behaviour)
    monkeypatch.chdir(tmp_path)
    returns = ("--medium-return", "1")
    assert collect("d", "--recipe", "medium", "--steps", "30", *returns) == 0
    out = capsys.readouterr().out.splitlines()
    run_dir = tmp_path / "runs" / f"{ENV}-behaviour-0"
    assert out[0].startswith(f"medium: the behaviour policy is trained in runs/{ENV}-behaviour-0 (")
    summary = json.loads(out[-1])
    dataset = load_dataset("d")
    assert summary["steps"] == len(dataset) and dataset.recipe["recipe"] == "medium"
    assert (run_dir / "medium").is_dir()
    before = (run_dir / "metrics.csv").read_bytes()
    assert collect("r", "--recipe", "medium-replay", *returns) == 0
    assert load_dataset("r").recipe["training_seed"] == 0
    assert (run_dir / "metrics.csv").read_bytes() == before  # nothing was trained again
    words = ("--policy", run_dir, "--recipe", "medium-replay", *returns)
    assert collect("given.npz", *words) == 0
    given, own = load_dataset("given.npz"), load_dataset("r")
    assert np.array_equal(given.observations, own.observations)
    assert given.recipe["env_step"] == 60
    words = ("--policy", run_dir, "--recipe", "medium", "--steps", "30", "--checkpoint", "last")
    assert collect("played.npz", *words, *returns) == 0
    played = load_dataset("played.npz")
    assert np.array_equal(played.actions, dataset.actions) and played.recipe["env_step"] == 60
    words = ("--policy", run_dir, "--recipe", "mixed-noise", "--episodes", "3", *returns)
    assert collect("mixed.npz", *words, "--checkpoint", "last", "--noise-std", "0", "0.5") == 0
    mixed = load_dataset("mixed.npz")
    first = int(np.flatnonzero(mixed.ends)[0]) + 1
    assert np.array_equal(mixed.actions[:first], played.actions[:first])
    assert mixed.recipe["noise_std"] == [0.0, 0.5] and mixed.recipe["recipe"] == "mixed-noise"
    capsys.readouterr()
    for recipe, end in (("medium-replay", ""), ("medium", " of its last policy")):
        words = ("--policy", run_dir, "--recipe", recipe, "--checkpoint", "last")
        assert collect("no.npz", *words, "--medium-return", "1e9") == 2
        err = capsys.readouterr().err
        assert "must have reached a mean return of 1e+09" in err and err.endswith(f"{end}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe mixed-noise --policy run", "run is not a run directory"),
        ("--recipe medium-expert --policy run", "--policy run must be left out with --recipe med"),
        ("--recipe medium-replay --policy p.safetensors", "it serves medium and mixed-noise"),
        ("--recipe medium --policy p.safetensors", "p.safetensors is not a policy file: No such"),
        ("--policy p.safetensors", "p.safetensors is not a policy file: No such file"),
        ("--recipe medium --deterministic", "--deterministic must be left out with --recipe"),
        ("--recipe medium --noise-std 0.1", "--noise-std must be left out with --recipe medium"),
        ("--recipe medium-replay --steps 9", "--episodes and --steps must be left out"),
        ("--steps 3 --episodes 3", "one of --episodes and --steps must be left out, got 3 and 3"),
        ("--steps 0", "--steps must be an integer of at least 1, got 0"),
        ("--medium-return 3", "--medium-return needs --recipe, got 3.0"),
        ("--run-dir x", "--run-dir needs --recipe, got x"),
        ("--recipe medium --policy run --run-dir x", "--run-dir must be left out with --policy"),
        ("--recipe medium --expert-return 5", "--expert-return must be left out with --recipe med"),
        ("--recipe best", "recipe"),
        ("--recipe medium --env-id Pendulum-v1", "--medium-return must be given for Pendulum-v1"),
        ("--recipe medium-replay --policy gone", "gone is not a run directory"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert collect("d", *words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_level_out_of_reach_is_named_and_another_run_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "behaviour_config", tiny_behaviour)
    monkeypatch.chdir(tmp_path)
    words = ("--recipe", "medium", "--run-dir", "b", "--medium-return", "1e6")
    assert collect("d", *words) == 2
    err = capsys.readouterr().err
    assert "must reach a mean return of 1e+06 (--medium-return) within 100 steps, got" in err
    assert not (tmp_path / "d").exists()
    assert collect("d", *words, "--seed", "1") == 2
    assert "--run-dir b holds another behaviour policy: its seed is 0" in capsys.readouterr().err
