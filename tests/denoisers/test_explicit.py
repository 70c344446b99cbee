"""Passes that are written out have the gradients of autograd."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polygrad_fast as pg
from polygrad_fast.denoisers import products
from polygrad_fast.denoisers.explicit import explicit_passes, is_as_built
from polygrad_fast.denoisers.one_step import OneStepNetwork
from polygrad_fast.denoisers.products import ONEDNN_FROM, TrainedLinear, onednn_offers

S, A, K = 3, 2, 12


def residual_mlp(horizon=4, conditioning="input", dtype=torch.float64, hidden_dim=24):
    torch.manual_seed(0)
    denoiser = pg.ResidualMLPDenoiser(
        S, A, horizon, hidden_dim, 2, step_conditioning=conditioning, num_train_timesteps=K
    )
    for parameter in denoiser.parameters():  # LayerNorm's too
        nn.init.normal_(parameter, std=0.3)
    return denoiser.to(dtype)


def denoiser_inputs(batch, horizon=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(batch)
    trajectory = torch.randn(batch, horizon, S + 2, generator=g, dtype=dtype)
    actions = torch.randn(batch, horizon, A, generator=g, dtype=dtype)
    return trajectory, actions, torch.randint(K, (batch,), generator=g)


def one_step(dtype=torch.float64, hidden_dim=24):
    torch.manual_seed(0)
    return OneStepNetwork(S, A, hidden_dim, 3).to(dtype)


def transitions(batch, dtype=torch.float64):
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 5, S, generator=g, dtype=dtype), torch.randn(
        batch, 5, A, generator=g, dtype=dtype
    )


def loss_of(results, dtype=None):
    """Return a loss that depends on every entry in its own way."""
    results = results if isinstance(results, tuple) else (results,)
    flat = torch.cat([part.to(dtype or part.dtype).flatten() for part in results])
    weights = torch.linspace(-1, 2, len(flat), dtype=flat.dtype)
    return (flat.square() * weights + flat.sin()).mean()


def gradients_of_autograd(module, inputs, dtype=None):
    module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        results = module(*inputs)
    loss_of(results, next(module.parameters()).dtype).backward()
    return [parameter.grad for parameter in module.parameters()]


def explicit_gradients(module, inputs, dtype=None):
    """Return them, written over NaN: nothing may be added to what was there."""
    passes = explicit_passes(module, K, dtype or next(module.parameters()).dtype)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        loss_of(passes(*inputs)).backward()
        passes.backward()
    return [parameter.grad for parameter in module.parameters()]


def errors(got, exact):
    return [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["input", "layer"]),
    st.sampled_from([1, 7, K, K + 1, 257]),  # fewer steps than windows, and more
    st.integers(1, 6),
)
def test_residual_mlp_in_float64(conditioning, batch, horizon):
    denoiser = residual_mlp(horizon, conditioning)
    inputs = denoiser_inputs(batch, horizon)
    exact = gradients_of_autograd(denoiser, inputs)
    for got, wanted in zip(explicit_gradients(denoiser, inputs), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
    passes = explicit_passes(denoiser, K, torch.float64)
    torch.testing.assert_close(passes(*inputs), denoiser(*inputs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch", [1, 7, 257])
@pytest.mark.parametrize("as_rollout", [False, True])
def test_one_step_network_in_float64(batch, as_rollout):
    network, inputs = one_step(), transitions(batch)
    exact = gradients_of_autograd(network, inputs)
    module = network
    if as_rollout:
        module = pg.RolloutDenoiser(S, A, 5, 24, 3).double()
        module.step.load_state_dict(network.state_dict())
    for got, wanted in zip(explicit_gradients(module, inputs), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
    for got, wanted in zip(
        explicit_passes(module, K, torch.float64)(*inputs), network(*inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Whose products are taken, whatever this processor's instructions."""
    if request.param == "oneDNN" and not onednn_offers(torch.float32):
        pytest.skip("this build of PyTorch has no oneDNN")
    takes = request.param == "oneDNN"
    monkeypatch.setattr(products, "onednn_trains", lambda dtype: takes and dtype == torch.float32)
    return request.param


