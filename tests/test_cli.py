"""The command line as a user runs it."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv

import polygrad_fast as pg
from polygrad_fast import cli
from polygrad_fast.data.load import load_dataset
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.checkpoint_manager import CheckpointManager
from polygrad_fast.runs.metrics import read_metrics

TINY = (
    "--preset quick --horizon 4 --schedule.num-train-timesteps 3 --denoiser.hidden-dim 16 "
    "--denoiser.kind residual_mlp --sampler.action-update score --sampler.scale-actions "
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


def test_gradient_prints_a_table_and_json_last(run_dir, capsys):
    arguments = ["gradient", str(run_dir), "--num", "32", "--newest", "20"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    *lines, last = first.splitlines()
    result = json.loads(last)
    assert {"cosine", "cosine_ceiling", "r2"} <= set(result)
    unknown = {name for name, value in result.items() if value is None}
    # Pendulum-v1's episodes are cut off too early to tell
    assert unknown == {
        f"critic/{name}"
        for name in ("value", "discounted_return", "correlation", "imagined_return")
    }
    assert np.isfinite([result[name] for name in result.keys() - unknown]).all()
    assert lines[-1].startswith("critic: not known")
    assert -1 <= result["cosine"] <= 1 and 0 <= result["cosine_ceiling"] <= 1
    assert result["num_newest"] == 20 and result["share_repeated"] == 1.0
    assert lines[0].startswith(
        "Pendulum-v1, trajectory_diffusion, last checkpoint (environment step 120), horizon 4,"
    )
    assert any(line.startswith("standardized actions: R2") for line in lines)
    assert cli.main([*arguments, "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cosine"] != result["cosine"]
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert cli.main([*arguments, "--checkpoint", kept[-1]]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert cli.main([*arguments, "--checkpoint", kept[0]]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) != result


@pytest.fixture(scope="module")
def cheetah_run(tmp_path_factory):
    """Of an autoregressive world model on a MuJoCo environment whose episodes do not terminate."""
    path = tmp_path_factory.mktemp("runs") / "cheetah"
    words = train(path, "--env-id", "HalfCheetah-v5", "--world-model", "autoregressive", total=80)
    sizes = "--autoregressive.hidden-dim 8 --eval-interval 1000 --eval-episodes 1".split()
    sizes += ["--cpu-threads", "3"]
    assert cli.main([*words, *sizes]) == 0
    return path


def test_errors_prints_a_table_and_json_last(cheetah_run, tmp_path, capsys):
    arguments = ["errors", str(cheetah_run), "--horizons", "12,3", "--num", "16"]
    out, plot = tmp_path / "errors.csv", tmp_path / "errors.png"
    assert cli.main([*arguments, "--out", str(out), "--plot", str(plot)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert list(result["mse"]) == list(result["floor"]) == ["3", "12"]
    assert 0 <= result["floor"]["12"] < 1e-9 < result["mse"]["3"] < result["mse"]["12"]
    assert result["left_out"]["12"] == 0 and result["terminal_agreement"]["12"] <= 1
    assert any("simulated by mujoco.rollout" in line for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")
    header, *rows = (line.split(",") for line in out.read_text().splitlines())
    assert header[:3] == ["step", "num", "mse"] and len(rows) == 11
    columns = {name: [float(row[i]) for row in rows] for i, name in enumerate(header)}
    assert columns["step"] == list(range(1, 12)) and set(columns["num"]) == {16.0}
    assert np.mean(columns["mse"]) == pytest.approx(result["mse"]["12"])
    assert np.mean(columns["mse"][:2]) == pytest.approx(result["mse"]["3"])
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert cli.main([*arguments, "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["mse"] != result["mse"]
    assert cli.main([*arguments, "--checkpoint", "best"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["mse"] != result["mse"]


def test_actions_prints_a_table_and_json_last(run_dir, tmp_path, capsys):
    plot = tmp_path / "actions.png"
    arguments = ["actions", str(run_dir), "--sigmas", "1.0,0.05", "--num", "64"]
    assert cli.main([*arguments, "--plot", str(plot)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [entry["sigma"] for entry in result] == [1.0, 0.05]
    for entry in result:
        assert {"sigma", "std", "ks", "ks_floor", "r2", "autocorrelation"} <= set(entry)
        assert np.isfinite(list(entry.values())).all() and 0 < entry["ks"] < 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("the sampler's action update is 'score', guid") for line in lines)
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert cli.main([*arguments, "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) != result
    assert cli.main([*arguments, "--guidance-scale", "0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) != result
    assert cli.main([*arguments, "--action-update", "exact"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line == "the sampler's action update is 'exact'" for line in lines)
    for entry in json.loads(last):
        assert entry["std"] == pytest.approx(1.0, abs=0.2)
        assert entry["ks"] < 3 * entry["ks_floor"]


@pytest.mark.parametrize("name", ["dream.mp4", "dream.gif", "strip.png"])
def test_dream_shows_imagined_above_simulated(run_dir, tmp_path, capsys, monkeypatch, name):
    imageio = pytest.importorskip("imageio.v2")

    def render(self):  # without pygame
        return np.full((500, 500, 3), 150 + 80 * np.cos(self.state[0]), dtype=np.uint8)

    monkeypatch.setattr(PendulumEnv, "render", render)
    out = tmp_path / name
    arguments = ["dream", str(run_dir), "--out", str(out), "--start", "5"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"4 frames in {out}" in lines[0] and lines[1].startswith("error after ")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "strip.png":
        assert imageio.imread(out).shape == (518, 4 * 240, 3)  # of 512 x 1104 each
        return
    frames = [frame[..., :3] for frame in imageio.mimread(out, memtest=False)]
    assert len(frames) == 4 and frames[0].shape == (1104, 512, 3)
    assert frames[0][:50].max() > 150  # the caption
    for top in (50, 600):  # both begin in the same pose
        assert frames[0][top + 9 : top + 490, 9:490].std() < 5
    poses = [[frame[top + 250, 250, 0] for top in (50, 600)] for frame in map(np.int32, frames)]
    assert abs(poses[0][0] - poses[0][1]) <= 3 and abs(poses[3][0] - poses[3][1]) > 3


def test_observations_that_do_not_fix_the_pose_are_plotted(tmp_path, capsys):
    words = train(tmp_path / "run", "--env-id", "MountainCarContinuous-v0", total=45)
    assert cli.main([*words, "--eval-interval", "1000", "--eval-episodes", "1"]) == 0
    capsys.readouterr()
    arguments = ["dream", str(tmp_path / "run"), "--out"]
    assert cli.main([*arguments, str(tmp_path / "dream.mp4")]) == 2
    err = capsys.readouterr().err
    assert "must be a .png file for MountainCarContinuous-v0, whose observations do not fix" in err
    assert cli.main([*arguments, str(tmp_path / "dream.png")]) == 0
    assert "observations plotted in" in capsys.readouterr().out
    assert (tmp_path / "dream.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "dream.mp4").exists()


def test_where_nothing_can_be_rendered_a_dream_says_so(cheetah_run, tmp_path):
    """With a renderer that cannot be, or with one that is missing."""
    for backend in ("", "osmesa", "egl"):
        out = tmp_path / "dream.gif"
        result = subprocess.run(
            [sys.executable, "-m", "polygrad_fast", "dream", str(cheetah_run), "--out", str(out)],
            capture_output=True,
            text=True,
            env={**ONE_THREAD, "MUJOCO_GL": backend},
        )
        assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
        if result.returncode == 0:
            assert backend and out.exists()
        else:
            sentence = [line for line in result.stderr.splitlines() if line][-1]
            assert result.returncode == 2 and "MUJOCO_GL" in sentence
            assert sentence.startswith("polygrad-fast: ")
            assert not out.exists()


@pytest.mark.parametrize(
    "command, function",
    [
        ("errors", "dynamics.dynamics_report"),
        ("actions", "actions.action_report"),
        ("gradient", "gradient.policy_gradient_report"),
    ],
)
def test_diagnostics_take_the_runs_own_threads(cheetah_run, monkeypatch, command, function):
    before, seen = torch.get_num_threads(), []

    def report(*arguments, **options):
        seen.append((torch.get_num_threads(), *arguments[-1:]))
        raise pg.InputError("that is all")

    monkeypatch.setattr(f"polygrad_fast.diagnostics.{function}", report)
    assert cli.main([command, str(cheetah_run)]) == 2
    assert seen[0][0] == 3 != before == torch.get_num_threads()
    if command == "errors":
        assert seen[0][1] == 3  # of the simulator


def test_what_a_run_has_no_use_for_is_refused(cheetah_run, capsys):
    for flag, value in (("--action-update", "exact"), ("--guidance-scale", "1")):
        assert cli.main(["actions", str(cheetah_run), flag, value]) == 2
        err = capsys.readouterr().err
        assert f"{flag} must be left out for a run whose world model is 'autoregressive'" in err
        assert err.count("\n") == 1


def test_the_best_checkpoint_has_no_guidance_scale(tmp_path, capsys):
    sizes = "--denoiser.kind residual_mlp --eval-interval 1000 --eval-episodes 1".split()
    words = train(tmp_path / "run", "--env-id", "InvertedPendulum-v5", *sizes, total=45)
    assert cli.main(words) == 0
    capsys.readouterr()
    arguments = ["errors", str(tmp_path / "run"), "--num", "8", "--checkpoint"]
    assert cli.main([*arguments, "last"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["mse"]) == ["4"]
    with pytest.warns(UserWarning, match="does not hold the guidance scale of the run: imagining"):
        assert cli.main([*arguments, "best"]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "train, evaluate, sample"),
        (
            "fly",
            "command must be one of ['train', 'evaluate', 'sample', 'errors', 'actions', "
            "'gradient', 'dream', 'baseline', 'data collect', 'offline diffuse', "
            "'offline ensemble', 'offline train', 'offline evaluate', 'offline demo', "
            "'reproduce'], got 'fly'",
        ),
        ("baseline --env-id Nope-v1 --run-dir none", "Nope-v1"),
        ("baseline --env-id Pendulum-v1 --algo dqn", "dqn"),
        ("baseline --env-id Pendulum-v1 --total-timesteps 0 --run-dir none", "total_timesteps"),
        ("baseline --env-id CartPole-v1 --run-dir none", "Box"),
        ("trian --env-id Pendulum-v1", "did you mean train?"),
        ("train", "--env-id"),
        ("train --env-id Nope-v1", "Nope-v1"),
        ("train --env-id CartPole-v1", "Discrete"),
        ("train --env-id Pendulum-v1 --horizon 0", "horizon must be at least 1, got 0"),
        (
            "train --env-id Pendulum-v1 --preset fast",
            "preset must be one of ['default', 'laptop', 'paper', 'quick'], got 'fast'",
        ),
        ("train --env-id Pendulum-v1 --a2c.gamma x", "--a2c.gamma"),
        ("train --env-id Pendulum-v1 --a2c.gamma 2", "gamma must be in [0, 1], got 2"),
        (
            "train --env-id Pendulum-v1 --world-model ensemble --a2c.gradient-estimator pathwise",
            "a2c.gradient_estimator must be 'score' for a world model without one network for",
        ),
        ("train --env-id Pendulum-v1 --wings 2", "--wings"),
        ("train --env-id Pendulum-v1 --a2c.gama 2", "--a2c.gama, 2, did you mean --a2c.gamma?"),
        ("train --env-id Pendulum-v1 --learning-starts 9", "at least the horizon, 10"),
        ("train --env-id Pendulum-v1 --seed -1", "seed must be an integer in [0, 4294967296)"),
        ("train --env-id Pendulum-v1 --env-id Nope-v1", "Nope-v1"),
        ("train --env-id Pendulum-v1 --device cuda:99", "cuda:99"),
        ("train --resume", "--run-dir"),
        ("train --run-dir= --resume", "--resume needs --run-dir"),
        ("train --resume --run-dir {tmp}/none", "none is not a run directory"),
        ("evaluate {tmp}/none", "none is not a run directory"),
        ("evaluate {tmp}", "is not a run directory"),
        ("evaluate {run} --episodes 0", "--episodes must be at least 1, got 0"),
        ("evaluate {run} --seed -1", "--seed must be at least 0, got -1"),
        ("evaluate {run}/config.json", "config.json is not a run directory"),
        (
            "evaluate {run} --video {tmp}/none/x.mp4",
            "--video must be in an existing directory, got",
        ),
        ("evaluate {run} --video {tmp}/x.txt", "must be a .mp4 or .gif file, got"),
        ("evaluate {run} --checkpoint first", "first"),
        ("sample {tmp}/none", "none is not a run directory"),
        ("sample {run} --num 0", "--num must be at least 1, got 0"),
        ("sample {run} --out {tmp}/none/x.npz", "--out must be in an existing directory, got"),
        (
            "train --resume --run-dir {run} --total-timesteps 60",
            "must be at least 120, the environment step the run is at, got 60",
        ),
        ("errors {tmp}/none", "none is not a run directory"),
        ("errors {run}", "must be one of gymnasium's MuJoCo environments, whose state can be set"),
        ("errors {run} --horizons ten", "--horizons must be a list of integers, e.g. 10,50, got"),
        ("errors {run} --horizons 10,", "--horizons must be a list of integers, e.g. 10,50, got"),
        ("errors {run} --horizons 1.5", "--horizons must be a list of integers, e.g. 10,50, got"),
        ("errors {run} --horizons 1", "horizon must be an integer of at least 2, got 1"),
        ("errors {run} --horizons 4,50", "horizon must be at most 4, the whole trajectory that"),
        ("errors {run} --num 0", "--num must be an integer of at least 1, got 0"),
        ("errors {run} --seed -1", "--seed must be an integer in [0, 4294967296), got -1"),
        ("errors {run} --checkpoint first", "first does not exist, wanted a run or checkpoint"),
        ("errors {run} --out {tmp}/none/x.csv", "--out must be in an existing directory, got"),
        ("errors {run} --plot {tmp}/none/x.png", "--plot must be in an existing directory, got"),
        ("errors {run} --plot {tmp}/x.pdf", "--plot must be a .png file, got {tmp}/x.pdf"),
        ("actions {tmp}/none", "none is not a run directory"),
        ("actions {run} --sigmas 1,x", "--sigmas must be a list of numbers, e.g. 1.0,0.3, got"),
        ("actions {run} --sigmas 1,0", "--sigmas must be positive finite numbers, got 0.0"),
        ("actions {run} --sigmas nan", "--sigmas must be positive finite numbers, got nan"),
        ("actions {run} --num 3", "--num must be an integer of at least 4, got 3"),
        ("actions {run} --seed -1", "--seed must be an integer in [0, 4294967296), got -1"),
        ("actions {run} --action-update fast", "fast"),
        (
            "actions {run} --action-update exact --guidance-scale 1",
            "--guidance-scale must be left out with action update 'exact', got 1",
        ),
        ("actions {run} --guidance-scale -1", "--guidance-scale must be a finite number of at"),
        ("actions {run} --plot {tmp}/x.txt", "--plot must be a .png file, got {tmp}/x.txt"),
        ("actions {run} --checkpoint best", "got none; the best checkpoint has no replay buffer"),
        ("actions {run} --checkpoint first", "first does not exist, wanted a run or checkpoint"),
        ("dream {tmp}/none", "none is not a run directory"),
        ("dream {run} --out {tmp}/none/x.mp4", "--out must be in an existing directory, got"),
        ("dream {run} --out {tmp}/x.txt", "--out must be a .mp4, .gif or .png file, got {tmp}/x"),
        ("dream {run} --horizon 1", "--horizon must be an integer of at least 2, got 1"),
        ("dream {run} --horizon 5", "horizon must be at most 4, the whole trajectory that"),
        ("dream {run} --start -1", "--start must be an integer of at least 0, got -1"),
        ("dream {run} --fps 0", "--fps must be in (0, 1000], got 0"),
        ("dream {run} --seed -1", "--seed must be an integer in [0, 4294967296), got -1"),
        ("dream {run} --checkpoint first", "first does not exist, wanted a run or checkpoint"),
        ("gradient {tmp}/none", "none is not a run directory"),
        ("gradient {run} --num 7", "--num must be an integer of at least 8, got 7"),
        ("gradient {run} --newest 0", "--newest must be an integer of at least 1, got 0"),
        ("gradient {run} --seed -1", "--seed must be an integer in [0, 4294967296), got -1"),
        ("gradient {run} --checkpoint first", "first does not exist, wanted a run or checkpoint"),
        ("gradient {run} --checkpoint best", "got none; the best checkpoint has no replay buffer"),
        ("gradient {run} --device cuda:99", "cuda:99"),
        ("train --env-id Pendulum-v1 --run-dir {run}/config.json", "cannot be written"),
        ("train --env-id HalfCheetah-v3", "HalfCheetah-v3"),
        ("{train}", "already holds a run"),
        (
            "train --resume --run-dir {run} --a2c.gamma 0.5",
            "a2c.gamma must be 0.99, as the run began, got 0.5: resume {run} without --a2c.gamma,",
        ),
        (
            "train --resume --run-dir {run} --horizon 5 --policy.hidden-dim 9",
            "horizon must be 4, as the run began, got 5: resume",
        ),
        (
            "train --resume --run-dir {run} --env-id Hopper-v5",
            "env_id must be 'Pendulum-v1', as the run began, got 'Hopper-v5': resume",
        ),
        ("train --resume --run-dir {run} --seed 5", "seed must be 0, as the run began, got 5"),
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
    message = message.format(tmp=tmp_path, run=run_dir)
    assert captured.err.count("\n") == 1 and message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    assert sorted(str(path) for path in run_dir.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ("--a2c.gama 2", "Unrecognized options: --a2c.gama, 2, did you mean --a2c.gamma?"),
        ("--wings 2", "Unrecognized options: --wings, 2"),
        ("--a2c.gamma x", "Error parsing --a2c.gamma: could not convert string to float: 'x'"),
    ],
)
def test_complaints_of_the_parser(monkeypatch, capsys, encoding, arguments, wanted):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert cli.main(["train", "--env-id", "Pendulum-v1", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"polygrad-fast: {wanted}\n"


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
    command = [sys.executable, "-m", "polygrad_fast", *train(tmp_path / "run", total=10**6)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume --run-dir" in out
    assert "stopping after the current update, press Ctrl-C again to stop at once" in err
    steps = [row["env_step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert steps[-1] < 10**6


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("module", ["tyro", "gymnasium", "torch"])
def test_an_interrupt_during_imports_is_a_sentence(tmp_path, module):
    """A module of that name, found first, stands for one whose import takes long."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "polygrad_fast", "train", "--env-id", "Pendulum-v1"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ONE_THREAD, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
    )
    assert (result.returncode, result.stderr) == (130, "polygrad-fast: interrupted\n")


