"""The kernel of folded and cast weights against its twin in float64."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from polygrad_fast.kernels.refresh import Task, refresh, refresh_table  # noqa: E402
from polygrad_fast.reference.refresh import refresh as twin  # noqa: E402

DTYPES = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)]


def normal(device, *shape):
    return torch.randn(shape).to(device)


def make_tasks(device, rows=130, columns=70, inner=45, dtype=torch.float32):
    """Every operation, with and without what it may take."""
    torch.manual_seed(0)

    def out(*shape):
        # a margin of columns, which stays as it is
        return torch.full((shape[0], shape[1] + 3), torch.nan, dtype=dtype, device=device)

    def vector(*shape):
        return normal(device, *shape)

    def task(operation, rows=rows, **arguments):
        margin = out(rows, columns)
        return Task(operation, margin[:, :columns], **arguments), margin

    steps = torch.randint(128, (rows,), device=device)
    transposed = vector(columns, inner).t()
    embedded = dict(
        right=transposed,
        steps=steps,
        frequencies=vector(8),
        first=vector(inner, 17) / 4,
        first_bias=vector(inner),
    )
    return [
        task("copy", left=vector(rows, columns)),
        task("copy", left=vector(1, columns).expand(rows, -1), bias=vector(columns)),
        task("copy", left=vector(128, columns), steps=steps, bias=vector(columns)),
        task("copy", left=vector(rows, columns), scale=vector(columns)),
        task("exp", left=vector(rows, columns), number=0.125),
        task("offset", rows=1, left=vector(columns, inner), right=vector(inner, 1)),
        task(
            "offset",
            rows=1,
            left=vector(columns, inner),
            right=vector(inner, 1),
            bias=vector(columns),
        ),
        task("product", left=vector(rows, inner), right=vector(inner, columns)),
        task("product", left=vector(rows, inner), right=transposed, bias=vector(columns)),
        task("embedding", **embedded, bias=vector(columns), second_bias=vector(columns)),
    ]


def expected(task, dtype):
    """What the twin computes in a dtype; features are in float32 in any."""
    arguments = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    for name in ("out", "round_tf32"):
        del arguments[name]
    kept = "steps", "frequencies"
    return twin(
        **{
            k: v.to(dtype) if torch.is_tensor(v) and k not in kept else v
            for k, v in arguments.items()
        }
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, inner", [(130, 70, 45), (1, 1, 1), (64, 64, 32)])
def test_every_operation(device, rows, columns, inner, dtype):
    """In one launch; the error is at most twice that of plain PyTorch in float32, rounded to the
    dtype, and memory beside the results is left alone."""
    tasks = make_tasks(device, rows, columns, inner, getattr(torch, dtype))
    refresh(refresh_table([task for task, _ in tasks], torch.device(device)))
    for task, margin in tasks:
        exact = expected(task, torch.float64)
        plain = expected(task, torch.float32).to(task.out.dtype).double()
        error, allowed = (task.out.double() - exact).abs(), (plain - exact).abs()
        floor = 2e-6 * exact.abs().max()
        assert error.max() <= 2 * allowed.max() + floor, task.operation
        assert margin[:, columns:].isnan().all()


def test_offsets_lose_no_digits(device):
    """Moments that dwarf their spread: the terms cancel, and what is left is exact."""
    left, bias = normal(device, 70, 40), normal(device, 70)
    right = 1e6 * normal(device, 40, 1)
    left[:, 1::2], right[1::2] = left[:, ::2], -right[::2] + 1e-3
    task = Task("offset", torch.empty(1, 70, device=device), left, right, bias=bias)
    refresh(refresh_table([task], torch.device(device)))
    wanted = expected(task, torch.float64)
    torch.testing.assert_close(task.out.double(), wanted, rtol=1e-6, atol=1e-7)


def test_long_products(device):
    """Of 5000 terms, the paper's largest horizon: the error is that of plain float32 products."""
    left, right = normal(device, 40, 5000), normal(device, 5000, 30)
    task = Task("product", torch.empty(40, 30, device=device), left, right)
    refresh(refresh_table([task], torch.device(device)))
    exact = expected(task, torch.float64)
    error = (task.out.double() - exact).square().mean().sqrt()
    assert error <= 2 * (expected(task, torch.float32).double() - exact).square().mean().sqrt()
    assert error <= 2e-7 * exact.square().mean().sqrt() * 5


def test_tf32_is_the_nearest_ten_bits(device):
    """Ties away from zero; a NaN stays one."""
    source = normal(device, 3, 50)
    source[0, 0], source[0, 1] = torch.nan, 1 + 2**-11
    source.view(torch.int32)[0, 2] = 0x7FFFFFFF  # the NaN of CUDA, whose bits would overflow
    task = Task("copy", torch.empty(3, 50, device=device), source, round_tf32=True)
    refresh(refresh_table([task], torch.device(device)))
    assert torch.equal(task.out.isnan(), source.isnan())
    out, wanted = task.out.nan_to_num(), source.nan_to_num()
    assert (out.view(torch.int32) & 0x1FFF == 0).all()
    assert ((out - wanted).abs() <= wanted.abs() * 2**-11).all()
    assert out[0, 1] == 1 + 2**-10


def test_tables_are_read_anew(device):
    """A second launch of the same table sees weights that were changed in place."""
    task = Task("copy", torch.empty(2, 3, device=device), normal(device, 2, 3))
    table = refresh_table([task], torch.device(device))
    refresh(table)
    task.left.mul_(2)
    refresh(table)
    assert torch.equal(task.out, task.left)


def test_rows_that_are_not_contiguous_are_refused(device):
    task = Task("copy", torch.empty(2, 3, device=device), normal(device, 3, 2).t())
    with pytest.raises(ValueError, match=r"rows must be contiguous, got strides \(1, 2\)"):
        refresh_table([task], torch.device(device))
