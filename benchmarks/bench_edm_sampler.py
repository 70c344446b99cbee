"""Engines of the EDM sampler on a CPU: the plain loop, and engine "torch" with its packed U-Net.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_edm_sampler.py --benchmark-only --rows rows.jsonl

Whole samples of the U-Net of policy-guided diffusion, one at a time in turns with the plain loop of
the same sampler ("reference"): times are medians of these rounds.

Checked are one evaluation per noise level against the network in float64 (float32: at most 1e-5,
bfloat16: at most twice the error of the plain network under autocast), and in float32 the timed
sample against the plain loop's with the same noise.

"convolutions" are the plain loop's own convolutions, `conv1d` in its shapes, on operands that are
already in the caches. "products" are engine torch's matrix products alone, likewise.
"""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from harness.work import Work, parameter_bytes
from polygrad_fast.config import EDMConfig
from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.diffusion.edm import NoiseLevels
from polygrad_fast.sampling import packed_unet
from polygrad_fast.sampling.edm_sampler import EDMSampler, PackedDenoiser, PlainDenoiser

OBSERVATION_DIM, ACTION_DIM = 11, 3  # Hopper
BATCH, STEPS, LEVELS = 256, 32, 3
SIZES = ((32, 16), (32, 32), (64, 16), (64, 32))  # features, length
DTYPES = ("float32", "bfloat16")
FLOAT32_ERROR = 1e-5
CHAIN_ERROR = 1e-3
"""Of a whole float32 chain: its steps carry the rounding of those before."""
SEED = 1


def make_unet(features: int) -> TemporalUNet:
    """Return a network whose biases and scales matter, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    unet = TemporalUNet(OBSERVATION_DIM, ACTION_DIM, features, LEVELS, generator)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return unet


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the error over that of what is wanted."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def convolutions(unet: TemporalUNet, batch: int, length: int) -> list[tuple]:
    """Return (input, module) of every convolution of one evaluation, the input as its module gets
    it."""
    found, handles = [], []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv1d):
            hook = lambda module, inputs: found.append((torch.randn_like(inputs[0]), module))  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        unet(torch.randn(batch, length, unet.trajectory_dim), torch.zeros(batch))
    for handle in handles:
        handle.remove()
    return found


def convolution_flops(found: list[tuple]) -> int:
    """Return the FLOPs of the convolutions of one evaluation, padding included."""
    return sum(
        2 * module.weight.numel() * x.shape[0] * (x.shape[2] + 2 * module.padding[0] - k + 1)
        for x, module in found
        for k in module.kernel_size
    )


def products(denoiser: PackedDenoiser, x: torch.Tensor, sigma: float) -> list[tuple]:
    """Return (function, operands) of every matrix product of one evaluation by engine torch."""
    found = []

    def recorded(function):
        def call(*operands, out):
            found.append((function, (*operands, out)))
            return function(*operands, out=out)

        return call

    mm, addmm = recorded(torch.mm), recorded(torch.addmm)
    with mock.patch.multiple(packed_unet.torch, mm=mm, addmm=addmm):
        denoiser(x, sigma)
    return found


def list_cases(setting):
    """Return dtypes and sizes; last, for they take long."""
    if setting.device.type != "cpu":
        return []
    sizes = [(24, 8)] if setting.smoke else SIZES
    return [
        (9, {"dtype": dtype, "features": features, "length": length})
        for dtype in DTYPES
        for features, length in sizes
    ]


@pytest.mark.cases(of=list_cases)
def test_sample(bench, dtype, features, length):
    batch, steps = (8, 3) if bench.session.small else (BATCH, STEPS)
    config = EDMConfig(num_inference_steps=steps)
    names = {"features": features, "length": length, "batch": batch, "steps": steps}
    with bench.case("edm sample", dtype, engine="torch", **names) as case, torch.no_grad():
        unet = make_unet(features)
        sampler = EDMSampler(unet, config, "torch", dtype)
        reference = EDMSampler(unet, config, "reference")
        packed, plain = PackedDenoiser(unet, config, dtype), PlainDenoiser(unet, config)
        exact = PlainDenoiser(copy.deepcopy(unet).double(), config)
        packed.refresh()
        levels = NoiseLevels.of(config)
        x = torch.randn(batch, length, unet.trajectory_dim)
        errors, allowed = [], []
        for sigma in levels.sigma_hat[:: max(1, steps // 4)]:
            noisy = x * (sigma**2 + 1) ** 0.5
            wanted = exact(noisy[:32].double(), sigma)
            errors.append(relative_error(packed(noisy, sigma)[:32], wanted))
            allowed.append(FLOAT32_ERROR)
            if dtype != "float32":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    allowed[-1] = 2 * relative_error(plain(noisy[:32], sigma), wanted)
        worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i])
        case.check("evaluation", errors[worst], allowed[worst])

        results = {}

        def run(engine):
            generator = torch.Generator().manual_seed(SEED)
            results[engine] = engine.sample(batch, length, generator).trajectories

        def agree():
            if dtype == "float32":
                error = relative_error(results[sampler], results[reference])
                case.check("timed result", error, CHAIN_ERROR)

        found = convolutions(unet, batch, length)
        multiplied = products(packed, x, levels.sigma[0])
        evaluations = 2 * steps - 1

        def all_convolutions():
            for _ in range(evaluations):
                for inputs, module in found:
                    F.conv1d(inputs, module.weight, module.bias, padding=module.padding)

        def all_products():
            for _ in range(evaluations):
                for function, (*operands, out) in multiplied:
                    function(*operands, out=out)

        beside = {
            "reference": functools.partial(run, reference),
            "convolutions": all_convolutions,
            "products": all_products,
        }
        moved = parameter_bytes(unet) * (1.0 if dtype == "float32" else 0.5) + 4 * x.numel()
        work = Work(flops=evaluations * convolution_flops(found), bytes=moved)
        timed = functools.partial(run, sampler)
        case.time(timed, batch, "trajectory", work, 1, beside, seconds=12.0, after=agree)
