"""The training loop: exact resume, errors, saving."""

import errno
import itertools
import json
import re
import shutil
import signal
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast.evaluation.returns import EpisodeStatistics
from polygrad_fast.runs import metrics as run_log
from polygrad_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from polygrad_fast.runs.directory import locked
from polygrad_fast.runs.metric_sums import MetricSums
from polygrad_fast.runs.metrics import read_metrics
from polygrad_fast.training.estimate import Speed


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def killed_at(step: int, left: Path):
    """A callback that copies to `left` what a kill -9 at an environment step would leave."""

    def copy(agent, metrics):
        if agent.num_timesteps == step:
            shutil.copytree(agent.run_dir, left)

    return copy


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_same_run(resumed: pg.PolyGRAD, whole: pg.PolyGRAD) -> None:
    rows = [comparable(read_metrics(a.run_dir / "metrics.csv")) for a in (resumed, whole)]
    assert rows[0] == rows[1]
    for name, weight in whole.training.weights().items():
        assert torch.equal(weight, resumed.training.weights()[name]), name


def test_learns_logs_and_checkpoints(tmp_path):
    run_dir = tmp_path / "run"
    agent = pg.PolyGRAD("Pendulum-v1", seed=3, config=tiny_config(), run_dir=run_dir)
    seen = []
    agent.learn(150, callback=lambda a, metrics: seen.append((a.num_timesteps, metrics)))
    rows = read_metrics(run_dir / "metrics.csv")
    assert [row["env_step"] for row in rows] == [0, 25, 50, 60, 75, 100, 120, 125, 150]
    assert [step for step, _ in seen] == [row["env_step"] for row in rows]
    last = rows[-1]
    for name in ("action_mean", "action_std", "update_size_initial", "update_size"):
        assert np.isfinite(last[f"a2c/{name}"])
    assert last["a2c/linesearch_steps"] >= 1
    assert last["time/env_steps_per_s"] > 0 and last["time/sample_ms"] > 0
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "best",
        "step_000000100",
        "step_000000150",
    }
    config = json.loads((run_dir / "config.json").read_text())
    assert config["env_id"] == "Pendulum-v1" and config["seed"] == 3
    assert json.loads((run_dir / "versions.json").read_text())["torch"] == torch.__version__


def test_ratios_of_updates_to_environment_steps(monkeypatch):
    config = tiny_config(policy_delay_steps=10, policy_updates_per_env_step=0.25)
    agent = pg.PolyGRAD("Pendulum-v1", config=config)
    counts = {"denoiser/loss": 0, "a2c/actor_loss": 0}
    add, add_rows = MetricSums.add, MetricSums.add_rows

    def count(self, values):
        for name in counts.keys() & values.keys():
            counts[name] += 1
        add(self, values)

    def count_rows(self, names, rows):
        for name in counts.keys() & set(names):
            counts[name] += len(rows)
        add_rows(self, names, rows)

    monkeypatch.setattr(MetricSums, "add", count)
    monkeypatch.setattr(MetricSums, "add_rows", count_rows)
    agent.learn(140)
    assert counts["denoiser/loss"] == 5 + (140 - 40) * 0.5
    assert counts["a2c/actor_loss"] == int((140 - 40 - 10) * 0.25)


def test_resume_continues_exactly(tmp_path):
    config = tiny_config(log_interval=30)  # the row of step 120 spans the checkpoint of step 100
    whole = pg.PolyGRAD("Pendulum-v1", seed=1, config=config, run_dir=tmp_path / "whole")
    whole.learn(150)
    part = pg.PolyGRAD("Pendulum-v1", seed=1, config=config, run_dir=tmp_path / "part")
    part.learn(150, callback=killed_at(120, tmp_path / "left"))
    np.random.seed(99)  # the resumed run restores every generator itself
    torch.manual_seed(99)
    resumed = pg.PolyGRAD.resume(tmp_path / "left")
    assert resumed.num_timesteps == 100
    resumed.learn(50)
    assert_same_run(resumed, whole)


def test_resume_at_an_episode_boundary_and_within_the_prefill(tmp_path):
    config = tiny_config(checkpoint_interval=20, log_interval=5, total_timesteps=230)
    whole = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "whole")
    whole.learn(230)
    part = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "part")
    for stop in (20, 200, 220):  # within the prefill, right after an episode ended, after it
        left = tmp_path / f"left at {stop}"
        remaining = 230 - part.num_timesteps
        part.learn(remaining, callback=killed_at(stop + 5, left))
        part = pg.PolyGRAD.resume(left)
        assert part.num_timesteps == stop
    part.learn(230 - part.num_timesteps)
    assert_same_run(part, whole)


