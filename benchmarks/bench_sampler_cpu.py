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
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from harness import sampler_case
from harness.sampler_case import GUIDANCE_SCALE
from polygrad_fast.sampling.linear import LinearOps, Weight
from polygrad_fast.sampling.torch_engine import TorchEngine

STEPS = {64: 128, 256: 64, 1024: 16}  # batch size -> diffusion steps per sample
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class RecordedLinears(LinearOps):
    """Notes the operands of every Linear."""

    calls: list[tuple[Tensor, Weight, Tensor | None]] = field(default_factory=list)

    def linear(self, x, weight, bias, activation="none"):
        self.calls.append((x, weight, bias))
        return super().linear(x, weight, bias, activation)

    def linear_add(self, x, weight, bias, residual):
        self.calls.append((x, weight, bias))
        return super().linear_add(x, weight, bias, residual)


def linears_of_one_step(engine: TorchEngine, s0: Tensor) -> list[tuple]:
    """Return (ops, x, weight, bias) of every Linear in one step, one x per shape and dtype."""
    constants, denoiser, policy = engine.constants, engine.denoiser, engine.step.policy
    before = denoiser.ops, policy.ops
    recorded = tuple(RecordedLinears(ops.onednn, ops.onednn_from) for ops in before)
    engine.constants, (denoiser.ops, policy.ops) = constants[:1], recorded
    engine.sample(s0, GUIDANCE_SCALE, None, None, False)
    engine.constants, (denoiser.ops, policy.ops) = constants, before
    operands = {}
    return [
        (ops, operands.setdefault((x.shape, x.dtype), torch.randn(x.shape).to(x.dtype)), w, b)
        for ops, recorder in zip(before, recorded, strict=True)
        for x, w, b in recorder.calls
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
