"""Engine "torch" on a CPU against the reference engine and against its own GEMMs alone.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_sampler_cpu.py --benchmark-only --rows rows.jsonl

Milliseconds per diffusion step (medians of interleaved rounds), refresh of weights included. The
checks are those of `harness.sampler_case`. What is aimed at stands in
`harness.report`, in the caption of the table.

"gemms" is every matrix product the engine does in a step, by the same operator, in the same shapes
and parts, without activation or residual, on operands that are already in the caches and on weights
in PyTorch's layout. "packed" is the same on weights in oneDNN's layout, as the engine packs them
once per sample.
"""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness import sampler_case
from harness.sampler_case import GUIDANCE_SCALE
from polygrad_fast.sampling.linear import LinearOps, Weight
from polygrad_fast.sampling.torch_engine import TorchEngine

STEPS = {64: 128, 256: 64, 1024: 16}  # batch size -> diffusion steps per sample
DTYPES = ("float32", "bfloat16")


def linears_of_a_sample(engine: TorchEngine, s0: Tensor) -> list[tuple]:
    """Return (ops, x's shape and dtype, weight, bias) of every Linear, in the engine's order."""
    calls = []

    def recorded(method):
        def call(ops, x, weight, bias, *others, **options):
            calls.append((ops, (x.shape, x.dtype), weight, bias))
            return method(ops, x, weight, bias, *others, **options)

        return call

    linear, linear_add = recorded(LinearOps.linear), recorded(LinearOps.linear_add)
    with mock.patch.multiple(LinearOps, linear=linear, linear_add=linear_add):
        engine.sample(s0, GUIDANCE_SCALE, None, None, False)
    return calls


def linears_of_one_step(engine: TorchEngine, s0: Tensor) -> list[tuple]:
    """Return (ops, x, weight, bias) of every Linear in one step, one x per shape and dtype."""
    lengths = []  # what a third step adds is a step that is neither the first nor the last
    for num_steps in (2, 3):
        c = sampler_case.shortened(engine.components, num_steps)
        short = sampler_case.make_engine("torch", c, engine.dtype)
        lengths.append(len(linears_of_a_sample(short, s0)))
    operands = {}
    return [
        (ops, operands.setdefault(key, torch.randn(key[0]).to(key[1])), weight, bias)
        for ops, key, weight, bias in linears_of_a_sample(engine, s0)[: lengths[1] - lengths[0]]
    ]


def list_cases(setting):
    """Return dtypes and batches; last, for they take longest."""
    if setting.device.type != "cpu":
        return []
    batches = [4] if setting.smoke else STEPS
    return [(8, {"dtype": dtype, "batch": batch}) for dtype in DTYPES for batch in batches]


@pytest.mark.cases(of=list_cases)
def test_step(bench, dtype, batch):
    num_steps = STEPS.get(batch, 4)
    sizes = sampler_case.SMALL if bench.session.small else sampler_case.Sizes()
    names = {"engine": "torch", "batch": batch, "horizon": 10, "steps": num_steps}
    with bench.case("sampler step", dtype, **names) as case, torch.no_grad():
        c = sampler_case.shortened(sampler_case.build(sizes, 10, bench.device), num_steps)
        reference = sampler_case.make_engine("reference", c, "float32")
        s0 = torch.randn(batch, c.observation_dim)
        sample = sampler_case.TimedSampler("torch", c, dtype, s0, sizes)
        sample.check(case)
        calls = linears_of_one_step(sample.engine, s0)

        def gemms(linear):
            def run():
                for _ in range(num_steps):
                    for ops, *operands in calls:
                        linear(ops, *operands)  # the result is freed at once, as in the engine

            return run

        beside = {
            "gemms": gemms(lambda ops, x, weight, bias: ops.linear(x, Weight(weight.plain), bias)),
            "packed": gemms(LinearOps.linear),
            "reference": lambda: reference.sample(s0, GUIDANCE_SCALE, None, None, False),
        }
        work = sampler_case.sample_work(sampler_case.shortened(c, 1), batch, dtype)
        after = functools.partial(sample.check_result, case)
        case.time(sample, batch, "trajectory", work, num_steps, beside, seconds=10.0, after=after)
