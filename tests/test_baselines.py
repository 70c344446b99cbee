"""Baselines of Stable-Baselines3 are measured as runs are."""

import json

import numpy as np
import pytest

import polygrad_fast as pg
from polygrad_fast import baselines, cli
from polygrad_fast.baselines import ALGORITHMS, train_baseline
from polygrad_fast.evaluation.returns import evaluate_policy
from polygrad_fast.runs.metrics import read_metrics

sb3 = pytest.importorskip("stable_baselines3")


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_baseline_leaves_metrics_and_models(algorithm, tmp_path):
    run = tmp_path / "run"
    result = train_baseline(algorithm, "Pendulum-v1", run, 150, 3, 60, 2)
    rows = [row for row in read_metrics(run / "metrics.csv") if "eval/mean_reward" in row]
    assert [row["env_step"] for row in rows] == [0, 60, 120, 150]
    assert rows[-1]["eval/mean_reward"] == result.mean_reward
    returns = [row["eval/mean_reward"] for row in rows]
    assert [row["eval/best_mean_reward"] for row in rows] == list(np.maximum.accumulate(returns))
    config = json.loads((run / "config.json").read_text())
    assert config["baseline"] == algorithm and config["seed"] == 3
    assert config["package"].startswith("stable_baselines3 ")
    assert not list(run.glob(".tmp*"))
    model = getattr(sb3, ALGORITHMS[algorithm][1]).load(run / "last.zip", device="cpu")
    environment = pg.PolyGRAD("Pendulum-v1", "quick", device="cpu").make_evaluation_environment()
    seeds = np.random.default_rng(3).integers(2**31, size=2).tolist()  # as an agent of this seed
    again = evaluate_policy(lambda o: model.predict(o, deterministic=True)[0], [environment], seeds)
    assert again.mean_reward == pytest.approx(result.mean_reward, rel=1e-5)


def test_nothing_is_left_among_the_temporary_files(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    train_baseline("ppo", "Pendulum-v1", tmp_path / "run", 20, 0, 20, 1)
    assert not list(temporary.iterdir())


def test_a_seed_gives_the_same_again(tmp_path):
    runs = [tmp_path / name for name in ("one", "two", "other")]
    for run, seed in zip(runs, (0, 0, 1), strict=True):
        train_baseline("ppo", "Pendulum-v1", run, 100, seed, eval_interval=50, eval_episodes=1)
    curves = [[row["eval/mean_reward"] for row in read_metrics(r / "metrics.csv")] for r in runs]
    assert curves[0] == curves[1] != curves[2]


def test_the_command(tmp_path, capsys):
    words = ["baseline", "--env-id", "Pendulum-v1", "--algo", "a2c", "--total-timesteps", "40"]
    words += ["--eval-interval", "20", "--eval-episodes", "1", "--no-progress", "--run-dir"]
    assert cli.main([*words, str(tmp_path / "run")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert json.loads(last)["mean_reward"] == rows[-1]["eval/mean_reward"]
    assert cli.main([*words, str(tmp_path / "run")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "run" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(baselines.ALGORITHMS, "ppo", ("no_such_package", "PPO"))
    with pytest.raises(pg.InputError, match="needs the package no_such_package: pip install"):
        train_baseline("ppo", "Pendulum-v1", tmp_path / "run", 10)
    assert not (tmp_path / "run").exists()


def test_normalized_training_saves_models_that_read_observations_as_they_are(tmp_path):
    """Returns played from best.zip are those of the evaluation that chose it, which normalized."""
    run = tmp_path / "run"
    options = {"num_envs": 2, "normalize": True, "hyperparameters": {"n_steps": 32}}
    train_baseline("ppo", "InvertedPendulum-v5", run, 150, 3, 60, 4, **options)
    rows = [row for row in read_metrics(run / "metrics.csv") if "eval/mean_reward" in row]
    assert [row["env_step"] for row in rows] == [0, 60, 120, 150]
    config = json.loads((run / "config.json").read_text())
    assert {name: config[name] for name in options} == options
    environment = pg.PolyGRAD(
        "InvertedPendulum-v5", "quick", device="cpu"
    ).make_evaluation_environment()
    seeds = np.random.default_rng(3).integers(2**31, size=4).tolist()
    for name, wanted in (("best", "best_mean_reward"), ("last", "mean_reward")):
        model = baselines.load_model("ppo", run / f"{name}.zip")
        assert model.n_steps == 32 and model.get_vec_normalize_env() is None
        again = evaluate_policy(
            lambda o, model=model: model.predict(o, deterministic=True)[0], [environment], seeds
        )
        assert again.mean_reward == pytest.approx(rows[-1][f"eval/{wanted}"], rel=0.05)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("sac", {"normalize": True}, "normalize must be left out with sac: only .'a2c', 'ppo'"),
        ("ppo", {"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ("ppo", {"hyperparameters": {"steps": 3}}, "ppo refuses hyperparameters .*'steps'"),
        ("ppo", {"hyperparameters": {"policy_kwargs": 3}}, "ppo refuses hyperparameters"),
        ("ppo", {"hyperparameters": {"gamma": "x"}}, "gamma must be a number as 0.99, got 'x'"),
        ("ppo", {"hyperparameters": {"n_steps": 1}}, "by ppo with hyperparameters .'n_steps': 1."),
        (
            "ppo",
            {"normalize": True, "hyperparameters": {"policy_kwargs": {"net_arch": []}}},
            "normalize needs networks with a hidden layer",
        ),
    ],
)
def test_unusable_options_are_named(tmp_path, algorithm, options, message):
    with pytest.raises(pg.InputError, match=message):
        train_baseline(algorithm, "Pendulum-v1", tmp_path / "run", 10, **options)
    assert not (tmp_path / "run").exists()


def test_hyperparameters_are_json(tmp_path, capsys):
    words = ["baseline", "--env-id", "Pendulum-v1", "--run-dir", str(tmp_path / "run")]
    assert cli.main([*words, "--hyperparameters", "n_steps=many"]) == 2
    assert "must be NAME=VALUE with values in JSON, got 'n_steps=many'" in capsys.readouterr().err
    assert cli.main([*words, "--hyperparameters", "gamma=NaN"]) == 2
    assert "must be NAME=VALUE with values in JSON, got 'gamma=NaN'" in capsys.readouterr().err
    assert cli.main([*words, "--hyperparameters", "gamma=0.9", "gamma=1"]) == 2
    assert "must name each once, got gamma again in 'gamma=1'" in capsys.readouterr().err
