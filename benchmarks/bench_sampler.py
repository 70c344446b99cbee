"""Whole samples of the paper's networks on Walker2d, per engine, dtype, batch, horizon, denoiser.

    pytest benchmarks/bench_sampler.py --benchmark-only --rows rows.jsonl
    pytest benchmarks/bench_sampler.py --smoke                  # tiny sizes

S = 17, A = 6, K = 128 steps. "compile" is a control: the reference's denoiser and guided step under
torch.compile(max-autotune), K steps in one CUDA graph. The checks are those of
`harness.sampler_case`. A time is that of a whole call, weights read anew and
results copied out.
"""

import functools
import itertools

import pytest
import torch

from harness import sampler_case
from harness.sampler_case import DTYPES, ENGINES

BATCHES, HORIZONS = (1024, 4096, 256, 16384), (10, 50, 200)  # most important first
CPU_CASES = [  # importance; denoiser, batch, horizon; engine-dtype
    (0, "residual_mlp", 64, 10, "reference-float32 torch-float32 torch-bfloat16"),
    (2, "residual_mlp", 16, 10, "reference-float32 torch-float32 torch-bfloat16"),
    (2, "residual_mlp", 256, 10, "reference-float32 torch-float32 torch-bfloat16"),
    (3, "residual_mlp", 16, 50, "reference-float32 torch-float32 torch-bfloat16"),
    (3, "transformer", 4, 10, "reference-float32 torch-float32 torch-bfloat16"),
    (3, "transformer", 4, 50, "reference-float32 torch-float32 torch-bfloat16"),
    (4, "residual_mlp", 16, 200, "torch-float32 torch-bfloat16"),
    (5, "transformer", 4, 200, "torch-float32 torch-bfloat16"),
    (6, "residual_mlp", 16, 200, "reference-float32"),
    (7, "transformer", 4, 200, "reference-float32"),
]
CONTROL = 100
"""More than any case costs."""
_components = {}  # the last ones: cases of one shape follow each other


def list_cases(setting):
    """Return every case with its importance.

    On a GPU each place down the lists of batches and dtypes costs one, of horizons two, the
    transformer four. The control, which compiles for a minute or more, comes last.
    """
    if setting.smoke:
        grid = [
            (0, case(engine, dtype, 5, 3, kind))
            for kind in ("residual_mlp", "transformer")
            for engine, dtypes in ENGINES.items()
            for dtype in dtypes
            if setting.device.type == "cuda" or dtype in ("float32", "bfloat16")
            if setting.device.type == "cuda" or engine in ("torch", "reference")
        ]
        return [entry for entry in grid if offered(entry[1])]
    if setting.device.type == "cpu":
        return [
            (importance, case(*engine.split("-"), batch, horizon, kind))
            for importance, kind, batch, horizon, engines in CPU_CASES
            for engine in engines.split()
        ]
    scored = []
    grid = itertools.product(
        enumerate(("residual_mlp", "transformer")), enumerate(HORIZONS), enumerate(BATCHES), ENGINES
    )
    for (d, kind), (h, horizon), (b, batch), engine in grid:
        for dtype in ENGINES[engine]:
            rank = 0 if engine == "reference" else DTYPES.index(dtype)
            score = 4 * d + 2 * h + b + rank
            if engine == "compile":
                score += CONTROL
            scored.append((score, case(engine, dtype, batch, horizon, kind)))
    return [entry for entry in scored if offered(entry[1])]


def case(engine, dtype, batch, horizon, denoiser):
    """Return a test's parameters."""
    return {
        "engine": engine,
        "dtype": dtype,
        "batch": batch,
        "horizon": horizon,
        "denoiser": denoiser,
    }


def offered(case) -> bool:
    """Whether the engine computes that denoiser, and the case ends within seconds."""
    if case["denoiser"] == "transformer":
        long = case["horizon"] >= 50 and case["batch"] >= 16384
        return case["engine"] != "triton" and not long
    return True


def components_of(sizes, horizon, device, denoiser):
    """Return the parts, made once for cases that follow each other."""
    key = sizes, horizon, device, denoiser
    if key not in _components:
        _components.clear()
        _components[key] = sampler_case.build(*key)
    return _components[key]


@pytest.mark.cases(of=list_cases)
def test_sample(bench, engine, dtype, batch, horizon, denoiser):
    sizes = sampler_case.SMALL if bench.session.small else sampler_case.Sizes()
    names = {"engine": engine, "denoiser": denoiser, "batch": batch, "horizon": horizon}
    with (
        bench.case("sample", dtype, engine == "compile", **names, steps=sizes.num_steps) as case,
        torch.no_grad(),
        sampler_case.matmul_precision("float32"),
    ):
        c = components_of(sizes, horizon, bench.device, denoiser)
        torch.manual_seed(1)
        s0 = torch.randn(batch, c.observation_dim, device=bench.device)

        sample = sampler_case.TimedSampler(engine, c, dtype, s0, sizes)
        if bench.device.type == "cuda":
            case.warm_up(sample)  # before the checks, whose chains take memory
        sample.check(case)
        work = sampler_case.sample_work(c, batch, dtype)
        width = c.denoiser.hidden_dim
        after = functools.partial(sample.check_result, case)
        case.time(sample, batch, "trajectory", work, after=after, hidden_dim=width)
