"""Time one hidden layer of the residual MLP: kernel by tile size, cuBLAS alone and the plain layer.

    pytest benchmarks/bench_residual_mlp.py --benchmark-columns=median,rounds

Needs a CUDA GPU; every kernel row is checked against the plain layer first. A round replays a CUDA
graph of `LAUNCHES` layers; `extra_info` holds the time of one in microseconds and its TFLOP/s.
"""

import pytest
import torch

from polygrad_fast.reference import residual_mlp as twin
from polygrad_fast.sampling.graphs import CapturedFunction

LAUNCHES = 50
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16}
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from polygrad_fast.kernels import residual_mlp as kernel  # noqa: E402

TILES = [(precision, index) for precision in DTYPES for index in range(2)]


class Layer:
    """Operands of one hidden layer of that size."""

    def __init__(self, precision: str, rows: int, width: int):
        torch.manual_seed(0)
        dtype, device = DTYPES[precision], "cuda"
        self.precision = precision
        self.residual = torch.randn(rows, width, device=device)
        self.x = self.residual.to(dtype)
        weight = torch.randn(width, width, device=device) / width**0.5
        self.weight = weight.to(dtype)
        self.bias, self.gamma, self.beta = torch.randn(3, width, device=device)
        tile = kernel.PRECISIONS[precision].moments_tile
        self.moments = twin.row_moments(self.residual, tile).contiguous()
        self.out = torch.empty_like(self.residual)
        self.operand_out = None if dtype == torch.float32 else torch.empty_like(self.x)
        self.moments_out = torch.empty_like(self.moments)

    def fused(self, blocks=None) -> torch.Tensor:
        return kernel.residual_mlp_layer(
            self.x, self.weight, self.bias, self.out, self.precision,
            norm=(self.moments, self.gamma, self.beta, 1e-5), relu=True, residual=self.residual,
            operand_out=self.operand_out, moments_out=self.moments_out, blocks=blocks,
        )  # fmt: skip

    def plain(self) -> torch.Tensor:
        return twin.residual_mlp_layer(
            self.residual, self.weight.float(), self.bias, (self.gamma, self.beta, 1e-5),
            relu=True, residual=True, operand_dtype=self.x.dtype,
        )  # fmt: skip

    def gemm(self) -> torch.Tensor:
        return torch.mm(self.x, self.weight.T)


def time_it(benchmark, layer: Layer, function, group: str):
    def launches(x):
        for _ in range(LAUNCHES):
            out = function()
        return (out,)

    graph = CapturedFunction(launches, (layer.x[:1],))

    def replay():
        graph.graph.replay()
        torch.cuda.synchronize()

    benchmark.group = group
    benchmark(replay)
    seconds = benchmark.stats.stats.median / LAUNCHES
    rows, width = layer.out.shape
    benchmark.extra_info["us"] = seconds * 1e6
    benchmark.extra_info["tflops"] = 2 * rows * width * width / seconds / 1e12


@pytest.fixture(autouse=True)
def allow_tf32(request):
    torch.backends.cuda.matmul.allow_tf32 = request.node.callspec.params["precision"] == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("width", [1024, 2048])
@pytest.mark.parametrize("rows", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("precision, tile", TILES)
def test_fused(benchmark, precision, tile, rows, width):
    layer = Layer(precision, rows, width)
    blocks = kernel.LAYER_BLOCKS[precision][tile]
    exact = layer.plain()
    error = (layer.fused(blocks) - exact).abs().max()
    assert error < (1e-4 if precision == "float32" else 3e-2), error
    time_it(benchmark, layer, lambda: layer.fused(blocks), f"{precision} {rows}x{width}")


@pytest.mark.parametrize("width", [1024, 2048])
@pytest.mark.parametrize("rows", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("what", ["plain", "gemm"])
def test_baseline(benchmark, what, precision, rows, width):
    layer = Layer(precision, rows, width)
    time_it(benchmark, layer, getattr(layer, what), f"{precision} {rows}x{width}")
