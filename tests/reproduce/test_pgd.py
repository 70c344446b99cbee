"""The experiments of policy-guided diffusion, with tiny sizes."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from polygrad_fast import cli
from polygrad_fast.config import PGDScale
from polygrad_fast.errors import CheckpointError, InputError
from polygrad_fast.offline.agents import AgentTraining
from polygrad_fast.reproduce import pgd_error, pgd_likelihood, pgd_returns
from polygrad_fast.reproduce.pgd import action_log_likelihood
from polygrad_fast.reproduce.pgd_returns import paper_score

ENV = "InvertedPendulum-v5"


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_returns_are_those_of_every_agent_and_are_not_made_again(stages, tiny, told):
    tiny = dataclasses.replace(tiny, recipes=("medium",))
    rows = pgd_returns(stages, tiny, (0, 1))
    keys = {(row["agent"], row["data"]) for row in rows}
    assert len(rows) == len(keys) == 2 * 4
    for row in rows:
        assert row["seeds"] == 2 and row["low"] <= row["iqm"] <= row["high"]
        assert row["lowest"] <= row["iqm"] <= row["highest"] and row["iqm"] >= 1
    written = table(stages.folder / "pgd-returns.csv")
    assert [float(row["iqm"]) for row in written] == [row["iqm"] for row in rows]
    assert (stages.folder / "pgd-returns.png").read_bytes().startswith(b"\x89PNG")
    run = stages.folder / "agents" / f"{ENV}-medium" / "iql-guided-1"
    stored = json.loads((run / "config.json").read_text())
    assert stored["seed"] == 1 and stored["data"] == "guided"
    assert stored["model"].endswith(f"models/{ENV}-medium/diffusion-1")
    assert stored["config"]["total_updates"] == 8 == stored["config"]["eval_interval"]
    count = len(told)
    assert pgd_returns(stages, tiny, (0, 1)) == rows and len(told) == count
    with pytest.raises(CheckpointError, match="is of other options, .* give another --out"):
        pgd_returns(stages, dataclasses.replace(tiny, test_episodes=3), (0, 1))


def test_an_interrupted_experiment_continues_where_it_stopped(stages, tiny, told, monkeypatch):
    scale = dataclasses.replace(tiny, recipes=("medium",), agents=("iql",), data=("guided",))
    update = AgentTraining.update

    class Killed(Exception):
        pass

    def dying(training):
        update(training)
        if training.num_updates == 6:
            raise Killed

    monkeypatch.setattr(AgentTraining, "update", dying)
    with pytest.raises(Killed):
        pgd_returns(stages, scale, (0,))
    done = list(told)
    assert [line.split(":")[0] for line in done] == [
        f"dataset {ENV}-medium", f"models/{ENV}-medium/diffusion-0"
    ]  # fmt: skip
    monkeypatch.setattr(AgentTraining, "update", update)
    rows = pgd_returns(stages, scale, (0,))
    assert [line.split(":")[0] for line in told[len(done) :]] == [
        f"agents/{ENV}-medium/iql-guided-0", f"{ENV}, medium, iql on guided data, seed 0"
    ]  # fmt: skip
    whole = type(stages)(stages.folder.parent / "whole", lambda line: None)
    assert pgd_returns(whole, scale, (0,)) == rows


def test_likelihood_and_error_share_their_trajectories(stages, tiny, told):
    likelihood = pgd_likelihood(stages, tiny, (0,))
    sources = ["lambda 0", "lambda 1", "ensemble"]
    assert [(row["target"], row["source"]) for row in likelihood] == [
        (target, source) for target in ("random", "medium") for source in sources
    ]
    assert all(row["length"] == 4 and np.isfinite(row["iqm"]) for row in likelihood)
    measured = [line for line in told if "log-likelihood" in line]
    assert len(measured) == 6
    error = pgd_error(stages, tiny, (0,))
    assert len([line for line in told if "log-likelihood" in line]) == 12  # the other length
    assert len(error) == 12
    for row in error:
        assert "iqm" not in row or row["iqm"] >= 0
    assert sum("iqm" in row for row in error) > 0
    for name in ("pgd-likelihood", "pgd-error"):
        assert (stages.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len(table(stages.folder / f"{name}.csv")) == (6 if "like" in name else 12)


def test_strong_guidance_is_more_likely_under_the_target(stages, tiny):
    scale = dataclasses.replace(
        tiny, targets=("random",), coefficients=(0.0, 20.0), measured_trajectories=40
    )
    free, guided, _ = pgd_likelihood(stages, scale, (0,))
    assert guided["iqm"] > free["iqm"]


def test_log_likelihood_is_the_normals():
    mean, std = torch.tensor([[0.5, -1.0]]), torch.tensor([2.0, 0.5])
    actions = torch.tensor([[1.5, -1.0]])
    wanted = -0.5 * 0.25 - np.log(2.0) - np.log(0.5) - np.log(2 * np.pi)
    found = action_log_likelihood(lambda o: (mean, std), torch.zeros(1, 3), actions)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_papers_scores():
    assert paper_score("Hopper-v5", "medium-replay", "td3_bc", "guided") == 91.9
    assert paper_score("HalfCheetah-v5", "medium", "iql", "real") == 48.4
    assert paper_score("Hopper-v5", "medium", "iql", "ensemble") is None
    assert paper_score("InvertedPendulum-v5", "medium", "iql", "real") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": ("cql",)}, r"agents must be of \['td3_bc', 'iql'\], got 'cql'"),
        ({"data": ("real", "real")}, "data must be different ones"),
        ({"recipes": ("best",)}, "recipes must be of .*, got 'best'"),
        ({"env_ids": ("Nope-v1",)}, "--medium-return must be given for Nope-v1"),
        ({"env_ids": ("Hopper-v99",)}, "Hopper-v99"),
    ],
)
def test_wrong_sizes_are_refused_before_any_work(stages, tiny, options, message):
    with pytest.raises(InputError, match=message):
        pgd_returns(stages, dataclasses.replace(tiny, **options), (0,))
    assert not stages.folder.exists()


def test_scales_are_checked():
    assert PGDScale.from_scale("paper").preset == "paper"
    for options, message in (
        ({"lengths": (1,)}, "lengths must be at least 2 each"),
        ({"coefficients": ()}, "coefficients must be at least one"),
        ({"recipes": "medium"}, "recipes must be a tuple"),
        ({"lifetime": 0}, "lifetime must be None or a positive number"),
    ):
        with pytest.raises(InputError, match=message):
            PGDScale(**options)


def run(folder, *more):
    words = ["reproduce", "pgd-returns", "--out", str(folder), "--seeds", "0", "--no-progress"]
    tiny = (
        f"--env-ids {ENV} --recipes medium --agents iql --data real --agent-updates 8 "
        "--dataset-steps 80 --test-episodes 2"
    )
    return cli.main([*words, *tiny.split(), *more])


def test_the_command(tmp_path, capsys):
    assert run(tmp_path / "out") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("1 rows in ") and "pgd-returns.png" in out[-1]
    assert len(table(tmp_path / "out" / "pgd-returns.csv")) == 1
    assert run(tmp_path / "out", "--agent-updates", "9") == 2
    captured = capsys.readouterr()
    assert "other options" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reproduce fig99", "fig99"),
        ("reproduce pgd-returns --scale huge", "scale must be one of ['quick', 'paper'], got"),
        ("reproduce pgd-returns --seeds 4-0", "--seeds must be seeds, e.g. 0-4 or 0,2,7, got"),
        ("reproduce pgd-returns --seeds 0,0", "--seeds must be different seeds"),
        ("reproduce pgd-returns --out file", "--out must be a folder, got the file file"),
        ("reproduce pgd-returns --agents cql", "agents must be of"),
        ("reproduce pgd-error --targets best", "targets must be of"),
        ("reproduce pgd-returns --agent-updates 0", "agent_updates must be None or a positive"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
