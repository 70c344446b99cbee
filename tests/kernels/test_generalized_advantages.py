"""The kernel of generalized advantages, and the learners' scan, against their twin in float64."""

import pytest
import torch

triton = pytest.importorskip("triton")

import polygrad_fast as pg  # noqa: E402
from polygrad_fast.kernels.generalized_advantages import generalized_advantages  # noqa: E402
from polygrad_fast.learners import advantages as learners  # noqa: E402
from polygrad_fast.reference import generalized_advantages as twin  # noqa: E402

SIZES = [(1, 1), (1, 2), (7, 10), (257, 10), (33, 50), (3, 129)]


def make(batch, horizon, device, terminal_rate=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, horizon, generator=g)
    terminals = (torch.rand(batch, horizon, generator=g) < terminal_rate).float()
    return tuple(tensor.to(device) for tensor in (rewards, values, terminals))


@pytest.mark.parametrize("compute", [generalized_advantages, learners.generalized_advantages])
@pytest.mark.parametrize("terminal_rate", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("batch, horizon", SIZES)
def test_it_equals_its_twin(device, compute, batch, horizon, terminal_rate):
    """At most twice the twin's own error of float32, with an error of one rounding allowed."""
    arguments = make(batch, horizon, device, terminal_rate)
    got = compute(*arguments, 0.99, 0.9)
    exact = twin.generalized_advantages(*(x.double() for x in arguments), 0.99, 0.9)
    plain = twin.generalized_advantages(*arguments, 0.99, 0.9)
    assert got.shape == exact.shape == (batch, horizon - 1)
    if horizon > 1:
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@pytest.mark.parametrize("gamma, gae_lambda", [(0.0, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_discounts_at_their_ends(device, gamma, gae_lambda):
    arguments = make(9, 12, device)
    got = generalized_advantages(*arguments, gamma, gae_lambda)
    wanted = twin.generalized_advantages(*arguments, gamma, gae_lambda)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_strided_and_poisoned_inputs(device):
    """Every stride counts, nothing beside the trajectories is read."""
    arguments = make(7, 10, device)
    wanted = twin.generalized_advantages(*arguments, 0.99, 0.9)
    padded = [torch.full((9, 23), torch.nan, device=device) for _ in range(2)]
    views = [pad[1:8, 2:22:2].copy_(x) for pad, x in zip(padded, arguments, strict=False)]
    transposed = arguments[2].t().contiguous().t()
    got = generalized_advantages(*views, transposed, 0.99, 0.9)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_no_trajectories(device):
    assert generalized_advantages(*make(0, 5, device), 0.99, 0.9).shape == (0, 4)


def test_unusable_inputs_are_refused(device):
    rewards, values, terminals = make(3, 4, device)
    with pytest.raises(pg.InputError, match=r"values must be float32 .*\[3, 4\], got .*\[3, 3\]"):
        generalized_advantages(rewards, values[:, :3], terminals, 0.99, 0.9)
    with pytest.raises(pg.InputError, match="terminals must be float32 .*, got torch.float64"):
        generalized_advantages(rewards, values, terminals.double(), 0.99, 0.9)


@pytest.mark.gpu
def test_learners_use_the_kernel(monkeypatch):
    """On a GPU, once per call."""
    arguments, calls = make(5, 6, torch.device("cuda")), []
    monkeypatch.setattr(
        learners, "_kernel", lambda: lambda *a: calls.append(a) or generalized_advantages(*a)
    )
    learners.generalized_advantages(*arguments, 0.99, 0.9)
    assert len(calls) == 1