@pytest.mark.parametrize("widest, takes", [("AVX2", False), ("AVX512", True), ("DEFAULT", False)])
def test_onednn_trains_where_it_is_faster(monkeypatch, widest, takes):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    monkeypatch.setattr(products, "onednn_offers", lambda dtype: True)
    assert products.onednn_trains(torch.float32) == takes
    assert not products.onednn_trains(torch.bfloat16)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("conditioning", ["input", "layer"])
@pytest.mark.parametrize("dtype, factor", [(torch.float32, 3), (torch.bfloat16, 3)])
def test_rounding_is_that_of_autograd(conditioning, dtype, factor):
    """In the dtype, of float32 weights; wide enough for oneDNN's products."""
    width, batch = 272, 256
    assert width * width * batch > ONEDNN_FROM > width * 4 * (S + A + 2) * batch
    exact_denoiser = residual_mlp(conditioning=conditioning, hidden_dim=width)
    inputs = denoiser_inputs(batch)
    exact = gradients_of_autograd(exact_denoiser, inputs)
    denoiser = copy.deepcopy(exact_denoiser).float()
    inputs = [x.float() if x.is_floating_point() else x for x in inputs]
    autocast = None if dtype == torch.float32 else dtype
    allowed = errors(gradients_of_autograd(denoiser, inputs, autocast), exact)
    got = errors(explicit_gradients(denoiser, inputs, dtype), exact)
    smallest = torch.finfo(dtype).eps
    for mine, theirs in zip(got, allowed, strict=True):
        assert mine <= factor * max(theirs, smallest)


def test_rounding_of_the_one_step_network():
    network, inputs = one_step(hidden_dim=64), transitions(257)
    exact = gradients_of_autograd(network, inputs)
    network, inputs = network.float(), [x.float() for x in inputs]
    allowed = errors(gradients_of_autograd(network, inputs, torch.bfloat16), exact)
    got = errors(explicit_gradients(network, inputs, torch.bfloat16), exact)
    for mine, theirs in zip(got, allowed, strict=True):
        assert 1e-4 < mine <= 3 * theirs


@pytest.mark.parametrize("rows", [1, 300])
def test_a_linears_products(rows, library):
    linear = nn.Linear(272, 257)
    g = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(rows, 272, generator=g), torch.randn(rows, 257, generator=g)
    residual = torch.randn(rows, 257, generator=g)
    kept = residual.clone()
    for parameter in linear.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    trained = TrainedLinear(linear, torch.float32)
    assert trained._takes_onednn(x) == (library == "oneDNN" and rows == 300)
    with torch.no_grad():
        torch.testing.assert_close(trained.forward(x, residual), residual + linear(x))
        assert torch.equal(residual, kept)
        got = trained.backward(gradient)
        assert trained.backward(gradient, wants_input=False) is None
    torch.testing.assert_close(got, gradient @ linear.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.weight.grad, gradient.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.bias.grad, gradient.sum(0), rtol=1e-5, atol=1e-4)


CHANGES = {
    "forward hook": lambda d: d.blocks[0].register_forward_hook(lambda *_: None),
    "backward hook": lambda d: d.norm.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda d: d.input.register_full_backward_pre_hook(lambda *_: None),
    "hook on a weight": lambda d: d.output.weight.register_hook(lambda g: None),
    "hook behind a gradient": lambda d: d.proj.bias.register_post_accumulate_grad_hook(print),
    "frozen weight": lambda d: d.output.weight.requires_grad_(False),
    "another part": lambda d: setattr(d, "output", nn.Sequential(d.output)),
    "another forward": lambda d: setattr(d, "forward", lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_networks_are_noticed(change):
    denoiser = residual_mlp()
    assert is_as_built(denoiser)
    change(denoiser)
    assert not is_as_built(denoiser)


def test_other_networks_have_none():
    class Mine(pg.ResidualMLPDenoiser):
        pass

    for module in (Mine(S, A, 4, 8, 1), pg.TransformerDenoiser(S, A, 4, 8, 1, 2), nn.Linear(2, 2)):
        assert explicit_passes(module, K, torch.float32) is None
    assert is_as_built(one_step()) and is_as_built(pg.RolloutDenoiser(S, A, 5, 8, 1))
