"""One hidden layer of the residual MLP: kernel by tile size, plain twin, and its product alone.

    pytest benchmarks/bench_residual_mlp.py --benchmark-only --rows rows.jsonl

The kernel needs a CUDA GPU (with `--smoke` and TRITON_INTERPRET=1 the interpreter); a time is one
of `LAUNCHES` layers, on a GPU replayed as one CUDA graph.
"""

import dataclasses

import pytest
import torch

from harness.sampler_case import matmul_precision
from harness.timing import repeated
from harness.work import DTYPES, Work, tensor_bytes
from polygrad_fast.reference import residual_mlp as twin

try:
    from polygrad_fast.kernels import residual_mlp as kernel
except ImportError:  # triton
    kernel = None

LAUNCHES = 50
ALLOWED = {"float32": 1e-4, "tf32": 3e-2, "float16": 3e-2, "bfloat16": 3e-2}
SIZES = [(1024, 1024), (4096, 1024), (256, 1024), (1024, 2048), (16384, 1024), (4096, 2048)]


def list_cases(setting):
    """Return kernel tiles and baselines of every size, the paper's first."""
    on_gpu = setting.device.type == "cuda"
    precisions = ("float16", "bfloat16", "tf32", "float32") if on_gpu else ("float32",)
    sizes = SIZES if on_gpu else [(64, 1024), (256, 1024), (64, 2048)]
    implementations = ["plain", "product"]
    if setting.smoke:
        sizes, precisions = [(40, 64)], ("float32",)
    if kernel is not None and (on_gpu or (setting.smoke and kernel.is_interpreted())):
        implementations.append("tile")
    return [
        (1 + place + i, {"implementation": name, "dtype": dtype, "rows": rows, "width": width})
        for i, (rows, width) in enumerate(sizes)
        for place, dtype in enumerate(precisions)
        for kind in implementations
        for name in (tiles(dtype) if kind == "tile" else [kind])
    ]


def tiles(dtype: str) -> dict:
    """Return the shipped tiles of hidden layers by name."""
    return {
        f"tile {'x'.join(map(str, dataclasses.astuple(blocks)))}": blocks
        for blocks in kernel.LAYER_BLOCKS[dtype][:2]
    }


class Layer:
    """Operands of one hidden layer of that size."""

    def __init__(self, precision: str, rows: int, width: int, device: torch.device):
        torch.manual_seed(0)
        dtype = DTYPES[precision]
        self.precision = precision
        self.residual = torch.randn(rows, width, device=device)
        self.x = self.residual.to(dtype)
        weight = torch.randn(width, width, device=device) / width**0.5
        self.weight = weight.to(dtype)
        self.bias, self.gamma, self.beta = torch.randn(3, width, device=device)

    def fused(self, blocks):
        """Return a function that launches the kernel with that tile and returns the layer's output
        and, for the next layer, its moments and (in half precision) operand."""
        tile = kernel.PRECISIONS[self.precision].moments_tile
        moments = twin.row_moments(self.residual, tile).contiguous()
        out = torch.full_like(self.residual, torch.nan)
        is_float32 = self.x.dtype == torch.float32
        operand_out = None if is_float32 else torch.full_like(self.x, torch.nan)
        moments_out = torch.full_like(moments, torch.nan)

        def launch():
            kernel.residual_mlp_layer(
                self.x, self.weight, self.bias, out, self.precision,
                norm=(moments, self.gamma, self.beta, 1e-5), relu=True, residual=self.residual,
                operand_out=operand_out, moments_out=moments_out,
                blocks=blocks,
            )  # fmt: skip
            return (out, moments_out) if operand_out is None else (out, moments_out, operand_out)

        return launch

    def plain(self) -> torch.Tensor:
        """Return the twin's output, operands rounded to the dtype."""
        return twin.residual_mlp_layer(
            self.residual, self.weight.float(), self.bias, (self.gamma, self.beta, 1e-5),
            relu=True, residual=True, operand_dtype=self.x.dtype,
        )  # fmt: skip

    def exact(self) -> torch.Tensor:
        """Return the layer's output in float64."""
        residual, weight, bias, gamma, beta = (
            tensor.double()
            for tensor in (self.residual, self.weight, self.bias, self.gamma, self.beta)
        )
        norm = gamma, beta, 1e-5
        return twin.residual_mlp_layer(residual, weight, bias, norm, relu=True, residual=True)

    def product(self) -> torch.Tensor:
        """Return x W^T alone."""
        return torch.mm(self.x, self.weight.T)

    def work(self, implementation: str) -> Work:
        """Return the work: operand and weight in, and the result out; of a layer, whose result is
        the residual stream, the residual in too."""
        rows, width = self.residual.shape
        moved = tensor_bytes(self.x, self.weight)
        if implementation == "product":
            moved += tensor_bytes(self.x)
        else:
            moved += 2 * tensor_bytes(self.residual)
        return Work(flops=2 * rows * width**2, bytes=moved)


def output_errors(layer: Layer, results) -> dict[str, float]:
    """Return the errors of what the kernel hands to the next layer, against its own output."""
    out, moments, *operands = results
    wanted = twin.row_moments(out, kernel.PRECISIONS[layer.precision].moments_tile)
    scale = wanted.abs().amax(dim=(0, 2), keepdim=True)  # of means and of squared deviations
    errors = {"moments": ((moments - wanted).abs() / scale).max().item()}
    for operand in operands:
        errors["operand"] = (operand - out.to(operand.dtype)).abs().max().item()
    return errors


@pytest.mark.cases(of=list_cases)
def test_layer(bench, implementation, dtype, rows, width):
    names = {"implementation": implementation, "rows": rows, "width": width}
    with (
        bench.case("residual_mlp layer", dtype, **names) as case,
        torch.no_grad(),
        matmul_precision(dtype),
    ):
        layer = Layer(dtype, rows, width, bench.device)
        if implementation.startswith("tile"):
            call = layer.fused(tiles(dtype)[implementation])
            out, *_ = results = call()
            for name, error in output_errors(layer, results).items():
                case.check(
                    f"{name} for the next layer", error, {"moments": 1e-4, "operand": 0}[name]
                )
        else:
            call = getattr(layer, implementation)
            out = call()
        wanted = layer.exact()
        if implementation == "product":
            wanted = layer.x.double() @ layer.weight.double().T
        case.check("largest error", (out - wanted).abs().max(), ALLOWED[dtype])
        count = 2 if bench.session.small else LAUNCHES if bench.device.type == "cuda" else 1
        several = repeated(call, count, bench.device)
        work = layer.work(implementation)
        case.time(several, rows, "row", work, repeats=count, seconds=0.2)
