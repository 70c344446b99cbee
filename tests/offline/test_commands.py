"""The offline commands as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from polygrad_fast import cli
from polygrad_fast.config import offline as presets
from polygrad_fast.data.collect import collect_episodes
from polygrad_fast.data.environment import make_environment
from polygrad_fast.data.load import load_dataset
from polygrad_fast.offline import demo
from polygrad_fast.offline.diffusion import DiffusionTraining
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.metrics import read_metrics

DIFFUSE = (
    "--network.features 24 --network.num-levels 2 --window-length 6 --total-updates 12 "
    "--training.batch-size 8 --validation-interval 6 --validation-fraction 0.2 "
    "--validation-windows 16 --log-interval 4 --checkpoint-interval 5 --no-progress"
).split()
ENSEMBLE = (
    "--window-length 5 --ensemble.num-members 3 --ensemble.num-elites 2 --ensemble.hidden-dim 16 "
    "--ensemble.num-layers 1 --ensemble.batch-size 32 --total-updates 12 --log-interval 4 "
    "--checkpoint-interval 5 --no-progress"
).split()
TRAIN = (
    "--total-updates 12 --batch-size 16 --num-trajectories 20 --lifetime 4 --eval-interval 6 "
    "--eval-episodes 2 --sampler.num-inference-steps 3 --sampling-batch-size 8 --log-interval 5 "
    "--checkpoint-interval 5 --td3-bc.hidden-dim 16 --iql.hidden-dim 16 --no-progress"
).split()


def diffuse(dataset, run_dir, *more):
    return ["offline", "diffuse", "--dataset", dataset, "--run-dir", run_dir, *DIFFUSE, *more]


def ensemble(dataset, run_dir, *more):
    words = ["offline", "ensemble", "--dataset", dataset, "--run-dir", run_dir]
    return [*words, *ENSEMBLE, *more]


def train(dataset, run_dir, *more, agent="td3_bc"):
    words = ["offline", "train", "--agent", agent, "--dataset", dataset, "--run-dir", run_dir]
    return [*words, *TRAIN, *more]


def run(words):
    return cli.main([str(word) for word in words])


def test_diffuse_trains_a_model(dataset_file, tmp_path, capsys):
    run_dir = tmp_path / "diffusion"
    assert run(diffuse(dataset_file, run_dir)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("training a diffusion model on ")
    assert out[-1].startswith("update 12: diffusion/loss ")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["kind"] == "offline diffuse" and config["preset"] == "quick"
    network = {"features": 24, "num_levels": 2, "norm_over": "window"}
    assert config["config"]["network"] == network
    assert {path.name for path in run_dir.iterdir()} >= {"versions.json", "checkpoints"}
    assert (run_dir / "metrics.csv").read_text().startswith("update,")
    assert run(["offline", "diffuse", "--resume", "--run-dir", run_dir]) == 0
    assert "resuming at update 12 of 12" in capsys.readouterr().out


@pytest.mark.parametrize("agent", ["td3_bc", "iql"])
@pytest.mark.parametrize("data", ["real", "unguided", "guided", "ensemble"])
def test_train_and_evaluate(dataset_file, model_dir, ensemble_dir, tmp_path, capsys, agent, data):
    run_dir = tmp_path / "agent"
    models = {"unguided": model_dir, "guided": model_dir, "ensemble": ensemble_dir}
    more = ["--data", data]
    if data in models:
        more += ["--ensemble" if data == "ensemble" else "--diffusion", models[data]]
    assert run(train(dataset_file, run_dir, *more, agent=agent)) == 0
    assert "update 12: eval/mean_reward -" in capsys.readouterr().out
    assert not (run_dir / "synthetic").exists()
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    rows = read_metrics(run_dir / "metrics.csv")
    assert f"{agent}/actor_loss" in rows[-1] and rows[-1]["update"] == 12
    assert ("synthetic/set" in rows[-1]) == (data != "real")
    for checkpoint in ("last", "best"):
        words = ["offline", "evaluate", run_dir, "--episodes", "2", "--checkpoint", checkpoint]
        assert run(words) == 0
        out = capsys.readouterr().out
        result = json.loads(out.splitlines()[-1])
        assert set(result) == {"mean_reward", "std_reward"} and result["mean_reward"] < 0
        assert "Pendulum-v1 has no D4RL score" in out
        assert run(words) == 0
        assert capsys.readouterr().out == out


def stored_weights(run_dir):
    return load_checkpoint(run_dir / "checkpoints" / "step_000000200")


def rows_without_times(run_dir):
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(run_dir / "metrics.csv")
    ]


@pytest.mark.parametrize("command", ["diffuse", "ensemble", "train"])
def test_killed_and_resumed_runs_are_the_same_to_the_bit(
    dataset_file, model_dir, tmp_path, command
):
    """kill -9 at a moment that the test does not choose."""
    long = ["--total-updates", "200", "--checkpoint-interval", "10"]

    def words(run_dir):
        if command == "diffuse":
            return diffuse(dataset_file, run_dir, *long)
        if command == "ensemble":
            return ensemble(dataset_file, run_dir, *long)
        more = ["--data", "guided", "--diffusion", model_dir, "--lifetime", "50", *long]
        return train(dataset_file, run_dir, *more, "--eval-interval", "100")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "polygrad_fast", *map(str, words(killed))],
        stdout=subprocess.DEVNULL,
    )
    steps, deadline = killed / "checkpoints", time.monotonic() + 60
    while not list(steps.glob("step_*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_metrics(killed / "metrics.csv")[-1]["update"] < 200
    assert run(["offline", command, "--resume", "--run-dir", killed, "--no-progress"]) == 0
    assert run(words(whole)) == 0
    weights, state, _ = stored_weights(whole)
    others, other_state, _ = stored_weights(killed)
    assert set(weights) == set(others)
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name
    assert rows_without_times(whole) == rows_without_times(killed)
    key = "noise" if command == "diffuse" else "draws"
    assert torch.equal(state[key], other_state[key])


def test_an_interrupt_saves_and_says_how_to_go_on(dataset_file, tmp_path):
    run_dir = tmp_path / "run"
    words = train(dataset_file, run_dir, "--total-updates", "1000000")
    process = subprocess.Popen(
        [sys.executable, "-m", "polygrad_fast", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (run_dir / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"`polygrad-fast offline train --resume --run-dir {run_dir}` continues" in out


WRONG = [
    ("diffuse --dataset gone.npz", "gone.npz does not exist, wanted a dataset"),
    ("diffuse --dataset text.txt", "text.txt is not a dataset"),
    ("diffuse --dataset DATA --env-id Nope-v1", "gymnasium knows, got 'Nope-v1'"),
    ("diffuse --dataset DATA --env-id CartPole-v1", "action space must be a Box"),
    ("diffuse --dataset DATA --window-length 0", "window_length must be at least 1, got 0"),
    ("diffuse --dataset DATA --window-length 3", "window_length must be at least 4 for 3 levels"),
    ("diffuse --dataset DATA --window-length 900", "the longest episode has 200 steps"),
    ("diffuse --dataset DATA --training.batch-size 99999", "batch_size must be at most the number"),
    ("diffuse --dataset DATA --network.features 20", "features must be a multiple of 8, got 20"),
    ("diffuse --dataset DATA --preset fast", "preset must be one of ['released', 'paper', 'quick'"),
    ("diffuse --dataset DATA --seed -1", "seed must be an integer in [0, 4294967296), got -1"),
    ("diffuse --dataset DATA --device warp", "device 'warp' cannot be used"),
    ("diffuse", "--dataset"),
    (
        "diffuse --resume",
        "run is not a run directory: it has no config.json, which `offline diffuse` makes",
    ),
    ("train --agent td3_bc --dataset gone.npz", "gone.npz does not exist, wanted a dataset"),
    ("train --agent cql --dataset DATA", "agent"),
    (
        "train --agent iql --dataset DATA --data ensemble",
        "--data ensemble needs --ensemble, the run dir",
    ),
    ("train --agent iql --dataset DATA --data ensemble --ensemble gone", "`offline ensemble` mak"),
    ("train --agent iql --dataset DATA --data ensemble --ensemble MODEL", "is a run of `offline d"),
    ("train --agent iql --dataset DATA --ensemble MODEL", "--data real needs no --ensemble, got"),
    ("ensemble --dataset DATA --ensemble.num-elites 9", "num_elites must be at most num_members"),
    ("ensemble --dataset DATA --ensemble.batch-size 9999", "must hold at least 9999 transitions"),
    ("train --agent iql --dataset DATA --data dreams", "--data must be one of ['real', 'unguided'"),
    ("train --agent iql --dataset DATA --data guided", "--data guided needs --diffusion"),
    ("train --agent iql --dataset DATA --diffusion MODEL", "--data real needs no --diffusion"),
    (
        "train --agent iql --dataset DATA --data guided --diffusion gone",
        "gone is not a run directory: it has no config.json, which `offline diffuse` makes",
    ),
    (
        "train --agent iql --dataset OTHER --env-id MountainCarContinuous-v0 --data guided "
        "--diffusion MODEL",
        "observation_dim of the dataset must be 3, that of the diffusion model's",
    ),
    ("train --agent iql --dataset DATA --batch-size 0", "batch_size must be at least 1, got 0"),
    ("train --agent iql --dataset DATA --real-share 1.5", "real_share must be in [0, 1], got 1.5"),
    ("train --agent iql --dataset DATA --env-id Hopper-v2", "environment 'Hopper-v2' cannot be"),
    ("train --agent iql --dataset DATA --iql.expectile 2", "expectile must be in (0, 1), got 2"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_input_is_one_sentence(
    dataset_file, model_dir, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    other = load_dataset(dataset_file)
    np.savez(
        "other.npz",
        observations=other.observations[:, :2],
        actions=other.actions / 2,
        rewards=other.rewards,
        terminals=other.terminals,
        timeouts=other.timeouts,
    )
    named = {"DATA": str(dataset_file), "MODEL": str(model_dir), "OTHER": "other.npz"}
    words = ["offline", *(named.get(word, word) for word in words.split()), "--run-dir", "run"]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert sorted(os.listdir()) == ["other.npz", "text.txt"]


def test_runs_of_other_commands_and_damaged_ones(dataset_file, model_dir, tmp_path, capsys):
    def fails(words, message):
        assert run(words) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err

    run_dir = tmp_path / "agent"
    assert run(train(dataset_file, run_dir)) == 0
    capsys.readouterr()
    guided = train(dataset_file, tmp_path / "new", "--data", "guided", "--diffusion")
    fails([*guided, run_dir], "is a run of `offline train`, wanted one of `offline diffuse`")
    fails(["evaluate", run_dir], "is a run of `offline train`, wanted one of `train`")
    fails(["offline", "evaluate", model_dir], "`offline diffuse`, wanted one of `offline train`")
    fails(["offline", "evaluate", tmp_path / "gone"], "gone is not a run directory")
    fails(["offline", "evaluate", run_dir, "--episodes", "0"], "--episodes must be an integer")
    fails(train(dataset_file, run_dir), "already holds a run; resume it or give another")
    resume = ["offline", "train", "--resume", "--run-dir", run_dir]
    fails([*resume, "--batch-size", "32"], "batch_size must be 16, as the run began, got 32")
    fails([*resume, "--data", "guided"], "data must be 'real', as the run began, got 'guided'")
    fails([*resume, "--dataset", tmp_path / "gone.npz"], "gone.npz does not exist")
    for path in (run_dir / "checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    fails(["offline", "evaluate", run_dir], "has no last checkpoint that can be used")
    fails(resume, "has no usable checkpoint to resume from")
    (run_dir / "config.json").write_text("{")
    fails(["offline", "evaluate", run_dir], "config.json cannot be read")
    stored = json.loads((model_dir / "config.json").read_text())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    del stored["dataset"]
    (damaged / "config.json").write_text(json.dumps(stored))
    fails(["offline", "diffuse", "--resume", "--run-dir", damaged], "is damaged: ['dataset'] miss")
    assert not (tmp_path / "new").exists()


def test_presets_are_the_options_defaults(dataset_file, tmp_path, capsys, monkeypatch):
    assert cli.main(["offline", "train", "--help"]) == 0
    assert "--sampler.euler-from" in capsys.readouterr().out
    assert presets.DIFFUSE_PRESETS.keys() == presets.OFFLINE_TRAIN_PRESETS.keys()
    words = ["offline", "diffuse", "--preset", "released", "--dataset", dataset_file]
    small = "--network.features 24 --total-updates 1 --no-progress --training.batch-size 2".split()
    assert run([*words, "--run-dir", tmp_path / "run", *small]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["preset"] == "released"
    assert (stored["config"]["window_length"], stored["config"]["window_stride"]) == (32, 8)


def test_demo(tmp_path, capsys, monkeypatch, tiny_diffuse, tiny_train):
    monkeypatch.setitem(presets.DIFFUSE_PRESETS, "quick", lambda: tiny_diffuse)
    monkeypatch.setitem(presets.OFFLINE_TRAIN_PRESETS, "quick", lambda: tiny_train)
    monkeypatch.setattr(demo, "TEST_EPISODES", 3)
    run_dir = tmp_path / "demo"
    words = ["offline", "demo", "--run-dir", run_dir, "--agent", "iql", "--no-progress"]
    assert run(words) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert set(result) == {"dataset", "real", "unguided", "guided", "seconds"}
    dataset = load_dataset(run_dir / "dataset.npz")
    assert result["dataset"] == pytest.approx(dataset.episode_returns().mean())
    assert dataset.num_episodes == demo.EPISODES and dataset.recipe["policy"] == "swing_up"
    assert (run_dir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for data in demo.DATA:
        assert json.loads((run_dir / data / "config.json").read_text())["data"] == data
    assert run(words) == 2
    assert "--run-dir must be a folder that is not there yet" in capsys.readouterr().err


def test_an_interrupt_ends_the_demo(tmp_path, capsys, monkeypatch, tiny_diffuse):
    monkeypatch.setitem(presets.DIFFUSE_PRESETS, "quick", lambda: tiny_diffuse)
    update = DiffusionTraining.update

    def interrupted(training):
        update(training)
        if training.num_updates == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(DiffusionTraining, "update", interrupted)
    assert run(["offline", "demo", "--run-dir", tmp_path / "demo", "--no-progress"]) == 130
    assert "polygrad-fast: interrupted" in capsys.readouterr().err
    found = {path.name for path in (tmp_path / "demo").iterdir()}
    assert found == {"dataset.npz", "diffusion"}
    saved = [path.name for path in (tmp_path / "demo" / "diffusion" / "checkpoints").iterdir()]
    assert saved == ["step_000000003"]


def test_the_demos_controller_swings_up():
    """Without noise it holds the pendulum upright: about -150 instead of -1200 at random."""
    env = make_environment("Pendulum-v1")
    good = collect_episodes(env, demo.swing_up, 4, 1).episode_returns()
    noisy = collect_episodes(env, demo.swing_up, 6, 1, demo.NOISE_STD).episode_returns()
    assert good.mean() > -250 and noisy.mean() < good.mean() - 200
