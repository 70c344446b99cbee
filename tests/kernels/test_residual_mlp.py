"""The residual MLP layer's kernel against its twin in float64."""

import pytest
import torch

pytest.importorskip("triton")

from polygrad_fast.kernels.precision import PRECISIONS  # noqa: E402
from polygrad_fast.kernels.residual_mlp import (  # noqa: E402
    LAYER_BLOCKS,
    layer_blocks,
    moments_shape,
    residual_mlp_layer,
)
from polygrad_fast.reference import residual_mlp as twin  # noqa: E402

# The interpreter multiplies bfloat16 wrongly and has no tf32 rounding.
INTERPRETED = ["float32", "float16"]
PRECISION = [
    pytest.param(name, marks=() if name in INTERPRETED else pytest.mark.gpu) for name in PRECISIONS
]
LAYERS = {
    "input": dict(norm=False, relu=False, residual=False, moments=True),
    "hidden": dict(norm=True, relu=True, residual=True, moments=True),
    "output": dict(norm=True, relu=True, residual=False, moments=False),
    "hidden of the paper": dict(norm=False, relu=True, residual=True, moments=True),
}


def rounded(tensor, precision):
    """What a tensor core reads of float32 in tf32: ten bits of mantissa."""
    if precision != "tf32":
        return tensor.to(PRECISIONS[precision].dtype).float()
    bits = tensor.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def run_layer(device, precision, layer, rows, in_dim, out_dim, seed=0, offset=0.0, blocks=None):
    """Return kernel, float64 twin and same-dtype twin results, and the kernel's moments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    spec = LAYERS[layer]
    dtype, tile = PRECISIONS[precision].dtype, PRECISIONS[precision].moments_tile
    padded = -(-in_dim // 16) * 16
    x = (normal(rows, in_dim) * 2 + offset).to(dtype).float()
    weight = torch.zeros(out_dim, padded, device=device)[:, :in_dim]
    weight.copy_(normal(out_dim, in_dim) / in_dim**0.5)
    bias, gamma, beta = normal(out_dim), 1 + 0.1 * normal(in_dim), 0.1 * normal(in_dim)
    out = torch.full((rows, out_dim), torch.nan, device=device)
    moments_out = None
    if spec["moments"]:
        moments_out = torch.full(moments_shape(precision, rows, out_dim), torch.nan, device=device)
    kernel_norm = twin_norm = None
    if spec["norm"]:
        kernel_norm = (twin.row_moments(x, tile).contiguous(), gamma, beta, 1e-5)
        twin_norm = (gamma, beta, 1e-5)
    storage = torch.zeros(out_dim, padded, device=device, dtype=dtype)[:, :in_dim]
    operand_out = torch.full((rows, out_dim), torch.nan, device=device, dtype=dtype)
    residual_mlp_layer(
        x.to(dtype),
        storage.copy_(rounded(weight.contiguous(), precision)),
        bias,
        out,
        precision,
        norm=kernel_norm,
        relu=spec["relu"],
        residual=x if spec["residual"] else None,
        operand_out=operand_out,
        moments_out=moments_out,
        blocks=blocks,
    )
    assert torch.equal(operand_out, out.to(dtype))
    options = dict(relu=spec["relu"], residual=spec["residual"])
    doubled = twin_norm and (gamma.double(), beta.double(), 1e-5)
    exact = twin.residual_mlp_layer(
        x.double(), weight.double(), bias.double(), norm=doubled, **options
    )
    if precision == "tf32":
        a = twin.residual_mlp_layer(x, torch.eye(in_dim, device=device), torch.zeros_like(beta),
                                    norm=twin_norm, relu=spec["relu"])  # fmt: skip
        plain = rounded(a, precision) @ rounded(weight.contiguous(), precision).T + bias
        plain = plain + x if spec["residual"] else plain
    else:
        plain = twin.residual_mlp_layer(
            x, weight, bias, norm=twin_norm, operand_dtype=dtype, **options
        )
    return out, exact, plain, moments_out


def assert_earned(out, exact, plain, floor):
    """The error is at most twice that of plain PyTorch in the same dtype, plus a small floor."""
    error = (out.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rows, in_dim, out_dim", [(1, 33, 33), (7, 250, 190), (33, 160, 160)])
def test_layer(device, precision, layer, rows, in_dim, out_dim):
    if LAYERS[layer]["residual"]:
        out_dim = in_dim
    out, exact, plain, moments = run_layer(device, precision, layer, rows, in_dim, out_dim)
    assert_earned(out, exact, plain, floor=1e-6 * exact.abs().max().item())
    if moments is not None:
        wanted = twin.row_moments(out, PRECISIONS[precision].moments_tile)
        assert torch.allclose(moments, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("which", ["few rows", "many rows", "narrow"])
def test_every_shipped_tile(device, precision, which):
    blocks = LAYER_BLOCKS[precision][["few rows", "many rows", "narrow"].index(which)]
    layer = "output" if which == "narrow" else "hidden"
    shape = (blocks.block_m + 3, 96, 96)
    out, exact, plain, _ = run_layer(device, precision, layer, *shape, blocks=blocks)
    assert_earned(out, exact, plain, floor=1e-6 * exact.abs().max().item())


def test_moments_of_rows_far_from_zero(device):
    """Chan's merge keeps its digits where sum and sum of squares would lose them."""
    out, exact, plain, _ = run_layer(device, "float32", "hidden", 5, 200, 200, offset=1000.0)
    assert_earned(out, exact, plain, floor=1e-4)


def test_nan_and_saturation(device):
    """NaN in a row stays in that row; float16 operands saturate."""
    x = torch.ones(3, 16, device=device, dtype=torch.float16)
    x[1, 2], x[2, 0] = torch.nan, 60000
    weight = 2 * torch.eye(16, device=device, dtype=torch.float16)
    bias, out = torch.zeros(16, device=device), torch.empty(3, 16, device=device)
    operand_out = torch.empty(3, 16, device=device, dtype=torch.float16)
    residual_mlp_layer(x, weight, bias, out, "float16", relu=True, operand_out=operand_out)
    assert out[0, 0] == 2 and out[2, 0] == 120000 and operand_out[2, 0] == 65504
    assert out[1, 2].isnan() and operand_out[1, 2].isnan()
    assert torch.isfinite(out[[0, 2]]).all() and torch.isfinite(operand_out[[0, 2]]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_block_sizes_fit_the_moments(precision):
    for rows in (1, 1024, 4096):
        blocks = layer_blocks(precision, rows, 1024, writes_moments=True)
        assert blocks.block_n == PRECISIONS[precision].moments_tile


@pytest.mark.parametrize("precision", PRECISIONS)
def test_output_tiles_occupy_the_device(precision):
    """Narrow tiles for few rows and columns, wide ones where those fill a wave, the largest where
    these do."""
    few, many, narrow = LAYER_BLOCKS[precision]
    for rows, out_dim, wanted in (
        (1, 190, narrow), (1024, 190, narrow), (16384, 190, many), (1024, 3800, many),
        (8192, 3800, many),
    ):  # fmt: skip
        assert layer_blocks(precision, rows, out_dim, writes_moments=False) == wanted


@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_large_tiles_occupy_the_device(precision):
    few, many, _ = LAYER_BLOCKS[precision]
    for rows, width, moments, wanted in (
        (1024, 1024, True, few), (2048, 1024, True, many), (1024, 2048, True, many),
        (2048, 512, True, few), (16384, 512, True, many), (384, 3800, False, few),
    ):  # fmt: skip
        assert layer_blocks(precision, rows, width, writes_moments=moments) == wanted
