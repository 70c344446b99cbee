"""The line search against a sequential one."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.learners.line_search import MAX_CORRECTIONS, FoundStep, LineSearch

NUM_ACTIONS, A = 200, 3
CPU = torch.device("cpu")


class Problem:
    """Actions under a policy tanh(u + s v), std exp(w + s x), of a step scaled by s."""

    def __init__(self, seed: int, step: float, std_step: float = 0.3):
        g = torch.Generator().manual_seed(seed)
        draw = [torch.randn(NUM_ACTIONS, A, generator=g, dtype=torch.float64) for _ in range(3)]
        self.u, self.v = draw[0], step * draw[1]
        self.log_std = torch.tensor([-0.5, 0.0, -1.0], dtype=torch.float64)
        self.log_std_step = std_step * step * torch.randn(A, generator=g, dtype=torch.float64)
        self.scale, self.trials, self.moves = torch.ones(()).double(), 0, []
        mean, std = self.moments(0.0)
        self.actions = mean + std * draw[2]
        self.z = draw[2]

    def moments(self, scale):
        return torch.tanh(self.u + scale * self.v), (self.log_std + scale * self.log_std_step).exp()

    def log_prob(self, scale):
        mean, std = self.moments(scale)
        return (-0.5 * ((self.actions - mean) / std).square() - std.log()).sum(1)

    def size(self, scale: float) -> float:
        return (self.log_prob(scale) - self.log_prob(0.0)).abs().mean().item()

    def move(self, scale):
        assert scale.shape == ()
        self.moves.append(scale.item())
        self.scale = scale

    def measure(self):
        self.trials += 1
        (mean, std), (old_mean, old_std) = self.moments(self.scale), self.moments(0.0)
        slopes = (
            self.z * (mean - old_mean) / old_std + (self.z.square() - 1) * (std / old_std).log()
        )
        return self.log_prob(self.scale) - self.log_prob(0.0), slopes.sum(1)


@dataclass
class Sequential:
    """Rung by rung, as appendix A says and the released code does."""

    num_trials: int
    scale: float
    initial_size: float
    size: float
    reason: str


def sequential(problem: Problem, config: pg.A2CConfig, target: float, rate: float) -> Sequential:
    size = initial_size = problem.size(1.0)
    trials, scale, shrinking = 1, 1.0, initial_size > target
    low, high = (target * (1 + s * config.line_search_tolerance) for s in (-1, 1))
    ratio = config.line_search_ratio if shrinking else 1 / config.line_search_ratio
    while True:
        if low <= size <= high:
            reason = "within tolerance"
        elif (size > target) != shrinking:
            reason = "passed"
        elif not shrinking and scale * ratio * rate > config.actor_learning_rate:
            reason = "too long"
        elif trials > config.line_search_max_steps:
            reason = "trials are spent"
        else:
            scale *= ratio
            size = problem.size(scale)
            trials += 1
            continue
        return Sequential(trials, scale, initial_size, size, reason)


def search(problem, config, target, rate, reads=True) -> FoundStep:
    found = LineSearch(config, CPU, torch.float64)
    found.reads = reads
    rate = torch.tensor(rate, dtype=torch.float64)
    return found(problem.move, problem.measure, target, rate)


CASES = {
    # config, scales of steps, learning rate, how sequential searches end
    "default": ({}, (1e-4, 0.3), 1e-5, {"within tolerance", "too long"}),
    "free": ({"actor_learning_rate": 1e3}, (1e-4, 1.0), 1e-5, {"within tolerance"}),
    "narrow": (
        {"actor_learning_rate": 1e3, "line_search_tolerance": 0.02},
        (1e-3, 1.0),
        1e-5,
        {"within tolerance", "passed"},
    ),
    "short": (
        {"actor_learning_rate": 1e3, "line_search_max_steps": 5},
        (1e-3, 1.0),
        1e-5,
        {"within tolerance", "trials are spent"},
    ),
    "fine": (
        {
            "actor_learning_rate": 1e3,
            "line_search_ratio": 0.97,
            "line_search_tolerance": 0.02,
            "line_search_max_steps": 200,
        },
        (1e-3, 0.3),
        1e-5,
        {"within tolerance"},
    ),
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_it_ends_where_the_sequential_search_does(name, reads):
    options, (smallest, largest), rate, wanted_reasons = CASES[name]
    config, reasons, shrunk, grown = pg.A2CConfig(**options), set(), 0, 0
    for seed in range(40):
        step = smallest * (largest / smallest) ** (seed / 39)
        problem, target = Problem(seed, step), 0.01
        wanted = sequential(problem, config, target, rate)
        found = search(problem, config, target, rate, reads)
        assert found.num_trials == wanted.num_trials
        assert found.size.item() == pytest.approx(wanted.size, rel=1e-9)
        assert found.initial_size.item() == pytest.approx(wanted.initial_size, rel=1e-9)
        assert problem.scale.item() == pytest.approx(wanted.scale, rel=1e-9)
        assert problem.trials <= 1 + MAX_CORRECTIONS
        reasons.add(wanted.reason)
        shrunk, grown = shrunk + (wanted.scale < 1), grown + (wanted.scale > 1)
    assert wanted_reasons <= reasons and shrunk and grown


def test_a_device_is_told_everything_at_once():
    """As many trials whatever they give, so that a graph can hold them."""
    counts = set()
    for seed, step in itertools.product(range(3), (1e-3, 0.02, 1.0)):
        problem = Problem(seed, step)
        search(problem, pg.A2CConfig(), 0.01, 1e-5, reads=False)
        counts.add((problem.trials, len(problem.moves)))
    assert counts == {(1 + MAX_CORRECTIONS, 1 + MAX_CORRECTIONS)}


def test_few_trials_do():
    counts = []
    for seed in range(50):
        problem = Problem(seed, 0.3)
        wanted = sequential(problem, pg.A2CConfig(), 0.01, 1e-5)
        search(problem, pg.A2CConfig(), 0.01, 1e-5)
        assert wanted.num_trials > 8
        counts.append(problem.trials)
    assert sum(counts) / len(counts) < 3.5


def test_without_a_search_the_step_stays():
    problem = Problem(0, 1.0)
    found = search(problem, pg.A2CConfig(line_search=False), 0.01, 1e-5)
    assert not problem.moves and problem.trials == 1
    assert found.num_trials == 1 and found.size == found.initial_size > 0.1


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said(value, reads):
    problem = Problem(0, 1.0)
    problem.v[5] = value
    found = search(problem, pg.A2CConfig(), 0.01, 1e-5, reads)
    assert not found.initial_size.isfinite()