def test_save_and_load_predict_and_continue(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    agent.learn(80)
    agent.save(tmp_path / "saved")
    loaded = pg.PolyGRAD.load(tmp_path / "saved")
    observation = np.array([0.6, -0.8, 0.3])
    assert np.array_equal(
        agent.predict(observation, deterministic=True)[0],
        loaded.predict(observation, deterministic=True)[0],
    )
    agent.learn(20)
    loaded.learn(20)
    for name, weight in agent.training.weights().items():
        assert torch.equal(weight, loaded.training.weights()[name]), name


def test_predict_is_within_bounds_and_batched():
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    actions, state = agent.predict(np.zeros((7, 3)))
    assert actions.shape == (7, 1) and state is None
    assert (np.abs(actions) <= 2).all()
    assert agent.predict(np.zeros(3))[0].shape == (1,)


@pytest.mark.parametrize(
    "observation, message",
    [
        (np.zeros(4), r"observation must have shape \[3\] or \[N, 3\], got \[4\]"),
        (np.array([0.0, np.nan, 0.0]), r"observation\[1\] must be .*, got nan"),
        (np.array(["a", "b", "c"]), "dtype <U1"),
    ],
)
def test_predict_rejects_bad_observations(observation, message):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    with pytest.raises(pg.InputError, match=message):
        agent.predict(observation)


def test_same_seed_same_run_and_other_seed_another():
    def final_weights(seed):
        agent = pg.PolyGRAD("Pendulum-v1", seed=seed, config=tiny_config())
        agent.learn(80)
        return agent.policy.log_std.detach().clone()

    assert torch.equal(final_weights(5), final_weights(5))
    assert not torch.equal(final_weights(5), final_weights(6))


def test_construction_errors(tmp_path):
    config = tiny_config()
    with pytest.raises(pg.InputError, match="Discrete"):
        pg.PolyGRAD("CartPole-v1", config=config)
    with pytest.raises(pg.InputError, match="Pendulum-v1"):
        pg.PolyGRAD("Pendulun-v1", config=config)
    with pytest.raises(pg.InputError, match="preset must be one of .*, got 'fast'"):
        pg.PolyGRAD("Pendulum-v1", preset="fast")
    with pytest.raises(pg.InputError, match="seed"):
        pg.PolyGRAD("Pendulum-v1", seed=-1, config=config)
    with pytest.raises(pg.InputError, match="device 'nonsense'"):
        pg.PolyGRAD("Pendulum-v1", config=config, device="nonsense")
    with pytest.raises(pg.InputError, match="total_timesteps"):
        pg.PolyGRAD("Pendulum-v1", config=config).learn(0)
    run_dir = tmp_path / "run"
    pg.PolyGRAD("Pendulum-v1", config=config, run_dir=run_dir).learn(10)
    for name in ("config.json", "metrics.csv"):  # checkpoints alone are not overwritten either
        with pytest.raises(pg.InputError, match="already holds a run"):
            pg.PolyGRAD("Pendulum-v1", config=config, run_dir=run_dir)
        (run_dir / name).unlink()
    before = files_of(run_dir)
    with pytest.raises(pg.InputError, match="already holds a run"):
        pg.PolyGRAD("Pendulum-v1", config=config, run_dir=run_dir)
    assert files_of(run_dir) == before


def test_a_run_begun_by_another_meanwhile_stays_as_it_is(tmp_path):
    """Another one begins, and is done, while this one makes its environment."""
    run_dir = tmp_path / "run"

    def make():
        if not run_dir.exists():
            pg.PolyGRAD("Pendulum-v1", seed=1, config=tiny_config(), run_dir=run_dir)
        return gymnasium.make("Pendulum-v1")

    with pytest.raises(pg.InputError, match="already holds a run"):
        pg.PolyGRAD(make, seed=2, config=tiny_config(), run_dir=run_dir)
    assert json.loads((run_dir / "config.json").read_text())["seed"] == 1


def test_checkpoint_of_another_configuration(tmp_path):
    for name, horizon in (("a", 4), ("b", 5)):
        config = tiny_config(horizon=horizon)
        pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / name).learn(50)
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "checkpoints", tmp_path / "a" / "checkpoints")
    for load in (pg.PolyGRAD.resume, pg.PolyGRAD.load):
        with pytest.raises(pg.CheckpointError, match="its config.json: horizon must be 4, got 5$"):
            load(tmp_path / "a")
    with pytest.raises(pg.CheckpointError, match="does not exist"):
        pg.PolyGRAD.load(tmp_path / "nothing")


def test_damaged_configuration(tmp_path):
    pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(pg.CheckpointError, match="config.json is damaged: .*'env_id'"):
        pg.PolyGRAD.resume(tmp_path)


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path):
    # best is past step 0 then, and metrics go up to the step of the first checkpoint
    config = tiny_config(eval_interval=45, checkpoint_interval=50)
    agent = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "run")
    agent.learn(60, callback=killed_at(50, tmp_path / "left"))
    assert {p.name for p in (tmp_path / "left" / "checkpoints").iterdir()} == {"best"}
    resumed = pg.PolyGRAD.resume(tmp_path / "left")
    assert resumed.num_timesteps == 0
    resumed.learn(60)
    assert_same_run(resumed, agent)


