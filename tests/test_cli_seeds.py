"""`train --seeds`: independent runs side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from polygrad_fast import cli
from polygrad_fast.cli_seeds import parse_seeds, run_of, without_flags
from polygrad_fast.errors import InputError
from polygrad_fast.runs.metrics import read_metrics

TINY = (
    "--env-id Pendulum-v1 --preset quick --horizon 4 --schedule.num-train-timesteps 6 "
    "--denoiser.hidden-dim 16 --denoiser.num-layers 1 --denoiser.batch-size 16 "
    "--denoiser.pretrain-updates 5 --policy.hidden-dim 8 --imagined-batch-size 8 "
    "--learning-starts 40 --eval-interval 60 --eval-episodes 1 --log-interval 25 "
    "--checkpoint-interval 50 --no-progress"
).split()


def train(run_dir, *more: str, total: int = 60) -> list[str]:
    return ["train", "--run-dir", str(run_dir), "--total-timesteps", str(total), *TINY, *more]


def columns_of(run_dir, seed: int) -> list[dict[str, float]]:
    """A run's metrics but for its times."""
    rows = read_metrics(run_of(run_dir, seed) / "metrics.csv")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-4", [0, 1, 2, 3, 4]), ("3", [3]), ("0,3,7-9", [0, 3, 7, 8, 9]), ("5-5, 1", [5, 1])],
)
def test_lists_of_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4-0", "--seeds must go up, as 0-4, got '4-0'"),
        ("0,1,0", "--seeds must hold each seed once, got 0 twice in '0,1,0'"),
        ("0-3,2", "got 2 twice"),
        ("a", "--seeds must be a list such as 0-4 or 0,3,7, got 'a'"),
        ("1-", "must be a list"),
        ("-1", "must be a list"),
        ("", "must be a list"),
        ("4294967296", "must be below 2.32, got 4294967296"),
    ],
)
def test_wrong_lists_of_seeds(text, message):
    with pytest.raises(InputError, match=message):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("words", "names", "kept"),
    [
        ("--seeds 0-4 --a2c.gamma 0.9", ("seeds",), "--a2c.gamma 0.9"),
        ("--run_dir=x --env-id y", ("run-dir",), "--env-id y"),
        ("--resume --no-progress --seed 1", ("resume", "progress"), "--seed 1"),
        ("--no-progress --jobs=2 --seed 1", ("jobs",), "--no-progress --seed 1"),
        ("--seed 1", ("seeds",), "--seed 1"),
    ],
)
def test_flags_are_left_out_with_their_values(words, names, kept):
    assert without_flags(words.split(), names) == kept.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 4-0", "--seeds must go up, as 0-4, got '4-0'"),
        ("--seeds 0,0", "each seed once, got 0 twice"),
        ("--seeds 0-1 --jobs 0", "--jobs must be an integer of at least 1, got 0"),
        ("--jobs 2", "--jobs needs --seeds, got --jobs 2 for one run"),
        ("--seeds 0-1 --seed 3", "--seed must be left out with --seeds, got 3"),
        ("--seeds 0-1 --env-id Nothing-v0", "environment id must be one that gymnasium knows"),
        ("--seeds 0-1 --horizon 1", "horizon must be at least 2"),
        ("--seeds 0-1 --device nothing", "device 'nothing' cannot be used"),
        ("--seeds 0-1 --replay-capacity 1000000000000", "replay_capacity"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    assert cli.main([*train(tmp_path / "runs"), *words.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_torchrun_is_for_one_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(train(tmp_path / "runs", "--seeds", "0-1")) == 2
    err = capsys.readouterr().err
    assert "must be run without torchrun, got 2 processes" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_runs_side_by_side_one_fails_and_all_others_are_continued(tmp_path, capsys):
    """Every run is the one that its seed alone would have been."""
    runs = tmp_path / "runs"
    (run_of(runs, 1)).mkdir(parents=True)
    (run_of(runs, 1) / "metrics.csv").write_text("")  # what is left of another run
    assert cli.main(train(runs, "--seeds", "0-2", "--jobs", "2")) == 1
    out, err = capsys.readouterr()
    assert "3 runs in" in out and "2 at a time" in out
    assert "1 of 3 runs failed: seed 1 with exit code 2 (polygrad-fast: " in err
    assert "already holds a run" in err and err.count("polygrad-fast: 1 of 3") == 1
    assert (runs / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "over 2 seeds" in out
    assert json.loads((runs / "seeds.json").read_text())["seeds"] == "0-2"
    assert cli.main(train(tmp_path / "alone", "--seed", "2")) == 0
    alone = read_metrics(tmp_path / "alone" / "metrics.csv")
    alone = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in alone]
    assert columns_of(runs, 2) == alone

    (run_of(runs, 1) / "metrics.csv").unlink()
    again = ["train", "--resume", "--run-dir", str(runs), "--no-progress"]
    assert cli.main([*again, "--seeds", "0-3"]) == 2  # other seeds
    assert "--seeds must be 0-2, as the runs in" in capsys.readouterr().err
    assert cli.main(again) == 0
    out = capsys.readouterr().out
    assert "3 runs in" in out and "2 have finished, 1 at a time" in out and "over 3 seeds" in out
    assert read_metrics(run_of(runs, 1) / "metrics.csv")[-1]["env_step"] == 60
    assert cli.main(train(runs, "--seeds", "0-2")) == 2
    assert "already holds runs; resume them" in capsys.readouterr().err


def test_an_interrupt_stops_all_and_resuming_finishes_them(tmp_path):
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "polygrad_fast"]
    words = train(runs, "--seeds", "3,5", "--jobs", "2", total=10**6)
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    saved = [run_of(runs, seed) / "checkpoints" for seed in (3, 5)]
    while not all(path.exists() for path in saved) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"stopped; `polygrad-fast train --resume --run-dir {runs}` continues" in out
    steps = {seed: read_metrics(run_of(runs, seed) / "metrics.csv")[-1] for seed in (3, 5)}
    total = int(max(row["env_step"] for row in steps.values())) + 60
    for seed in (3, 5):  # nothing runs any more: the directories can be trained in
        assert (runs / f"seed_{seed}.log").read_text().count("continues") == 1
    again = ["train", "--resume", "--run-dir", str(runs), "--no-progress", "--jobs", "2"]
    assert cli.main([*again, "--total-timesteps", str(total)]) == 0
    for seed in (3, 5):
        assert read_metrics(run_of(runs, seed) / "metrics.csv")[-1]["env_step"] == total
