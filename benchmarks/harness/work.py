"""Work counts, and the measured ceilings that make a floor of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.timing import clock_of, interleaved, repeated
from polygrad_fast.sampling.linear import LinearOps

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
MIB = 2**20
MIN_BYTES, MAX_BYTES = MIB, 256 * MIB
GPU_COPIES_BYTES, CPU_COPIES_BYTES = 4096 * MIB, 64 * MIB  # of the copies timed together


@dataclass(frozen=True)
class Work:
    """What one operation does at least.

    Attributes:
        flops: floating-point operations of its matrix products; None: not counted.
        bytes: distinct bytes read and written, each once: what moves with perfect caches.
    """

    flops: float | None = None
    bytes: float | None = None


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Return the bytes that the tensors hold."""
    return sum(t.numel() * t.element_size() for t in tensors)


def parameter_bytes(*modules: torch.nn.Module) -> int:
    """Return the bytes of the modules' parameters."""
    return sum(tensor_bytes(*module.parameters()) for module in modules)


class Ceilings:
    """What the machine reaches, measured once each: the ceilings that floors are made of.

    TFLOP/s of a product of square random matrices (8192 on a GPU, 1024 on a CPU); GB/s, bytes read
    and written, of a copy of about as many bytes as the operation's, so that what fits a cache is
    held against the cache.
    """

    def __init__(self, device: torch.device, small: bool = False):
        self._device, self._small = device, small
        self._tflops: dict[str, float | None] = {}
        self._gb_per_s: dict[int, float] = {}

    def tflops(self, dtype: str) -> float | None:
        """Return the TFLOP/s of matrix products in that dtype; None if there are none."""
        if dtype not in self._tflops:
            self._tflops[dtype] = self._measure_products(dtype)
        return self._tflops[dtype]

    def gb_per_s(self, num_bytes: float) -> float:
        """Return the GB/s of a copy that reads and writes about that many bytes, in all."""
        size = min(max(num_bytes, MIN_BYTES), MIN_BYTES if self._small else MAX_BYTES)
        size = 2 ** round(math.log2(size))
        if size not in self._gb_per_s:
            source = torch.ones(size // 2, dtype=torch.uint8, device=self._device)
            target = torch.empty_like(source)
            on_gpu = self._device.type == "cuda"  # else a graph's start would be most of its time
            count = (
                max(16, GPU_COPIES_BYTES // size) if on_gpu else max(1, CPU_COPIES_BYTES // size)
            )
            ms = self._fastest({"copy": lambda: target.copy_(source)}, count)
            self._gb_per_s[size] = size / ms / 1e6
        return self._gb_per_s[size]

    def floor_ms(self, work: Work, dtype: str) -> float | None:
        """Return the least milliseconds for that work; None if it is not counted."""
        return max((ms for ms in self.floors_ms(work, dtype).values() if ms), default=None)

    def floors_ms(self, work: Work, dtype: str) -> dict[str, float | None]:
        """Return the least milliseconds for the "products" and for the "copy" of that work's bytes;
        None where not counted."""
        floors = dict.fromkeys(("products", "copy"))
        if work.flops and self.tflops(dtype):
            floors["products"] = work.flops / self.tflops(dtype) / 1e9
        if work.bytes:
            floors["copy"] = work.bytes / self.gb_per_s(work.bytes) / 1e6
        return floors

    def forget(self) -> None:
        """Measure anew when next asked."""
        self._tflops.clear()
        self._gb_per_s.clear()

    def _measure_products(self, dtype: str) -> float | None:
        torch_dtype = DTYPES.get(dtype)
        if torch_dtype is None:
            return None
        size = 64 if self._small else 8192 if self._device.type == "cuda" else 1024
        a, b = (torch.randn(size, size, device=self._device).to(torch_dtype) for _ in range(2))
        ops = LinearOps.choose(self._device, torch_dtype)
        packed = ops.pack(b, num_uses=1000)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        try:
            ms = self._fastest(
                {"mm": lambda: a @ b, "linear": lambda: ops.linear(a, packed, None)}, 1
            )
        finally:
            torch.set_float32_matmul_precision(before)
        return 2 * size**3 / ms / 1e9

    def _fastest(self, calls, count: int) -> float:
        """Return the milliseconds of the fastest call."""
        several = {k: repeated(call, count, self._device) for k, call in calls.items()}
        for call in several.values():  # the first call touches new memory
            call()
        times = interleaved(several, clock_of(self._device), 0.1, min_rounds=5)
        return min(min(ms) for ms in times.values()) / count