@pytest.mark.parametrize(
    "damage, steps",
    [
        *itertools.product(["deleted", "damaged", "folder deleted"], [30, 120]),
        ("old run", 120),  # at 30 nothing tells it from one that was killed
    ],
)
def test_a_run_whose_checkpoints_are_lost_is_not_begun_anew(tmp_path, damage, steps):
    run_dir = tmp_path / "run"
    pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=run_dir).learn(steps)
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        if damage == "damaged":
            (path / "state.pt").write_bytes(b"half")
        else:
            shutil.rmtree(path)
    if damage == "folder deleted":
        shutil.rmtree(run_dir / "checkpoints")
    if damage == "old run":  # before there was a mark
        (run_dir / ".checkpoints_saved").unlink()
    before = files_of(run_dir)
    with pytest.raises(pg.CheckpointError) as caught:
        with warnings.catch_warnings(action="error"):  # the error says it all
            pg.PolyGRAD.resume(run_dir)
    message = str(caught.value)
    assert f"metrics go up to environment step {steps}" in message and "\n" not in message
    assert "another run directory" in message
    assert ("checkpoints/best" in message) == (damage != "folder deleted")
    if damage == "damaged":
        assert re.search(rf"step_{steps:09d}: state\.pt must have \d+ bytes, got 4", message)
    else:
        assert "were deleted" in message
    assert files_of(run_dir) == before


def test_stopping_saves_a_checkpoint(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    agent.learn(150, callback=lambda a, metrics: a.num_timesteps < 75)
    assert agent.num_timesteps == 75
    assert pg.PolyGRAD.resume(tmp_path).num_timesteps == 75


def test_best_checkpoint_acts_but_does_not_train(tmp_path):
    pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path).learn(60)
    best = pg.PolyGRAD.load(tmp_path, checkpoint="best")
    assert best.predict(np.zeros(3))[0].shape == (1,)
    with pytest.raises(pg.InputError, match="best checkpoint holds weights only"):
        best.learn(10)


def test_checkpoint_of_another_device_loads_with_a_warning(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    agent.learn(60)
    state = (
        agent.training.state_dict()
        | agent.evaluator.state_dict()
        | {
            "device_type": "cuda",
            "generator": torch.zeros(16, dtype=torch.uint8),  # as long as a CUDA generator's
        }
    )
    save_checkpoint(
        tmp_path / "saved", agent.training.weights(), state, agent.run.metadata(agent.num_timesteps)
    )
    with pytest.warns(UserWarning, match="written on 'cuda'"):
        loaded = pg.PolyGRAD.load(tmp_path / "saved", device="cpu")
    loaded.learn(10)
    assert loaded.num_timesteps == 70


def test_one_process_trains_in_a_run_directory(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)

    def second(agent, metrics):
        with pytest.raises(pg.InputError, match="another process is training"):
            pg.PolyGRAD.resume(tmp_path).learn(10)

    agent.learn(20, callback=second)


def test_threads_while_learning():
    before = torch.get_num_threads()
    seen = []
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(cpu_threads=before + 1))
    agent.learn(10, callback=lambda a, metrics: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    with pytest.raises(pg.InputError, match="cpu_threads must be None or a positive number, got 0"):
        tiny_config(cpu_threads=0)


def test_streams_of_neighbouring_seeds_differ():
    agents = [pg.PolyGRAD("Pendulum-v1", seed=seed, config=tiny_config()) for seed in (0, 1)]
    states = [
        generator.get_state()
        for streams in (agent.training.streams for agent in agents)
        for generator in (streams.generator, streams.acting, streams.predictions)
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(states, 2))


def test_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path):
    run_dir = tmp_path / "run"
    pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=run_dir).learn(100)
    damaged = run_dir / "checkpoints" / "step_000000100" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.warns(UserWarning, match="step_000000100"):
        agent = pg.PolyGRAD.resume(run_dir)
    assert agent.num_timesteps == 50


class BrokenPendulum(gymnasium.Wrapper):
    """Pendulum whose observation becomes NaN after some steps."""

    def __init__(self, good_steps: int):
        super().__init__(gymnasium.make("Pendulum-v1"))
        self.remaining = good_steps

    def step(self, action):
        observation, *rest = super().step(action)
        self.remaining -= 1
        return (observation if self.remaining > 0 else observation * np.nan, *rest)


def test_nan_observation_stops_with_a_sentence(tmp_path):
    agent = pg.PolyGRAD(
        lambda: BrokenPendulum(70), config=tiny_config(eval_interval=10_000), run_dir=tmp_path / "r"
    )
    agent.evaluator.evaluate = lambda episodes: EpisodeStatistics(
        np.zeros(1), np.ones(1, dtype=int)
    )
    message = r"step 69: Pendulum-v1, step 70.*observation\[0\] must be .*, got nan.*step_000000069"
    with pytest.raises(pg.InputError, match=message):
        agent.learn(150)
    assert read_metrics(tmp_path / "r" / "metrics.csv")[-1]["env_step"] == 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an environment that is not deterministic
        resumed = pg.PolyGRAD.resume(tmp_path / "r", env=lambda: BrokenPendulum(10_000))
    assert resumed.num_timesteps == 69
    resumed.learn(81)
    whole = pg.PolyGRAD("Pendulum-v1", config=tiny_config(eval_interval=10_000))
    whole.learn(150)
    for name, weight in whole.training.weights().items():
        assert torch.equal(weight, resumed.training.weights()[name]), name


