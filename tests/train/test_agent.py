"""The training loop: exact resume, errors, saving."""

import itertools
import json
import shutil
import sys
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.evaluation.returns import EpisodeStatistics
from polygrad_fast.training.checkpoint import save_checkpoint
from polygrad_fast.training.run_log import read_metrics


def tiny_config(**overrides) -> pg.TrainConfig:
    """A configuration that trains in a second."""
    config = pg.TrainConfig.from_preset("quick", "Pendulum-v1")
    config = replace(
        config,
        horizon=4,
        schedule=replace(config.schedule, num_train_timesteps=3),
        denoiser=replace(
            config.denoiser, hidden_dim=16, num_layers=1, batch_size=16, pretrain_updates=5
        ),
        policy=replace(config.policy, hidden_dim=8),
        imagined_batch_size=8,
        learning_starts=40,
        eval_interval=60,
        eval_episodes=2,
        log_interval=25,
        checkpoint_interval=50,
        total_timesteps=150,
    )
    return replace(config, **overrides)


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


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


def test_ratios_of_updates_to_environment_steps():
    config = tiny_config(policy_delay_steps=10, policy_updates_per_env_step=0.25)
    agent = pg.PolyGRAD("Pendulum-v1", config=config)
    counts = {"denoiser/loss": 0.0, "a2c/actor_loss": 0.0}

    def count(name, value):
        if name in counts:
            counts[name] += 1

    agent._add_metric = count
    agent.learn(140)
    assert counts["denoiser/loss"] == 5 + (140 - 40) * 0.5
    assert counts["a2c/actor_loss"] == int((140 - 40 - 10) * 0.25)


def test_resume_continues_exactly(tmp_path):
    config = tiny_config(log_interval=30)  # the row of step 120 spans the checkpoint of step 100
    whole = pg.PolyGRAD("Pendulum-v1", seed=1, config=config, run_dir=tmp_path / "whole")
    whole.learn(150)
    part = pg.PolyGRAD("Pendulum-v1", seed=1, config=config, run_dir=tmp_path / "part")

    class Killed(Exception):
        pass

    def kill(agent, metrics):
        if agent.num_timesteps == 120:
            raise Killed

    with pytest.raises(Killed):
        part.learn(150, callback=kill)
    np.random.seed(99)  # the resumed run restores every generator itself
    torch.manual_seed(99)
    resumed = pg.PolyGRAD.resume(tmp_path / "part")
    assert resumed.num_timesteps == 100
    resumed.learn(50)
    assert comparable(read_metrics(tmp_path / "part" / "metrics.csv")) == comparable(
        read_metrics(tmp_path / "whole" / "metrics.csv")
    )
    for name, weight in whole._weights().items():
        assert torch.equal(weight, resumed._weights()[name]), name


def test_resume_at_an_episode_boundary_and_within_the_prefill(tmp_path):
    config = tiny_config(checkpoint_interval=20, log_interval=5, total_timesteps=230)
    whole = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "whole")
    whole.learn(230)
    part = pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "part")
    for stop in (20, 200, 220):  # within the prefill, right after an episode ended, after it

        def kill(agent, metrics, stop=stop):
            if agent.num_timesteps > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            part.learn(230 - part.num_timesteps, callback=kill)
        part = pg.PolyGRAD.resume(tmp_path / "part")
        assert part.num_timesteps == stop
    part.learn(230 - part.num_timesteps)
    assert comparable(read_metrics(tmp_path / "part" / "metrics.csv")) == comparable(
        read_metrics(tmp_path / "whole" / "metrics.csv")
    )


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
    for name, weight in agent._weights().items():
        assert torch.equal(weight, loaded._weights()[name]), name


def test_predict_is_within_bounds_and_batched():
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config())
    actions, state = agent.predict(np.zeros((7, 3)))
    assert actions.shape == (7, 1) and state is None
    assert (np.abs(actions) <= 2).all()
    assert agent.predict(np.zeros(3))[0].shape == (1,)