@pytest.mark.parametrize("then", ["raise ImportError('a module failed')", "os.abort()", "pass"])
@pytest.mark.parametrize("module", ["torch", "failing"])
def test_an_interrupt_before_training_cannot_get_lost(tmp_path, module, then):
    """A module stands for libraries in C++ that make another error of it, abort or swallow it."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        f"except BaseException:\n    {then}\n" + textwrap.dedent(FAILING)
    )
    words = train(tmp_path / "run", "--env-id", "failing:Failing-v0")
    result = cli_in_process(*words, path=tmp_path)
    assert (result.returncode, result.stderr) == (130, "polygrad-fast: interrupted\n")


def test_an_interrupt_at_exit_leaves_no_traceback(tmp_path):
    code = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    code += textwrap.dedent(FAILING).replace("ERROR", "KeyboardInterrupt")
    (tmp_path / "failing.py").write_text(code)
    words = train(tmp_path / "run", "--env-id", "failing:Failing-v0")
    result = cli_in_process(*words, path=tmp_path)
    assert result.returncode == -signal.SIGINT and result.stderr.count("\n") == 1
    assert result.stderr.startswith("polygrad-fast: interrupted; training stopped at environment")


def test_ignored_interrupts_stay_ignored(tmp_path):
    """As in what a script starts in the background."""
    command = [sys.executable, "-m", "polygrad_fast", *train(tmp_path / "run", total=200)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert (tmp_path / "run" / "checkpoints" / "step_000000200").is_dir()


@pytest.mark.parametrize(
    "error, code, err",
    [
        (
            "TimeoutError('no answer')",
            1,
            "polygrad-fast: no answer; training stopped at environment step 59; the last good "
            "checkpoint is {run}/checkpoints/step_000000059\n",
        ),
        (
            "FileNotFoundError(2, 'No such file', 'scene.xml')",
            1,
            "polygrad-fast: training stopped at environment step 59: scene.xml: No such file; the "
            "last good checkpoint is {run}/checkpoints/step_000000059\n",
        ),
        ("SystemExit('no licence')", 1, "no licence\n"),
        ("SystemExit(7)", 7, ""),
    ],
)
def test_errors_of_the_system_in_an_environment(tmp_path, error, code, err):
    (tmp_path / "failing.py").write_text(textwrap.dedent(FAILING).replace("ERROR", error))
    run = tmp_path / "run"
    result = cli_in_process(*train(run, "--env-id", "failing:Failing-v0"), path=tmp_path)
    assert (result.returncode, result.stderr) == (code, err.format(run=run))
    assert (run / "checkpoints" / "step_000000059").is_dir()


FAILING = """
    import gymnasium
    gymnasium.register("Failing-v0", "failing:make", max_episode_steps=30)
    class Failing(gymnasium.Wrapper):
        trained = None  # the environment that is trained on is the first one made
        steps = 0
        def step(self, action):
            self.steps += 1
            if self is Failing.trained and self.steps == 60:
                raise ERROR
            return super().step(action)
    def make(**options):
        made = Failing(gymnasium.make("Pendulum-v1", **options).unwrapped)
        Failing.trained = Failing.trained or made
        return made