def test_nan_in_training_names_step_quantity_and_checkpoint(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path / "run")

    def poison(agent, metrics):
        if agent.num_timesteps == 75:
            with torch.no_grad():
                agent.world_model.trainer.model.output.bias.fill_(float("nan"))

    with pytest.raises(pg.NonFiniteError) as caught:
        agent.learn(150, callback=poison)
    message = str(caught.value)
    assert "environment step 76" in message
    assert "denoiser's loss is nan" in message
    assert "step_000000050" in message
    assert pg.PolyGRAD.resume(tmp_path / "run").num_timesteps == 50


def test_broken_weights_replace_no_checkpoint(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(learning_starts=120), run_dir=tmp_path)

    def poison(agent, metrics):
        if agent.num_timesteps == 75:
            with torch.no_grad():
                agent.training.learner.value_function.network[-1].bias.fill_(float("nan"))

    message = r"step 100: the weight value_function\..* is not finite; .*step_000000050"
    with pytest.raises(pg.NonFiniteError, match=message):
        agent.learn(150, callback=poison)
    assert pg.PolyGRAD.resume(tmp_path).num_timesteps == 50


def test_environment_instances_and_functions():
    from_instance = pg.PolyGRAD(gymnasium.make("Pendulum-v1"), config=tiny_config())
    assert from_instance.evaluate(2).returns.shape == (2,)
    from_function = pg.PolyGRAD(lambda: gymnasium.make("Pendulum-v1"), config=tiny_config())
    assert from_function.evaluate(2, seed=1).returns.shape == (2,)
    with pytest.raises(pg.InputError, match="must return a gymnasium.Env, got int"):
        pg.PolyGRAD(lambda: 3, config=tiny_config())


def test_load_needs_the_environment_where_it_has_no_id(tmp_path):
    class Custom(gymnasium.Wrapper):
        @property
        def spec(self):
            return None

    agent = pg.PolyGRAD(lambda: Custom(gymnasium.make("Pendulum-v1")), config=tiny_config())
    agent.learn(60)
    agent.save(tmp_path / "saved")
    with pytest.raises(pg.InputError, match="give the environment as env="):
        pg.PolyGRAD.load(tmp_path / "saved")
    loaded = pg.PolyGRAD.load(tmp_path / "saved", env=lambda: Custom(gymnasium.make("Pendulum-v1")))
    assert loaded.num_timesteps == 60


class Forgetful(gymnasium.Wrapper):
    """Pendulum whose episodes are not given by their seeds, or that cannot be begun again."""

    def __init__(self, error: Exception | None = None):
        super().__init__(gymnasium.make("Pendulum-v1"))
        self.error, self.resets = error, 0

    def reset(self, **options):
        self.resets += 1
        if self.error is not None:
            raise self.error
        return super().reset(**options | {"seed": None})


def test_loading_does_not_replay_the_episode_training_does(tmp_path):
    pg.PolyGRAD(Forgetful, config=tiny_config(), run_dir=tmp_path / "run").learn(60)
    with warnings.catch_warnings(action="error"):
        agent = pg.PolyGRAD.load(tmp_path / "run", env=Forgetful)
        assert agent.environment.env.resets == 0
        agent.evaluate(1)
        agent.save(tmp_path / "saved")  # with the episode, though it has not been replayed
    for source in (tmp_path / "run", tmp_path / "saved"):
        agent = pg.PolyGRAD.load(source, env=Forgetful)
        with pytest.warns(UserWarning, match="not deterministic: replaying the 60 actions"):
            agent.learn(10)
        assert agent.replay.num_episodes == 1 and agent.environment.episode_length == 10


def test_an_environment_that_cannot_be_restored_is_not_called_a_damaged_checkpoint(tmp_path):
    pg.PolyGRAD(Forgetful, config=tiny_config(), run_dir=tmp_path).learn(60)
    before = load_checkpoint(tmp_path / "checkpoints" / "step_000000060")[1]
    agent = pg.PolyGRAD.resume(tmp_path, env=lambda: Forgetful(KeyError("no such body")))
    with pytest.raises(KeyError, match="no such body") as caught:
        agent.learn(10)
    assert "stopped at environment step 60; " in caught.value.__notes__[0]
    after = load_checkpoint(tmp_path / "checkpoints" / "step_000000060")[1]
    assert str(after["environments"]) == str(before["environments"])


def test_resume_with_a_function_as_environment(tmp_path):
    def make():
        return gymnasium.make("Pendulum-v1", g=1.0)

    pg.PolyGRAD(make, config=tiny_config(), run_dir=tmp_path).learn(60)
    with pytest.raises(pg.InputError, match="give the environment as env="):
        pg.PolyGRAD.resume(tmp_path)
    resumed = pg.PolyGRAD.resume(tmp_path, env=make)
    assert resumed.num_timesteps == 60 and resumed.environment.env.unwrapped.g == 1.0


def test_environment_of_a_module_is_imported_again_on_load(tmp_path, monkeypatch):
    module = "import gymnasium\ngymnasium.register('Own-v0', 'mine:make')\n"
    module += (
        "def make(**options):\n    return gymnasium.make('Pendulum-v1', **options).unwrapped\n"
    )
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    agent = pg.PolyGRAD("mine:Own-v0", config=tiny_config())
    agent.save(tmp_path / "saved")
    gymnasium.registry.pop("Own-v0")
    monkeypatch.delitem(sys.modules, "mine")
    assert pg.PolyGRAD.load(tmp_path / "saved").env_id == "mine:Own-v0"
    gymnasium.registry.pop("Own-v0")