@pytest.mark.parametrize(
    "observation, message",
    [
        (np.zeros(4), r"shape \(4,\) given, wanted \[3\]"),
        (np.array([0.0, np.nan, 0.0]), r"observation\[1\] is nan"),
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
    with pytest.raises(pg.InputError, match="preset 'fast'"):
        pg.PolyGRAD("Pendulum-v1", preset="fast")
    with pytest.raises(pg.InputError, match="seed"):
        pg.PolyGRAD("Pendulum-v1", seed=-1, config=config)
    with pytest.raises(pg.InputError, match="device 'nonsense'"):
        pg.PolyGRAD("Pendulum-v1", config=config, device="nonsense")
    with pytest.raises(pg.InputError, match="total_timesteps"):
        pg.PolyGRAD("Pendulum-v1", config=config).learn(0)
    pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "run")
    with pytest.raises(pg.InputError, match="already holds a run"):
        pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / "run")


def test_checkpoint_of_another_configuration(tmp_path):
    for name, horizon in (("a", 4), ("b", 5)):
        config = tiny_config(horizon=horizon)
        pg.PolyGRAD("Pendulum-v1", config=config, run_dir=tmp_path / name).learn(50)
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "checkpoints", tmp_path / "a" / "checkpoints")
    for load in (pg.PolyGRAD.resume, pg.PolyGRAD.load):
        with pytest.raises(pg.CheckpointError, match="horizon 5 instead of 4 of the run"):
            load(tmp_path / "a")
    with pytest.raises(pg.CheckpointError, match="does not exist"):
        pg.PolyGRAD.load(tmp_path / "nothing")


def test_damaged_configuration(tmp_path):
    pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(pg.CheckpointError, match="config.json is damaged: .*'env_id'"):
        pg.PolyGRAD.resume(tmp_path)


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path):
    def kill(agent, metrics):
        if agent.num_timesteps == 25:
            raise KeyboardInterrupt

    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(60, callback=kill)
    pg.PolyGRAD.resume(tmp_path).learn(60)
    assert [row["env_step"] for row in read_metrics(tmp_path / "metrics.csv")] == [0, 25, 50, 60]


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
    state = agent._state() | {
        "device_type": "cuda",
        "generator": torch.zeros(16, dtype=torch.uint8),  # as long as a CUDA generator's
    }
    save_checkpoint(tmp_path / "saved", agent._weights(), state, agent._metadata())
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
        for agent in agents
        for generator in (agent.generator, agent._acting_generator, agent._prediction_generator)
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
    agent.evaluate = lambda episodes: EpisodeStatistics(np.zeros(1), np.ones(1, dtype=int))
    message = r"step 69: Pendulum-v1, step 70.*observation\[0\] is nan.*step_000000050"
    with pytest.raises(pg.InputError, match=message):
        agent.learn(150)
    assert read_metrics(tmp_path / "r" / "metrics.csv")[-1]["env_step"] == 50


def test_nan_in_training_names_step_quantity_and_checkpoint(tmp_path):
    agent = pg.PolyGRAD("Pendulum-v1", config=tiny_config(), run_dir=tmp_path / "run")

    def poison(agent, metrics):
        if agent.num_timesteps == 75:
            with torch.no_grad():
                agent.denoiser_trainer.model.output.bias.fill_(float("nan"))

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
                agent.actor_critic.value_function.network[-1].bias.fill_(float("nan"))

    message = r"step 100: the weight value_function\..* is not finite; .*step_000000050"
    with pytest.raises(pg.NonFiniteError, match=message):
        agent.learn(150, callback=poison)
    assert pg.PolyGRAD.resume(tmp_path).num_timesteps == 50


def test_environment_instances_and_functions():
    from_instance = pg.PolyGRAD(gymnasium.make("Pendulum-v1"), config=tiny_config())
    assert from_instance.evaluate(2).returns.shape == (2,)
    from_function = pg.PolyGRAD(lambda: gymnasium.make("Pendulum-v1"), config=tiny_config())
    assert from_function.evaluate(2, seed=1).returns.shape == (2,)
    with pytest.raises(pg.InputError, match="returned int"):
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
    "kind, step_conditioning", [("transformer", "input"), ("residual_mlp", "layer")]
)
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
