"""On a GPU: engines captured before 1,000 optimizer steps compute what the reference and eager
launches compute after them."""

import dataclasses

import pytest
import torch

import polygrad_fast as pg
from harness import sampler_case
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.diffusion.trainer import DenoiserTrainer
from polygrad_fast.sampling.reference_engine import ReferenceEngine
from polygrad_fast.sampling.torch_engine import TorchEngine
from polygrad_fast.sampling.triton_engine import TritonEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = torch.device("cuda")
ENGINES = {"torch": TorchEngine, "triton": TritonEngine}
DTYPES = ("float32", "tf32", "float16", "bfloat16")
CASES = [(name, dtype) for name in ENGINES for dtype in DTYPES]
BATCH, HORIZON, UPDATES = 257, 10, 1000
S, A = sampler_case.OBSERVATION_DIM, sampler_case.ACTION_DIM
SIZES = sampler_case.Sizes(num_steps=16, hidden_dim=256)


def train(c) -> None:
    """Change every weight and moment in place, as training does."""
    trainer = DenoiserTrainer(c.denoiser, c.schedule, DenoiserConfig(hidden_dim=256), c.config)
    optimizer = torch.optim.Adam(c.policy.parameters(), lr=1e-3)
    generator = torch.Generator(DEVICE).manual_seed(3)
    for _ in range(UPDATES):
        states, actions = (
            torch.randn(64, HORIZON, dim, generator=generator, device=DEVICE) for dim in (S + 2, A)
        )
        trainer.update(states.cumsum(1) / 3, actions, generator)
        mean, std = c.policy(states[..., :S])
        optimizer.zero_grad()
        ((mean - actions).square().mean() + std.sum()).backward()
        optimizer.step()
    c.normalizer.update(
        {
            "observations": (torch.ones(S), torch.full((S,), 2.0)),
            "actions": (torch.ones(A), torch.full((A,), 0.5)),
        }
    )


@pytest.fixture(scope="module")
def trained():
    """Components after training, and engines whose graphs were captured before it."""
    c = sampler_case.build(SIZES, HORIZON, DEVICE)
    torch.manual_seed(1)
    s0, noise = torch.randn(BATCH, S, device=DEVICE), sampler_case.draw_noise(c, BATCH)
    engines, before = {}, {}
    for name, dtype in CASES:
        engine = engines[name, dtype] = ENGINES[name](c, dtype)
        before[name, dtype] = engine.sample(s0, 0.05, None, noise, True)[0]
    captures = {case: list(engine._graphs._entries.values()) for case, engine in engines.items()}
    train(c)
    return c, s0, noise, engines, before, captures


@pytest.mark.parametrize("name, dtype", CASES)
def test_captured_engine_equals_the_reference(trained, name, dtype):
    c, s0, _, engines, _, captures = trained
    error, allowed = sampler_case.step_errors(engines[name, dtype], c, dtype, s0)
    assert error <= allowed
    assert list(engines[name, dtype]._graphs._entries.values()) == captures[name, dtype]


@pytest.mark.parametrize("name, dtype", CASES)
def test_captured_engine_equals_eager_launches(trained, name, dtype):
    c, s0, noise, engines, before, _ = trained
    eager = ENGINES[name](c, dtype)
    if name == "triton":
        eager._graphs = None
    else:
        eager._captures = False
    got = engines[name, dtype].sample(s0, 0.05, None, noise, True)
    wanted = eager.sample(s0, 0.05, None, noise, True)
    if name == "triton":
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    else:  # cuBLAS may choose another algorithm within a capture
        _, allowed = sampler_case.step_errors(eager, c, dtype, s0)
        for mine, theirs in zip(got[2], wanted[2], strict=True):
            assert (mine - theirs).abs().max() <= 10 * allowed
    assert (got[0] - before[name, dtype]).abs().max() > 0.1  # the new weights are seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_equals_the_reference(dtype):
    c = sampler_case.build(SIZES, HORIZON, DEVICE)
    torch.manual_seed(0)
    denoiser = pg.TransformerDenoiser(S, A, HORIZON, hidden_dim=64, num_layers=2).to(DEVICE)
    c = dataclasses.replace(c, denoiser=denoiser)
    s0 = torch.randn(BATCH, S, device=DEVICE)
    error, allowed = sampler_case.step_errors(TorchEngine(c, dtype), c, dtype, s0)
    assert error <= allowed


def test_reference_engine_equals_its_float64_twin():
    c = sampler_case.build(SIZES, HORIZON, DEVICE)
    s0 = torch.randn(BATCH, S, device=DEVICE)
    error, allowed = sampler_case.step_errors(ReferenceEngine(c), c, "float32", s0)
    assert error <= allowed