def test_evaluation_and_prediction_do_not_disturb_training():
    def weights(disturb):
        agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
        agent.learn(60)
        if disturb:
            agent.evaluate(3, deterministic=False)
            agent.predict(np.zeros(3))
        agent.learn(20)
        return agent.policy.log_std.detach().clone()

    assert torch.equal(weights(True), weights(False))


def test_wrapped_instances_are_copied_for_evaluation():
    class Halved(gymnasium.RewardWrapper):
        def reward(self, reward):
            return reward / 2

    agent = pg.PolyGRAD(Halved(gymnasium.make("Pendulum-v1")), config=tiny_config())
    plain = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    halved, whole = agent.evaluate(2, seed=1), plain.evaluate(2, seed=1)
    assert halved.returns == pytest.approx(whole.returns / 2)


def test_nan_policy_is_not_blamed_on_the_environment():
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    with torch.no_grad():
        agent.policy.log_std.fill_(0.0)
        agent.policy.network[-1].bias.fill_(float("nan"))
    with pytest.raises(pg.NonFiniteError, match="policy's mean"):
        agent.evaluate(2)


def test_callback_and_tensorboard_are_checked(tmp_path):
    with pytest.raises(pg.InputError, match="callback must be callable, got 5"):
        pg.PolyGRAD("Pendulum-v1", config=tiny_config()).learn(10, callback=5)
    with pytest.raises(pg.InputError, match="tensorboard=True needs a run_dir"):
        pg.PolyGRAD("Pendulum-v1", config=tiny_config(), tensorboard=True)
    run_dir = tmp_path / "run"
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=run_dir, tensorboard=True)
    agent.learn(30)
    assert list(run_dir.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "kind, step_conditioning", [("transformer", None), ("residual_mlp", "layer")]
)
@pytest.mark.filterwarnings("ignore:prediction_type 'epsilon'")
def test_other_denoisers_and_the_paper_sampler_train(kind, step_conditioning):
    config = tiny_config(sampler=pg.SamplerConfig.paper())
    config = replace(
        config,
        denoiser=replace(config.denoiser, kind=kind, step_conditioning=step_conditioning),
        guidance=replace(config.guidance, rule="linear"),
    )
    agent = pg.PolyGRAD("Pendulum-v1", config=config)
    agent.learn(60)
    batch = agent.imagine(5)
    assert batch.observations.shape == (5, 4, 3) and torch.isfinite(batch.actions).all()


def test_predicting_noise_is_warned_of_once_when_training_starts():
    config = tiny_config(sampler=pg.SamplerConfig.paper())
    with warnings.catch_warnings(record=True, action="always") as caught:
        agent = pg.PolyGRAD("Pendulum-v1", config=config)
        agent.evaluate(1)
        assert not caught
        for _ in range(2):
            agent.learn(1)
        assert [warning.filename for warning in caught] == [__file__]
        assert "--sampler.prediction-type sample" in str(caught[0].message)
    with warnings.catch_warnings(action="error"):
        sampler = pg.SamplerConfig.paper(prediction_type="sample")
        pg.PolyGRAD("Pendulum-v1", config=tiny_config(sampler=sampler)).learn(1)


class Crash(Exception):
    pass


class Crashing(gymnasium.Wrapper):
    """Pendulum that raises in `step` or `reset` after some calls of it."""

    def __init__(self, where: str = "", good_calls: int = 0):
        super().__init__(gymnasium.make("Pendulum-v1"))
        self.where, self.remaining = where, good_calls

    def count(self, where):
        self.remaining -= where == self.where
        if where == self.where and self.remaining < 0:
            raise Crash("the simulator is gone")

    def step(self, action):
        self.count("step")
        return super().step(action)

    def reset(self, **options):
        self.count("reset")
        return super().reset(**options)


def crash_in_step(agent):
    agent.environment.env.where, agent.environment.env.remaining = "step", 211


def crash_in_reset(agent):
    agent.environment.env.where, agent.environment.env.remaining = "reset", 1


def crash_in_prefill(agent):
    agent.environment.env.where, agent.environment.env.remaining = "step", 33


def crash_in_evaluation(agent):
    evaluate = agent.evaluator.evaluate

    def evaluate_until(episodes):
        if agent.num_timesteps == 179:  # in the step after
            raise Crash
        return evaluate(episodes)

    agent.evaluator.evaluate = evaluate_until


def interrupt_in_pretraining(agent):
    update, seen = agent.training.update_model, []

    def interrupted(count):
        seen.append(None)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        update(count)

    agent.training.update_model = interrupted


def interrupt_in_the_last_step(agent):
    update = agent.training.update_model

    def interrupted(count):
        if agent.num_timesteps == 229:
            signal.raise_signal(signal.SIGINT)
        update(count)

    agent.training.update_model = interrupted


