"""The guards around interpreted kernels notice what a GPU would not forgive."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, read, written, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + read, mask=at < size, other=0.0)
    tl.store(out_ptr + at + written, x, mask=at < size)


@triton.jit
def _last_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))


def copied(read=0, written=0, dtype=torch.float32):
    x, out = torch.arange(10.0).to(dtype), torch.zeros(10, dtype=dtype)
    _copy_kernel[(3,)](x, out, 10, read, written, BLOCK=4)
    return x, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_correct_kernels_are_left_alone(dtype):
    x, out = copied(dtype=dtype)
    assert torch.equal(out, x)


def test_views_stay_views():
    memory = torch.zeros(2, 10)
    _copy_kernel[(3,)](torch.ones(10), memory[1], 10, 0, 0, BLOCK=4)
    assert torch.equal(memory, torch.tensor([[0.0], [1.0]]).expand(2, 10))


@pytest.mark.parametrize("read, at", [(1, -1), (-1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reading_beyond_gives_nan(read, at, dtype):
    assert copied(read=read, dtype=dtype)[1][at].isnan()


@pytest.mark.parametrize("written, where", [(1, "after"), (-1, "before")])
def test_writing_beyond_raises(written, where):
    with pytest.raises(IndexError, match=f"_copy_kernel wrote {where} a tensor of 40 bytes"):
        copied(written=written)


def test_programs_run_in_any_order():
    last = set()
    for _ in range(8):
        out = torch.zeros(4)
        _last_kernel[(5,)](out, BLOCK=4)
        last.add(out[0].item())
    assert len(last) > 1