"""


ROOT = Path(cli.__file__).parents[1]


def test_help_and_version_import_nothing_heavy():
    script = """
        import sys
        from polygrad_fast.__main__ import main
        for arguments in (["--version"], ["--help"], ["train", "--help"]):
            sys.argv[1:] = arguments
            assert main() == 0
        heavy = {"torch", "gymnasium", "numpy", "matplotlib"} & {*sys.modules}
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_imported_on_use():
    assert {name for name in pg.__all__ if getattr(pg, name) is None} == set()
    assert set(pg.__all__) <= set(dir(pg))
    with pytest.raises(AttributeError, match="has no attribute 'PolyGRaD'"):
        _ = pg.PolyGRaD


RACING = """
    import os, pathlib, time
    import gymnasium
    gymnasium.register("Racing-v0", "racing:make", max_episode_steps=200)
    HERE = pathlib.Path(__file__).parent
    def make(**options):
        # Every process waits here for the other, before it makes its run directory; one of them
        # also for the other's, where the test says so.
        (HERE / f"ready-{os.getpid()}").touch()
        while len(list(HERE.glob("ready-*"))) < 2:
            time.sleep(0.001)
        while not os.path.exists(os.environ.get("WAIT_FOR", HERE)):
            time.sleep(0.001)
        return gymnasium.make("Pendulum-v1", **options).unwrapped
"""