CRASHES = {
    # what happens, the step it happens in, finished steps
    crash_in_step: (Crash, 211, 211),
    crash_in_reset: (Crash, 200, 200),
    crash_in_prefill: (Crash, 33, 33),
    crash_in_evaluation: (Crash, 180, 179),
    interrupt_in_pretraining: (KeyboardInterrupt, 40, 39),
    interrupt_in_the_last_step: (KeyboardInterrupt, 230, 229),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    agent = pg.PolyGRAD(Crashing, config=crashing_config(), run_dir=run_dir)
    agent.learn(230)
    return agent


def crashing_config() -> pg.TrainConfig:
    config = tiny_config(checkpoint_interval=150, policy_updates_per_env_step=0.5)
    return replace(config, normalizer=replace(config.normalizer, refresh="episode"))


@pytest.mark.parametrize("how", CRASHES, ids=lambda how: how.__name__)
@pytest.mark.parametrize("go_on", ["resumed", "same object"])
def test_what_was_learnt_is_saved_before_an_error_is_raised(tmp_path, capfd, whole_run, how, go_on):
    kind, step, finished = CRASHES[how]
    agent = pg.PolyGRAD(Crashing, config=crashing_config(), run_dir=tmp_path / "run")
    how(agent)
    with pytest.raises(kind) as caught:
        agent.learn(230)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (note,) = caught.value.__notes__
    assert f"stopped at environment step {step};" in note
    assert f"step_{finished:09d}" in note
    stopping = "stopping after the current update, press Ctrl-C again to stop at once\n"
    assert (stopping in capfd.readouterr().err) == (kind is KeyboardInterrupt)
    assert agent.num_timesteps == finished
    if agent.environment.env.where:
        with pytest.raises(Crash):  # nothing is lost by trying again too early
            agent.learn(230 - finished)
    if go_on == "resumed":
        np.random.seed(99)
        agent = pg.PolyGRAD.resume(tmp_path / "run", env=Crashing)
        assert agent.num_timesteps == finished
    else:
        agent.environment.env.where = ""
        agent.evaluator.__dict__.pop("evaluate", None)
        agent.training.__dict__.pop("update_model", None)
    agent.learn(230 - finished)
    assert_same_run(agent, whole_run)


def test_an_interrupt_stops_after_one_update_and_a_second_one_at_once(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    update, updates = agent.training.update_model, []

    def interrupted(count):
        updates.append(agent.num_timesteps)
        if len(updates) in (2, 4):
            signal.raise_signal(signal.SIGINT)
        if len(updates) == 4:
            signal.raise_signal(signal.SIGINT)
        update(count)

    agent.training.update_model = interrupted
    with pytest.raises(KeyboardInterrupt):
        agent.learn(60)
    assert updates == [39, 39]  # of five
    with pytest.raises(KeyboardInterrupt) as caught:
        agent.learn(60)
    assert updates == [39] * 4  # the fourth was cut off: what was saved before it stays
    assert "step_000000039" in caught.value.__notes__[0]
    _, state, _ = load_checkpoint(tmp_path / "checkpoints" / "step_000000039")
    assert state["begun_step"] == {"model_update": 3, "policy_update": 0}


def test_signals_are_left_alone_where_they_are_not_ours(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        agent.learn(10, callback=lambda a, metrics: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT] * 2
    thread = threading.Thread(target=agent.learn, args=(10,))
    thread.start()
    thread.join()
    assert agent.num_timesteps == 20


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), TimeoutError("late")])
def test_errors_of_the_system_keep_their_class(error):
    agent = pg.PolyGRAD(Crashing, config=tiny_config())

    def fail(action):
        raise error

    agent.environment.env.step = fail
    with pytest.raises(type(error)) as caught:
        agent.learn(10)
    assert caught.value is error and "environment step 0; " in error.__notes__[0]


