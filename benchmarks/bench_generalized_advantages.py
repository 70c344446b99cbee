"""Generalized advantages: the kernel, the learners' scan, and the plain twin step by step.

    pytest benchmarks/bench_generalized_advantages.py --benchmark-only --rows rows.jsonl

The kernel needs a CUDA GPU (with `--smoke` and TRITON_INTERPRET=1 the interpreter).
"""

import functools

import pytest
import torch

from harness.timing import repeated
from harness.work import Work, tensor_bytes
from polygrad_fast.learners import advantages as learners
from polygrad_fast.reference.generalized_advantages import generalized_advantages as twin

try:
    from polygrad_fast.kernels.generalized_advantages import generalized_advantages as kernel
    from polygrad_fast.kernels.precision import is_interpreted
except ImportError:  # triton
    kernel = None

LAUNCHES = 50
ALLOWED = 1e-5
SIZES = [(1024, 10), (256, 10), (1024, 50), (16384, 10)]
IMPLEMENTATIONS = {"plain": twin, "scan": learners.doubling_scan, "kernel": kernel}


def list_cases(setting):
    """Return implementations for every size, the paper's first."""
    on_gpu = setting.device.type == "cuda"
    names = ["plain", "scan"]
    if kernel is not None and (on_gpu or (setting.smoke and is_interpreted())):
        names.append("kernel")
    sizes = [(3, 4)] if setting.smoke else SIZES
    return [
        (1 + i, {"implementation": name, "batch": batch, "horizon": horizon})
        for i, (batch, horizon) in enumerate(sizes)
        for name in names
    ]


@pytest.mark.cases(of=list_cases)
def test_advantages(bench, implementation, batch, horizon):
    names = {"implementation": implementation, "batch": batch, "horizon": horizon}
    with bench.case("generalized_advantages", "float32", **names) as case, torch.no_grad():
        torch.manual_seed(0)
        rewards, values = torch.randn(2, batch, horizon, device=bench.device)
        terminals = (torch.rand(batch, horizon, device=bench.device) < 0.05).float()
        tensors = (rewards, values, terminals)
        compute = IMPLEMENTATIONS[implementation]
        got = compute(*tensors, 0.99, 0.9)
        exact = twin(*(tensor.double() for tensor in tensors), 0.99, 0.9)
        error = (got - exact).abs().max() / exact.abs().max()
        case.check("largest error", error.item(), ALLOWED)
        count = 2 if bench.session.small else LAUNCHES if bench.device.type == "cuda" else 1
        call = repeated(functools.partial(compute, *tensors, 0.99, 0.9), count, bench.device)
        work = Work(6 * batch * (horizon - 1), tensor_bytes(*tensors, got))
        case.time(call, batch, "trajectory", work, repeats=count, seconds=0.2)