@pytest.mark.parametrize("order", ["at once", "one after the other"])
def test_of_two_runs_begun_at_once_in_one_directory_one_goes_on(tmp_path, order):
    (tmp_path / "racing.py").write_text(textwrap.dedent(RACING))
    run = tmp_path / "run"

    def start(seed):
        words = train(run, "--env-id", "racing:Racing-v0", "--seed", str(seed), total=60)
        waits = {"WAIT_FOR": str(run / "config.json")} if (seed, order[:3]) == (2, "one") else {}
        return subprocess.Popen(
            [sys.executable, "-m", "polygrad_fast", *words],
            env={**ONE_THREAD, **waits, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    processes = {seed: start(seed) for seed in (1, 2)}
    errors = {seed: process.communicate(timeout=120)[1] for seed, process in processes.items()}
    codes = {seed: process.returncode for seed, process in processes.items()}
    assert sorted(codes.values()) == [0, 2], errors
    (winner,) = [seed for seed, code in codes.items() if code == 0]
    assert json.loads((run / "config.json").read_text())["seed"] == winner
    (refused,) = [errors[seed] for seed in codes if seed != winner]
    assert "already holds a run" in refused or "another process is training" in refused
    assert refused.count("\n") == 1
    assert cli_in_process("train", "--resume", "--run-dir", run, path=tmp_path).returncode == 0


def cli_in_process(*words, path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "polygrad_fast", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**ONE_THREAD, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
    )


def test_extending_a_run_that_is_in_use_changes_nothing(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "polygrad_fast", *train(run, total=10**6)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    try:
        deadline = time.monotonic() + 60
        while not list(run.glob("checkpoints/step_*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        before = (run / "config.json").read_bytes()
        again = ("train", "--resume", "--run-dir", run, "--total-timesteps", 2 * 10**6)
        result = cli_in_process(*again, path=tmp_path)
        assert result.returncode == 2 and "another process is training" in result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
        assert (run / "config.json").read_bytes() == before
    finally:
        process.kill()
        process.wait()


def test_a_run_whose_checkpoints_are_gone_is_not_resumed(run_dir, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["train", "--resume", "--run-dir", str(run)]) == 2
    err = capsys.readouterr().err
    assert "no usable checkpoint" in err and "another run directory" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert cli.main(["evaluate", str(run), "--episodes", "1"]) == 0


def edit_returns(run: Path, returns: dict[int, float]) -> None:
    """Write other evaluations into a run's metrics."""
    path = run / "metrics.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    column = lines[0].index("eval/mean_reward")
    for line in lines[1:]:
        if line[column]:
            line[column] = repr(returns[int(line[0])])
    path.write_text("".join(",".join(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "returns, verdict",
    [
        ({0: -100.0, 60: -50.0, 120: -50.0}, "learnt Pendulum-v1 in imagination: mean return"),
        ({0: -53.0, 60: -20.0, 120: -138.0}, "the last policy is no better than the untrained one"),
        ({0: -53.0, 60: -54.0, 120: -138.0}, "no improvement over the untrained policy"),
    ],
)
def test_the_summary_says_what_is_kept_and_whether_it_learnt(
    run_dir, tmp_path, capsys, returns, verdict
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    edit_returns(run, returns)
    weights, _, metadata = load_checkpoint(run / "checkpoints" / "best")
    kept = max(returns, key=lambda step: (returns[step], step))
    CheckpointManager(run).save_best(weights, metadata | {"num_timesteps": kept})
    assert cli.main(["train", "--resume", "--run-dir", str(run), "--no-progress"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert verdict in last
    assert (
        f"{returns[0]:.0f} untrained, {returns[kept]:.0f} at best (environment step {kept}" in last
    )
    assert ("learnt" in last) == (returns[120] > returns[0])
    assert cli.main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert f"best checkpoint (environment step {kept})" in capsys.readouterr().out


def test_a_run_without_an_evaluation_since_its_first_update_claims_nothing(
    run_dir, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(rows[:2]))  # as before the first row of training
    assert cli.main(["train", "--resume", "--run-dir", str(run), "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "no evaluation to compare with that of the untrained policy: mean return" in out
    assert "learnt" not in out and "no policy update" not in out


def test_of_equal_evaluations_train_and_evaluate_name_the_same(tmp_path, capsys, monkeypatch):
    words = ["--learning-starts", "10", "--eval-interval", "20", "--env-id", "flat:Flat-v0"]
    (tmp_path / "flat.py").write_text(textwrap.dedent(FLAT))
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(train(tmp_path / "run", *words, total=60)) == 0
    out = capsys.readouterr().out
    assert "7 at best (environment step 60, kept as best checkpoint)" in out
    assert "no improvement over the untrained policy" in out
    assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
    assert "best checkpoint (environment step 60)" in capsys.readouterr().out


FLAT = """
    import gymnasium
    gymnasium.register("Flat-v0", "flat:make", max_episode_steps=7)
    class Flat(gymnasium.RewardWrapper):
        def reward(self, reward):
            return 1.0
    def make(**options):
        return Flat(gymnasium.make("Pendulum-v1", **options).unwrapped)
"""


def test_no_estimate_comes_from_the_prefill(tmp_path, capfd):
    words = [word for word in train(tmp_path / "run", total=30) if word != "--no-progress"]
    assert cli.main(words) == 0
    captured = capfd.readouterr()
    assert "hours per" not in captured.out and "no policy update yet after 30 steps" in captured.out
    assert "30/30" in captured.err and "left" not in captured.err and "<" not in captured.err
    words = [word for word in train(tmp_path / "more", total=120) if word != "--no-progress"]
    assert cli.main(words) == 0
    captured = capfd.readouterr()
    assert "hours per 1 M steps" in captured.out
    assert " left" in captured.err


def test_a_finished_run_with_empty_metrics(run_dir, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    (run / "metrics.csv").write_text("")
    assert cli.main(["train", "--resume", "--run-dir", str(run), "--no-progress"]) == 0
    assert "no evaluation in metrics.csv after 120 steps" in capsys.readouterr().out


def test_the_last_of_repeated_options_counts(tmp_path, capsys):
    command = "train --env-id Pendulum-v1 --env-id InvertedPendulum-v5 --preset default".split()
    parsed = cli._parse([*command, "--preset", "quick"])
    assert parsed.env_id == "InvertedPendulum-v5"
    assert parsed.config == pg.TrainConfig.from_preset("quick")


def test_warnings_are_lines(run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    (sorted((run / "checkpoints").glob("step_*"))[-1] / "state.pt").write_bytes(b"half")
    result = cli_in_process("sample", run, "--out", tmp_path / "x.npz", path=tmp_path)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("polygrad-fast: warning: skipped a damaged checkpoint: ")


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["sample"]])
def test_help(capsys, command):
    assert cli.main([*command, "--help"]) == 0
    assert "polygrad-fast" in capsys.readouterr().out


def test_damaged_run_is_named(run_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        (path / "state.pt").write_bytes(b"half")
    assert cli.main(["sample", str(copy), "--out", str(tmp_path / "x.npz")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no last checkpoint that can be used: " in err and "bytes, got 4" in err
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_metrics(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name, *more):
        words = train(tmp_path / name, "--checkpoint-interval", "20", *more, total=400)
        if "--resume" in more:
            words = ["train", "--resume", "--run-dir", str(tmp_path / name), "--no-progress"]
        command = [sys.executable, "-m", "polygrad_fast", *words]
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


def test_speeds_are_those_of_the_training_whatever_learns():
    rows = [{"time/env_steps_per_s": 1000.0}] * 3
    rows += [{"time/env_steps_per_s": 2.0, "time/sample_ms": 5.0, "td3/loss": 1.0}]
    assert cli._speeds(rows) == [
        "2 environment steps/s",
        "5 ms per sample (one batch)",
        "138.9 hours per 1 M steps",
    ]


def test_data_collect_writes_what_a_policy_did(run_dir, tmp_path, capsys):
    def collect(*more: str) -> dict:
        words = ("data", "collect", "--env-id", "Pendulum-v1", "--episodes", "2", "--no-progress")
        assert cli.main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    summary = collect("--out", str(tmp_path / "random"))
    dataset = load_dataset(tmp_path / "random")
    assert summary.keys() == {"episodes", "steps", "mean_return", "std_return"}
    assert summary["steps"] == len(dataset) == 400 and dataset.num_episodes == 2
    assert summary["mean_return"] == pytest.approx(dataset.episode_returns().mean(), rel=1e-5)
    assert dataset.recipe["policy"] == "random" and dataset.env_id == "Pendulum-v1"
    assert 1.9 < dataset.actions.max() <= 2

    def actions(name: str, *more: str) -> np.ndarray:
        collect("--policy", str(run_dir), "--out", str(tmp_path / name), *more)
        return load_dataset(tmp_path / name).actions

    drawn = actions("drawn.npz")
    assert np.array_equal(drawn, actions("again.npz"))
    mean = actions("mean.npz", "--deterministic")
    observations = load_dataset(tmp_path / "mean.npz").observations
    agent = pg.PolyGRAD.load(run_dir, checkpoint="best")
    assert np.allclose(mean, agent.predict(observations, deterministic=True)[0], atol=1e-5)
    assert not np.array_equal(drawn, mean)
    noisy = actions("noisy.npz", "--deterministic", "--noise-std", "0", "0.5")
    assert np.array_equal(noisy[:200], mean[:200]) and not np.allclose(noisy[200:], mean[200:])
    recipe = load_dataset(tmp_path / "noisy.npz").recipe
    told = {"policy": str(run_dir), "checkpoint": "best", "deterministic": True, "preset": "quick"}
    assert recipe.items() >= (told | {"noise_std": [0.0, 0.5], "trained_in": "Pendulum-v1"}).items()
    last = actions("last.npz", "--deterministic", "--checkpoint", "last")
    observations = load_dataset(tmp_path / "last.npz").observations
    agent = pg.PolyGRAD.load(run_dir, checkpoint="last")
    assert np.allclose(last, agent.predict(observations, deterministic=True)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "gone"], "--policy must be 'random', a run directory or a file, got 'gone'"),
        (["--policy", "folder"], "folder is not a run directory: it has no config.json"),
        (["--policy", "file"], "file is not a model of Stable-Baselines3"),
        (["--policy", "RUN", "--env-id", "MountainCarContinuous-v0"], "dimensions (2, 1) as Mount"),
        (["--deterministic"], "--deterministic needs a policy with a mean, got --policy random"),
        (["--out", "folder"], "--out must be a folder that is not there yet, got the folder"),
        (["--out", "gone/d"], "--out must be in an existing folder"),
        (["--episodes", "0"], "--episodes must be an integer of at least 1, got 0"),
        (["--seed", "-1"], "--seed must be an integer in [0, 4294967296), got -1"),
        (["--noise-std", "-1"], "noise_std must be numbers of at least 0, got -1"),
        (["--env-id", "Nope-v1"], "environment id must be one that gymnasium knows, got 'Nope-v1'"),
        (["--env-id", "CartPole-v1"], "action space must be a Box"),
    ],
)
def test_data_collect_names_bad_input(run_dir, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("hello")
    arguments = [str(run_dir) if word == "RUN" else word for word in arguments]
    words = ["data", "collect", "--env-id", "Pendulum-v1", "--episodes", "1", "--out", "d"]
    assert cli.main([*words, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert sorted(os.listdir()) == ["file", "folder"]


def test_groups_of_commands(capsys):
    assert cli.main(["data", "--help"]) == 0
    assert "data collect" in capsys.readouterr().out
    assert cli.main(["data"]) == cli.main(["data", "colect"]) == 2
    assert capsys.readouterr().err.count("'reproduce'], got 'data'") == 2
    assert cli.main(["offline", "--help"]) == 0
    assert "offline diffuse" in capsys.readouterr().out