def test_the_best_so_far_is_what_was_kept(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    agent.learn(10)
    kept = agent.evaluator.best_mean_reward
    better = EpisodeStatistics(np.full(1, kept + 1), np.ones(1, dtype=int))
    agent.evaluator.evaluate = lambda episodes: better

    def full(step, weights):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_best, agent.run.save_best = agent.run.save_best, full
    with pytest.raises(OSError, match="No space left"):
        agent.learn(10)
    assert agent.evaluator.best_mean_reward == kept
    agent.run.save_best = save_best
    agent.learn(1)
    assert (agent.evaluator.best_mean_reward, agent.best_timestep()) == (kept + 1, 20)


@pytest.mark.parametrize("preserve", [False, True])
def test_refreshed_moments_leave_the_policy_as_it_is_where_asked_to(preserve):
    config = tiny_config(
        learning_starts=190,  # Pendulum's first episode ends at 200
        policy__normed_inputs=True,
        normalizer__refresh="episode",
        normalizer__preserve_functions=preserve,
        policy_updates_per_env_step=0.0,
    )
    agent = pg.PolyGRAD("Pendulum-v1", config=config)
    observations = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    agent.learn(195)
    before, mean = agent.predict(observations, True)[0], agent.normalizer.observations_mean.clone()
    agent.learn(10)
    assert not torch.equal(mean, agent.normalizer.observations_mean)
    change = np.abs(agent.predict(observations, True)[0] - before).max()
    assert (change < 1e-5) == preserve, change


def test_moments_cannot_be_folded_into_any_policy():
    config = tiny_config(policy__normed_inputs=True, normalizer__preserve_functions=True)
    normalizer = pg.Normalizer(3, 1)
    policy = pg.GaussianPolicy(3, 1, 8, normed_inputs=True, normalizer=normalizer)
    policy.network = torch.nn.Sequential(torch.nn.LayerNorm(3), *policy.network)
    with pytest.raises(pg.InputError, match="preserve_functions must be False .* got True"):
        pg.PolyGRAD(
            "Pendulum-v1", config=replace(config, a2c=replace(config.a2c, saturation_coef=0.0)),
            policy=policy,
        )  # fmt: skip


def test_a_callback_that_raises_loses_nothing(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)

    def crash(agent, metrics):
        if agent.num_timesteps == 75:
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        agent.learn(150, callback=crash)
    assert pg.PolyGRAD.resume(tmp_path).num_timesteps == 75


def full_disk(monkeypatch, agent, names, step):
    """Let writing one of a run's files fail from an environment step on."""
    original = run_log.os.fsync
    real_write = run_log.MetricsLog._append

    def fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if agent.replay.total_steps >= step and any(name in str(path) for name in names):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    def append(log, line):
        if agent.replay.total_steps >= step and "metrics.csv" in names:
            log._file.close()
            log._file = open("/dev/full", "wb", buffering=0)
        real_write(log, line)

    monkeypatch.setattr(run_log.os, "fsync", fsync)
    monkeypatch.setattr(run_log.MetricsLog, "_append", append)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "names, step, file, last",
    [
        (["metrics.csv"], 125, "metrics.csv", "step_000000124"),
        (["metrics.csv", "checkpoints"], 125, "metrics.csv", "step_000000100"),
        (["checkpoints"], 100, "step_000000100/weights.safetensors", "step_000000050"),
        (["state.pt"], 100, "step_000000100/state.pt", "step_000000050"),
        ([".tmp-best"], 120, "checkpoints/best/weights.safetensors", "step_000000119"),
    ],
)
def test_a_full_disk_names_file_step_and_last_checkpoint(
    tmp_path, monkeypatch, names, step, file, last
):
    config = tiny_config(eval_interval=120)
    agent = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "run")
    constant = EpisodeStatistics(np.zeros(1), np.ones(1, dtype=int))
    agent.evaluate = lambda episodes: constant  # always the best so far
    full_disk(monkeypatch, agent, names, step)
    with pytest.raises(OSError) as caught:
        agent.learn(150)
    message = str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert f"environment step {step}: " in message and "No space left on device" in message
    assert file in message and ".tmp" not in message
    assert f"last good checkpoint is {tmp_path / 'run' / 'checkpoints' / last}" in message
    monkeypatch.undo()
    resumed = pg.PolyGRAD.resume(tmp_path / "run")
    assert resumed.num_timesteps == int(last.removeprefix("step_"))
    resumed.evaluate = agent.evaluator.evaluate
    resumed.learn(150 - resumed.num_timesteps)
    whole = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "whole")
    whole.evaluate = agent.evaluator.evaluate
    whole.learn(150)
    assert_same_run(resumed, whole)


def test_a_run_directory_that_is_in_use_or_full_stays_as_it_is(tmp_path, monkeypatch):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    agent.learn(20)
    other = pg.PolyGRAD.resume(tmp_path)
    before = files_of(tmp_path)
    with locked(tmp_path), pytest.raises(pg.InputError, match="another process is training"):
        other.extend(500)
    assert files_of(tmp_path) == before and other.config.total_timesteps == 150
    with monkeypatch.context() as patch:
        full_disk(patch, agent, [".tmp-config.json"], 0)
        with pytest.raises(OSError) as caught:
            other.extend(500)
    message = str(caught.value)
    assert f"environment step 20 is not extended: {tmp_path / 'config.json'}: No space" in message
    assert message.endswith("step_000000020")
    assert files_of(tmp_path) == before and other.config.total_timesteps == 150
    other.extend(np.int64(500))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["total_timesteps"] == 500


def test_an_agent_that_others_have_overtaken_does_not_overwrite_them(tmp_path):
    fresh = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    pg.PolyGRAD.resume(tmp_path).learn(20)
    loaded = pg.PolyGRAD.load(tmp_path)
    pg.PolyGRAD.resume(tmp_path).learn(10)
    before = files_of(tmp_path)
    for agent in (fresh, loaded):
        with pytest.raises(pg.InputError, match="has trained in .* load it again"):
            agent.learn(10)
    assert files_of(tmp_path) == before
    pg.PolyGRAD.load(tmp_path).learn(10)


@pytest.mark.parametrize("steps", [10, 40])
def test_every_learning_ends_with_an_evaluation(steps):
    rows = []
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    agent.learn(steps, callback=lambda a, metrics: rows.append((a.num_timesteps, metrics)))
    assert rows[-1][0] == steps and "eval/mean_reward" in rows[-1][1]


