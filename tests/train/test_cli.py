"""The command line as a user runs it."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from polygrad_fast import cli
from polygrad_fast.training.run_log import read_metrics

TINY = (
    "--preset quick --horizon 4 --schedule.num-train-timesteps 3 --denoiser.hidden-dim 16 "
    "--denoiser.num-layers 1 --denoiser.batch-size 16 --denoiser.pretrain-updates 5 "
    "--policy.hidden-dim 8 --imagined-batch-size 8 --learning-starts 40 --eval-interval 60 "
    "--eval-episodes 2 --log-interval 25 --checkpoint-interval 50 --no-progress"
).split()


def train(run_dir, *more: str, total: int = 120) -> list[str]:
    return [
        *("train", "--env-id", "Pendulum-v1", "--run-dir", str(run_dir)),
        *("--total-timesteps", str(total), *TINY, *more),
    ]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "pendulum"
    assert cli.main(train(path)) == 0
    return path


def test_train_leaves_a_run_directory(run_dir, capsys):
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoints", "versions.json"} <= names
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    header = (run_dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[0] == "env_step" and "eval/mean_reward" in header
    assert json.loads((run_dir / "config.json").read_text())["config"]["horizon"] == 4


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_evaluate_prints_json_last(run_dir, capsys, checkpoint):
    arguments = ["evaluate", str(run_dir), "--episodes", "3", "--checkpoint", checkpoint]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out.splitlines()
    result = json.loads(first[-1])
    assert set(result) == {"mean_reward", "std_reward"}
    assert -2000 < result["mean_reward"] < 0 and result["std_reward"] >= 0
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == first


def test_sample_writes_trajectories(run_dir, tmp_path, capsys):
    out = tmp_path / "trajectories.npz"
    assert cli.main(["sample", str(run_dir), "--num", "7", "--out", str(out)]) == 0
    with np.load(out) as data:
        shapes = {name: data[name].shape for name in data.files}
        assert set(np.unique(data["terminals"])) <= {0.0, 1.0}
        assert all(np.isfinite(data[name]).all() for name in data.files)
    assert shapes == {
        "observations": (7, 4, 3),
        "actions": (7, 4, 1),
        "rewards": (7, 4),
        "terminals": (7, 4),
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "train, evaluate, sample"),
        ("fly", "fly"),
        ("train", "--env-id"),
        ("train --env-id Nope-v1", "Nope-v1"),
        ("train --env-id CartPole-v1", "Discrete"),
        ("train --env-id Pendulum-v1 --horizon 0", "horizon must be at least 1, got 0"),
        ("train --env-id Pendulum-v1 --preset fast", "preset 'fast'"),
        ("train --env-id Pendulum-v1 --a2c.gamma x", "--a2c.gamma"),
        ("train --env-id Pendulum-v1 --a2c.gamma 2", "gamma must be in [0, 1], got 2"),
        ("train --env-id Pendulum-v1 --wings 2", "--wings"),
        ("train --env-id Pendulum-v1 --device cuda:99", "cuda:99"),
        ("train --resume", "--run-dir"),
        ("train --resume --run-dir {tmp}/none", "none is not a run directory"),
        ("evaluate {tmp}/none", "none is not a run directory"),
        ("evaluate {tmp}", "is not a run directory"),
        ("evaluate {run} --episodes 0", "--episodes must be at least 1, got 0"),
        ("evaluate {run} --video {tmp}/none/x.mp4", "none does not exist"),
        ("evaluate {run} --video {tmp}/x.txt", "wanted .mp4 or .gif"),
        ("evaluate {run} --checkpoint first", "first"),
        ("sample {tmp}/none", "none is not a run directory"),
        ("sample {run} --num 0", "--num must be at least 1, got 0"),
        ("sample {run} --out {tmp}/none/x.npz", "none does not exist"),
        ("train --resume --run-dir {run} --total-timesteps 60", "at environment step 120 already"),
        ("train --env-id Pendulum-v1 --run-dir {run}/config.json", "cannot be written"),
        ("train --env-id HalfCheetah-v3", "HalfCheetah-v3"),
        ("{train}", "already holds a run"),
        ("train --resume --run-dir {run} --horizon 5", "--horizon 5 given"),
        ("train --resume --run-dir {run} --env-id Hopper-v5", "--env-id Hopper-v5 given"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run_dir, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in run_dir.rglob("*"))
    if arguments == "{train}":
        words = train(run_dir)
    else:
        words = arguments.format(tmp=tmp_path, run=run_dir).split()
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    assert sorted(str(path) for path in run_dir.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


def test_extending_a_run_is_remembered(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(train(run, total=50)) == 0
    more = ["train", "--resume", "--run-dir", str(run), "--no-progress"]
    assert cli.main([*more, "--total-timesteps", "80"]) == 0
    assert json.loads((run / "config.json").read_text())["config"]["total_timesteps"] == 80
    capsys.readouterr()
    assert cli.main(more) == 0
    assert "step 80 of 80" in capsys.readouterr().out


def test_interrupted_training_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "polygrad_fast.cli", *train(tmp_path / "run", total=10**6)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume --run-dir" in out
    steps = [row["env_step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert steps[-1] < 10**6


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["sample"]])
def test_help(capsys, command):
    assert cli.main([*command, "--help"]) == 0
    assert "polygrad-fast" in capsys.readouterr().out


def test_damaged_run_is_named(run_dir, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        (path / "state.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"):
        assert cli.main(["sample", str(copy), "--out", str(tmp_path / "x.npz")]) == 2
    assert "no last checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_metrics(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name, *more):
        words = train(tmp_path / name, "--checkpoint-interval", "20", *more, total=400)
        if "--resume" in more:
            words = ["train", "--resume", "--run-dir", str(tmp_path / name), "--no-progress"]
        command = [sys.executable, "-m", "polygrad_fast.cli", *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    dice = random.Random(0)
    process, kills = start("killed"), 0
    while kills < 4:
        deadline = time.monotonic() + 60
        target = tmp_path / "killed" / "checkpoints" / "best"
        while not target.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if kills:
            time.sleep(3.0)  # imports and loading, before anything new is written
        time.sleep(dice.uniform(0.0, 0.8))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        process = start("killed", "--resume")
    assert process.wait() == 0
    assert kills >= 1
    rows = {}
    for name in ("whole", "killed"):
        rows[name] = [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in read_metrics(tmp_path / name / "metrics.csv")
        ]
    assert len(rows["whole"]) > 15
    assert rows["killed"] == rows["whole"]


@pytest.mark.filterwarnings("ignore:prediction_type 'epsilon'")
@pytest.mark.parametrize(
    "kind, conditioning", [("transformer", "learned"), ("residual_mlp", "layer")]
)
def test_the_papers_denoisers_need_one_option(tmp_path, kind, conditioning):
    arguments = train(tmp_path / "run", "--denoiser.kind", kind, total=60)
    arguments[arguments.index("quick")] = "paper"
    more = "--policy-delay-steps 0 --policy-updates-per-env-step 0.1".split()
    assert cli.main(arguments + more) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["denoiser"]
    assert (stored["kind"], stored["step_conditioning"]) == (kind, conditioning)
    assert (tmp_path / "run" / "checkpoints" / "step_000000060").is_dir()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
