"""Every world model that a configuration can name is trained, resumed, saved and asked alike."""

import shutil
import typing

import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config
from polygrad_fast import cli
from polygrad_fast.runs.metrics import read_metrics
from polygrad_fast.training.model_memory import MODEL_MEMORY

NAMES = typing.get_args(typing.get_type_hints(pg.TrainConfig)["world_model"])


def small_config(world_model: str) -> pg.TrainConfig:
    sizes = {"autoregressive__hidden_dim": 8, "autoregressive__pretrain_updates": 5}
    return tiny_config(world_model=world_model, policy_updates_per_env_step=0.25, **sizes)


def test_each_name_is_a_model_of_its_own_with_estimates_and_options():
    models = [pg.PolyGRAD("Pendulum-v1", config=small_config(name)).world_model for name in NAMES]
    assert len({type(model) for model in models}) == len(NAMES) >= 2
    assert set(MODEL_MEMORY) == set(NAMES)
    for name in NAMES:
        config = small_config(name)
        assert config.world_model_training is getattr(config, MODEL_MEMORY[name].options)
        assert config.world_model_training.pretrain_updates == 5


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_continues_exactly(name, tmp_path):
    def copy(agent, metrics):
        if agent.num_timesteps == 75:  # after the checkpoint at step 50
            shutil.copytree(agent.run_dir, tmp_path / "left")

    whole = pg.PolyGRAD("Pendulum-v1", config=small_config(name), run_dir=tmp_path / "whole")
    whole.learn(100, callback=copy)
    resumed = pg.PolyGRAD.resume(tmp_path / "left")
    assert resumed.num_timesteps == 50
    resumed.learn(50)
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(path)]
        for path in (tmp_path / "left" / "metrics.csv", tmp_path / "whole" / "metrics.csv")
    ]
    assert rows[0] == rows[1] and "a2c/actor_loss" in rows[0][-1]
    batches = [agent.imagine(5) for agent in (resumed, whole)]
    for field in ("observations", "actions", "rewards", "terminals"):
        assert torch.equal(*(getattr(batch, field) for batch in batches)), field


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_take_every_model(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = (
        f"--world-model {name} --preset quick --horizon 4 --learning-starts 40 "
        "--eval-episodes 1 --imagined-batch-size 8 --denoiser.hidden-dim 8 "
        "--autoregressive.hidden-dim 8 --denoiser.pretrain-updates 2 "
        "--autoregressive.pretrain-updates 2 --ensemble.hidden-dim 8 "
        "--ensemble.pretrain-updates 2 --no-progress --total-timesteps 60"
    )
    assert cli.main(f"train --env-id Pendulum-v1 --run-dir run {tiny}".split()) == 0
    assert cli.main("train --resume --run-dir run --total-timesteps 70 --no-progress".split()) == 0
    assert cli.main("evaluate run --episodes 1 --checkpoint last".split()) == 0
    assert cli.main("sample run --num 3 --out batch.npz".split()) == 0
    capsys.readouterr()
    other = next(each for each in NAMES if each != name)
    assert cli.main(f"train --resume --run-dir run --world-model {other}".split()) == 2
    message = capsys.readouterr().err
    assert f"{other!r}" in message and f"{name!r}" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_are_those_of_the_whole_and_longer_ones_are_refused_or_given(name):
    model = pg.PolyGRAD("Pendulum-v1", config=small_config(name)).world_model
    policy, s0 = pg.GaussianPolicy(3, 1, 8), torch.randn(6, 3)

    def imagine(horizon):
        return model.imagine(s0, policy, torch.Generator().manual_seed(3), horizon=horizon)

    whole, part = imagine(None), imagine(2)
    assert whole.rewards.shape == (6, 4)
    for field in ("observations", "actions", "rewards", "terminals"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[:, :2]), field
    if model.longest_horizon is None:
        assert imagine(9).rewards.shape == (6, 9)
        return
    assert model.longest_horizon == 4
    with pytest.raises(pg.InputError, match="horizon must be at most 4, .*, got 9: train one with"):
        imagine(9)


@pytest.mark.parametrize("asked", ["denoiser", "sampler"])
def test_what_only_diffusion_has_is_refused_of_others(asked):
    for name in NAMES:
        agent = pg.PolyGRAD("Pendulum-v1", config=small_config(name))
        if name == "trajectory_diffusion":
            assert getattr(agent, asked) is not None
            continue
        message = f"world_model must be 'trajectory_diffusion' for an agent's {asked}, got '{name}'"
        with pytest.raises(pg.InputError, match=f"^{message}$"):
            getattr(agent, asked)
