"""Linear layers of the torch engine: oneDNN with fused post-ops on a CPU, cuBLAS on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polygrad_fast.denoisers.products import onednn_offers

ACTIVATIONS = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "gelu": F.gelu,
    "silu": lambda x: F.silu(x, inplace=True),
}
ONEDNN_NAMES = {"silu": "swish"}
"""Of activations that oneDNN's operators call otherwise."""
PACKING_USES = 32
"""Products a weight must serve for packing it to pay: 1 us per 1024 numbers once, 0.04 us less in
each product, whatever the rows (measured on one thread)."""
PACKING_SIZE = 2**16
"""Numbers of the smallest weight that is packed."""


@dataclass(frozen=True)
class Weight:
    """A Linear's weight [out_dim, in_dim], and the same in oneDNN's own layout where that pays."""

    plain: Tensor
    packed: Tensor | None = None


@dataclass(frozen=True)
class LinearOps:
    """x W^T + b with an activation or a residual, on the fastest path of one device and dtype.

    PyTorch sends float32 Linears on a CPU to MKL, which on an AMD processor reaches half of what
    oneDNN does; oneDNN also adds bias, activation and residual in float32 before its only rounding.
    Each of its calls costs some 10 us more, so that float32 products below a million multiply-adds
    stay with MKL (half-precision ones go to oneDNN either way).

    Args:
        onednn: whether oneDNN's operators may be used.
        onednn_from: multiply-adds of the smallest product they are used for.
    """

    onednn: bool
    onednn_from: int = 0

    @classmethod
    def choose(cls, device: torch.device, dtype: torch.dtype) -> LinearOps:
        """Return oneDNN's path where this build and processor have it, PyTorch's own elsewhere."""
        onednn = device.type == "cpu" and onednn_offers(dtype)
        return cls(onednn, 2**20 if dtype == torch.float32 else 0)

    def pack(self, weight: Tensor, num_uses: int) -> Weight:
        """Return `weight` [out_dim, in_dim] as the products take it; a copy in oneDNN's layout, if
        any, does not follow later changes of `weight`."""
        if not self.onednn or num_uses < PACKING_USES or weight.numel() < PACKING_SIZE:
            return Weight(weight)
        return Weight(weight, torch.ops.mkldnn._reorder_linear_weight(weight))

    def _onednn_weight(self, x: Tensor, weight: Weight) -> Tensor | None:
        """Return the weight for oneDNN's operators, None where PyTorch's own are better."""
        if not self.onednn or x.shape[0] * weight.plain.numel() < self.onednn_from:
            return None
        return weight.plain if weight.packed is None else weight.packed

    def linear(
        self, x: Tensor, weight: Weight, bias: Tensor | None, activation: str = "none"
    ) -> Tensor:
        """Return activation(x W^T + b), a new tensor: [rows, in_dim] -> [rows, out_dim].

        Args:
            x: [rows, in_dim].
            weight: of `pack`, [out_dim, in_dim], of x's dtype.
            bias: [out_dim], of x's dtype.
            activation: "none", "relu", "tanh", "silu" or "gelu" (the erf form).
        """
        packed = self._onednn_weight(x, weight)
        if packed is not None:
            name = ONEDNN_NAMES.get(activation, activation)
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], "none")
        out = F.linear(x, weight.plain, bias)
        return out if activation == "none" else ACTIVATIONS[activation](out)

    def linear_add(self, x: Tensor, weight: Weight, bias: Tensor, residual: Tensor) -> Tensor:
        """Return residual + x W^T + b; `residual` [rows, out_dim] may be overwritten."""
        packed = self._onednn_weight(x, weight)
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
        return residual.add_(F.linear(x, weight.plain, bias))
