"""Engine "torch" on a CPU against the reference engine and against its own GEMMs alone.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_sampler_cpu.py --benchmark-only -s

prints one row per batch size and dtype: milliseconds per diffusion step (medians of interleaved
rounds), refresh of weights included. On one thread the clock is processor time, which other work on
the machine disturbs least; on more threads it is the wall clock. No row is printed before the
trajectories agree with the reference's.

"GEMMs" is every matrix product the engine does in a step, by the same operator, in the same shapes
and parts, without activation or residual, on operands that are already in the caches and on weights
in PyTorch's layout. "packed" is the same on weights in oneDNN's layout, as the engine packs them
once per sample; "F.linear" the same products by PyTorch's public operator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import polygrad_fast as pg
from polygrad_fast.sampling.linear import LinearOps, Weight
from polygrad_fast.sampling.reference_engine import ReferenceEngine
from polygrad_fast.sampling.torch_engine import TorchEngine

HORIZON, OBSERVATION_DIM, ACTION_DIM = 10, 17, 6  # Walker2d
GUIDANCE_SCALE = 0.005
STEPS = {64: 128, 256: 64, 1024: 16}  # batch size -> diffusion steps per sample
ROUNDS = 3
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.05}  # largest difference of a chain's states
TARGETS = {"float32": (1.15, 1.0), "bfloat16": (1.25, 2.3)}  # engine/GEMMs, reference/engine


@dataclass(frozen=True)
class RecordedLinears(LinearOps):
    """Notes the operands of every Linear."""

    calls: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def linear(self, x, weight, bias, activation="none"):
        self.calls.append((x, weight, bias))
        return super().linear(x, weight, bias, activation)

    def linear_add(self, x, weight, bias, residual):
        self.calls.append((x, weight, bias))
        return super().linear_add(x, weight, bias, residual)


def build(num_steps: int) -> pg.PolicyGuidedSampler:
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(OBSERVATION_DIM), torch.rand(OBSERVATION_DIM) + 0.5),
        actions=(0.1 * torch.randn(ACTION_DIM), torch.rand(ACTION_DIM) + 0.5),
    )
    return pg.PolicyGuidedSampler(
        pg.ResidualMLPDenoiser(OBSERVATION_DIM, ACTION_DIM, HORIZON),
        pg.GaussianPolicy(OBSERVATION_DIM, ACTION_DIM),
        pg.NoiseSchedule.cosine(num_steps),
        normalizer,
        engine="reference",
    )


def linears_of_one_step(engine: TorchEngine, s0: Tensor) -> list[tuple]:
    """Return (ops, x, weight, bias) of every Linear in one step, one x per shape and dtype."""
    steps, denoiser, policy = engine._steps, engine._denoiser, engine._policy
    before = denoiser.ops, policy.ops
    recorded = tuple(RecordedLinears(ops.onednn, ops.onednn_from) for ops in before)
    engine._steps, (denoiser.ops, policy.ops) = steps[:1], recorded
    engine.sample(s0, GUIDANCE_SCALE, None, None, False)
    engine._steps, (denoiser.ops, policy.ops) = steps, before
    operands = {}
    return [
        (ops, operands.setdefault((x.shape, x.dtype), torch.randn(x.shape).to(x.dtype)), w, b)
        for ops, recorder in zip(before, recorded, strict=True)
        for x, w, b in recorder.calls
    ]


def interleaved_medians(
    functions: dict[str, Callable], clock: Callable[[], float]
) -> dict[str, float]:
    times = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.mark.parametrize("batch", STEPS)
@pytest.mark.parametrize("dtype", TARGETS)
@torch.no_grad()
def test_sampler(benchmark, dtype, batch):
    num_steps = STEPS[batch]
    components = build(num_steps).components
    reference, engine = ReferenceEngine(components), TorchEngine(components, dtype)
    s0 = torch.randn(batch, OBSERVATION_DIM)
    seeds = (torch.Generator().manual_seed(1) for _ in range(2))
    got, wanted = (
        which.sample(s0, GUIDANCE_SCALE, next(seeds), None, False) for which in (engine, reference)
    )
    difference = max((g - w).abs().max().item() for g, w in zip(got[:2], wanted[:2], strict=True))
    assert difference < AGREEMENT[dtype]

    calls = linears_of_one_step(engine, s0)

    def sample(which):
        return lambda: which.sample(s0, GUIDANCE_SCALE, None, None, False)

    def gemms(linear):
        def run():
            for _ in range(num_steps):
                for ops, *operands in calls:
                    linear(ops, *operands)  # the result is freed at once, as in the engine

        return run

    functions = {
        "engine": sample(engine),
        "gemms": gemms(lambda ops, x, weight, bias: ops.linear(x, Weight(weight.plain), bias)),
        "packed": gemms(LinearOps.linear),
        "reference": sample(reference),
        "f_linear": gemms(lambda _, x, weight, bias: F.linear(x, weight.plain, bias)),
        "refresh": lambda: engine._refresh(GUIDANCE_SCALE),
    }
    for function in functions.values():
        function()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ms = {k: 1e3 * v for k, v in interleaved_medians(functions, clock).items()}
    refresh = ms.pop("refresh")
    ms = {name: value / num_steps for name, value in ms.items()}
    to_gemms, to_reference = ms["engine"] / ms["gemms"], ms["reference"] / ms["engine"]
    wanted_gemms, wanted_reference = TARGETS[dtype]
    met = to_gemms <= wanted_gemms and to_reference >= wanted_reference
    benchmark.extra_info.update(
        {f"{name}_ms_per_step": value for name, value in ms.items()},
        refresh_ms_per_sample=refresh,
        engine_over_gemms=to_gemms,
        reference_over_engine=to_reference,
        threads=torch.get_num_threads(),
        targets_met=met,
    )
    print(
        f"\n{dtype:>8} B={batch:<5}{num_steps:>3} steps, {torch.get_num_threads()} threads: "
        f"engine {ms['engine']:.2f} ms/step, GEMMs {ms['gemms']:.2f}, "
        f"packed {ms['packed']:.2f}, F.linear {ms['f_linear']:.2f}, "
        f"reference {ms['reference']:.2f}, "
        f"refresh {refresh:.2f} ms/sample; "
        f"engine/GEMMs {to_gemms:.3f} (target {wanted_gemms}), "
        f"reference/engine {to_reference:.2f} (target {wanted_reference})"
        f"{'' if met else '  NOT MET'}"
    )
    benchmark.pedantic(functions["engine"], rounds=1)
