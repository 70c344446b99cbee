"""Worlds with chance: what is said to be true of them is, and every model is compared with it."""

import dataclasses

import chance
import numpy as np
import torch

from harness import chance_tasks
from harness.chance_tables import ChanceFigure
from harness.rows import read_rows


def test_worlds_with_chance_are_compared(tmp_path):
    words = ["--seeds", "3", "--only", "linear-Gaussian", "hidden velocities", "--smoke"]
    assert chance.main([*words, "--rows", str(tmp_path / "rows.jsonl")]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    models = list(chance.configurations())
    found = {
        task: {row.case["model"]: row.values for row in rows if row.case["task"] == task}
        for task in ("linear-Gaussian", "hidden velocities")
    }
    extra = {"truth again", "one-step network, without chance"}
    assert set(found["hidden velocities"]) == {*models, *extra}
    assert set(found["linear-Gaussian"]) == {*models, *extra} - {chance.ROLLOUT}
    for task in found.values():
        for model, values in task.items():
            assert values["energy_10"] > 0
            assert ("energy_50" in values) == (model != "trajectory diffusion, 11 steps")
        assert task["one-step network"] != task["one-step network, without chance"]
    linear = found["linear-Gaussian"]
    best = linear.pop("truth again")
    assert all(values["energy_10"] > best["energy_10"] for values in linear.values())
    figure = ChanceFigure.of("x.png", [dataclasses.replace(row, smoke=False) for row in rows])
    assert list(figure.panels) == ["linear-Gaussian", "hidden velocities", "cost"]
    assert figure.floors["linear-Gaussian"]["h = 10"] == best["energy_10"]


def test_the_linear_system_has_the_moments_that_are_said():
    starts = np.array([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, 0.0, 1.0]])
    repeated = np.repeat(starts, 40_000, axis=0)
    generator = np.random.default_rng(0)
    played, actions = chance_tasks.play_linear(repeated, 4, chance_tasks.LINEAR_STD, generator)
    exact = chance_tasks.linear_moments(starts, 4)
    for t in (0, 1, 4):
        mean, covariance = exact[t]
        own = played[:, t].reshape(2, 40_000, 4)
        assert np.allclose(own.mean(1), mean, atol=0.02)
        for sample in own:
            assert np.allclose(np.cov(sample.T), covariance, atol=0.03)
    mean, std = chance_tasks.linear_policy(torch.as_tensor(repeated))
    z = (torch.as_tensor(actions[:, 0]) - mean) / std
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    task = chance_tasks.linear_task(chance_tasks.Sizes(400, 8, 64))
    exact = chance_tasks.score(task, _exact_draws(task), torch.ones(4))
    shifted = chance_tasks.score(task, _exact_draws(task) + 1.0, torch.ones(4))
    for h in chance_tasks.HORIZONS:
        assert exact[f"energy_{h}"] < 0.05 < shifted[f"energy_{h}"]
        assert exact[f"mean_error_{h}"] < 0.1 and shifted[f"mean_error_{h}"] > 0.9
        assert exact[f"std_error_{h}"] < 0.1 and exact[f"covariance_error_{h}"] < 0.2


def _exact_draws(task):
    """Trajectories [M N, 51, 4] with the known moments at the steps that are compared."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(len(task.starts) * task.draws, 51, 4)
    for h, (mean, covariance) in task.moments.items():
        normals = torch.randn(len(mean), task.draws, 4, generator=generator)
        root = torch.linalg.cholesky(covariance)
        found[:, h] = (mean[:, None] + normals @ root.mT).reshape(len(found), 4)
    return found