@pytest.mark.parametrize(
    "slow, delay, preset, words",
    [
        ("policy_update", 0, "default", "about 5.8 days"),
        ("model_update", 10**5, "laptop", "more than 5.8 days"),
    ],
)
def test_a_run_of_more_than_a_day_is_announced_once(monkeypatch, slow, delay, preset, words):
    """Also long before the first policy update, whose time is not known then."""
    typical = Speed.typical
    monkeypatch.setattr(
        Speed, "typical", lambda self: {n: 1.0 if n == slow else 1e-3 for n in typical(self)}
    )
    agent = pg.PolyGRAD("Pendulum-v1", preset, config=tiny_config(policy_delay_steps=delay))
    with pytest.warns(UserWarning, match=f"environment steps take {words} on 'cpu'") as caught:
        agent.learn(10**6, callback=lambda a, metrics: a.num_timesteps < 100)
    (message,) = [str(w.message) for w in caught]
    advised = "the presets 'quick' and 'laptop' are made for a CPU" in message
    assert advised == (preset == "default")  # 'laptop' is one of them


def test_wrong_arguments_are_one_sentence(tmp_path):
    config = tiny_config()
    with pytest.raises(pg.InputError, match=r"config must be a TrainConfig .* got \{\}"):
        pg.PolyGRAD("Pendulum-v1", config={})
    with pytest.raises(pg.InputError, match="preset must be one of .*, got 5"):
        pg.PolyGRAD("Pendulum-v1", preset=5)
    with pytest.raises(pg.InputError, match=r"preset must be one of .*, got \['quick'\]"):
        pg.PolyGRAD("Pendulum-v1", preset=["quick"])
    with pytest.raises(pg.InputError, match="run_dir must be a path .* got 5"):
        pg.PolyGRAD("Pendulum-v1", config=config, run_dir=5)
    with pytest.raises(pg.InputError, match="device"):
        pg.PolyGRAD("Pendulum-v1", config=config, device=1.5)
    for seed in (True, 1.0, None, "3", 2**32):
        with pytest.raises(pg.InputError, match="seed must be an integer in"):
            pg.PolyGRAD("Pendulum-v1", config=config, seed=seed)
    agent = pg.PolyGRAD("Pendulum-v1", config=config, device=None)
    for steps in (True, 1.5, "10", None, np.float64(3)):
        with pytest.raises(pg.InputError, match="total_timesteps must be an integer of at least"):
            agent.learn(steps)
        with pytest.raises(pg.InputError, match="num_episodes must be an integer of at least 1"):
            agent.evaluate(steps)
    for seed in (-1, 1.5, True):
        with pytest.raises(pg.InputError, match="seed must be an integer of at least 0"):
            agent.evaluate(1, seed)
    agent.learn(10)
    for number in (0, True, 1.5):
        with pytest.raises(pg.InputError, match="num_trajectories must be an integer of at least"):
            agent.imagine(number)
    for function in (agent.save, pg.PolyGRAD.load, pg.PolyGRAD.resume):
        for path in (5, None, b"x"):
            with pytest.raises(pg.InputError, match="must be a path"):
                function(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(pg.CheckpointError, match="file is a file, wanted a run or checkpoint"):
        pg.PolyGRAD.load(tmp_path / "file")


def test_numpy_integers_are_integers(tmp_path):
    config = replace(tiny_config(), horizon=np.int32(4), total_timesteps=np.int64(60))
    agent = pg.PolyGRAD("Pendulum-v1", config=config, seed=np.uint8(3), run_dir=tmp_path)
    agent.learn(np.int64(10))
    assert agent.evaluate(np.int16(2), seed=np.int64(5)).returns.shape == (2,)
    assert agent.imagine(np.int64(3)).observations.shape == (3, 4, 3)
    assert pg.PolyGRAD.resume(tmp_path).num_timesteps == 10


def test_a_damaged_best_checkpoint_is_called_damaged(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    with pytest.raises(pg.CheckpointError, match="has no best checkpoint yet"):
        pg.PolyGRAD.load(tmp_path, checkpoint="best")
    agent.learn(60)
    assert agent.best_timestep() in (0, 60)
    (tmp_path / "checkpoints" / "best" / "weights.safetensors").write_bytes(b"half")
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(
            pg.CheckpointError, match="can be used: .*weights.safetensors must have .* bytes, got 4"
        ),
    ):
        pg.PolyGRAD.load(tmp_path, checkpoint="best")


def test_a_step_of_ones_own_is_that_of_learning_and_counts_once_it_is_finished(monkeypatch):
    # `step` anneals to the end of the configured run, and leaves the threads alone
    config = tiny_config(total_timesteps=60, cpu_threads=None)
    learning, stepping = (pg.PolyGRAD("Pendulum-v1", config=config) for _ in range(2))
    learning.learn(60)
    update = stepping.training.update_model

    def stopped(count):
        update(count)
        if stepping.replay.total_steps == 40:
            stepping.stop()

    monkeypatch.setattr(stepping.training, "update_model", stopped)
    calls = 0
    while stepping.num_timesteps < 60:
        stepping.step()
        calls += 1
    assert calls == 64  # the five updates after the prefill took a call each
    for name, weight in learning.training.weights().items():
        assert torch.equal(weight, stepping.training.weights()[name]), name
