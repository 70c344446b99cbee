"""The matrix products of training: x W^T + b and its gradients, on the fastest path of a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ONEDNN_FROM = 2**24
"""Multiply-adds of the smallest float32 product that oneDNN is better at than MKL, without weights
in its own layout: 256 x 250 x 256 (one thread of an AMD EPYC of family 25 with AVX-512)."""


def onednn_trains(dtype: torch.dtype) -> bool:
    """Return whether large products of training are oneDNN's on this processor.

    With AVX2 alone MKL is as fast forwards and faster backwards, where oneDNN transposes: an update
    of the default denoiser took 167 ms by MKL, 193 by oneDNN (an AMD EPYC of family 25).
    """
    widest = torch.backends.cpu.get_cpu_capability()
    return dtype == torch.float32 and widest == "AVX512" and onednn_offers(dtype)


def onednn_offers(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's Linears can be called with tensors of a dtype on this processor.

    The operators are PyTorch's own, but private: another version may lack or change them.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.ones(1, 1, dtype=dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        ones = torch.ops.mkldnn._linear_pointwise(weight, weight, None, "tanh", [], "none")
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        twos = torch.ops.mkldnn._linear_pointwise.binary(weight, weight, packed, None, "add")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((ones > 0.7).all() and (twos == 2).all())


class TrainedLinear:
    """A Linear whose products in both directions are called by hand: [rows, I] -> [rows, O].

    PyTorch sends float32 products on a CPU to MKL, which on an AMD processor with AVX-512 is slower
    than oneDNN, by a tenth to a half; large ones go to oneDNN there.

    Args:
        linear: its weights are read at every call, and its gradients written, not added to: `grad`
            of weight and bias must be there.
        dtype: of the products; where it is not the weights', weights and inputs are rounded to it,
            and everything else stays as it is.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        self.linear, self.dtype = linear, dtype
        weight = linear.weight
        self._rounds = dtype != weight.dtype
        self._onednn = weight.device.type == "cpu" and onednn_trains(dtype)
        if self._rounds:
            self._low_weight = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            self._low_bias = torch.empty_like(linear.bias, dtype=dtype, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return x W^T + b, plus the residual [rows, O] if there is one; keep x for `backward`.

        Args:
            x: [rows, I], of the weights' dtype; not to be changed before `backward`.
        """
        weight, bias = self.linear.weight.detach(), self.linear.bias.detach()
        if self._rounds:
            x = x.to(self.dtype)
            weight, bias = self._low_weight.copy_(weight), self._low_bias.copy_(bias)
        self._x = x
        if self._takes_onednn(x):
            operator = torch.ops.mkldnn._linear_pointwise
            if residual is not None:
                return operator.binary(x, residual, weight, bias, "add")
            return operator(x, weight, bias, "none", [], "none")
        out = torch.addmm(bias, x, weight.t())
        if residual is not None:
            return residual + out
        return out.to(self.linear.weight.dtype)

    def backward(self, gradient: Tensor, wants_input: bool = True) -> Tensor | None:
        """Write the gradients of weight and bias; return that of x [rows, I], if it is wanted.

        Args:
            gradient: of the loss by the result [rows, O], of the weights' dtype.
        """
        linear, x = self.linear, self._x
        torch.sum(gradient, 0, out=linear.bias.grad)
        weight = linear.weight.detach()
        if self._rounds:
            gradient, weight = gradient.to(self.dtype), self._low_weight
            linear.weight.grad.copy_(gradient.t().mm(x))
            return gradient.mm(weight).to(linear.weight.dtype) if wants_input else None
        if self._takes_onednn(x):
            product = torch.ops.mkldnn._linear_pointwise
            linear.weight.grad.copy_(product(gradient.t(), x.t(), None, "none", [], "none"))
            if wants_input:
                return product(gradient, weight.t(), None, "none", [], "none")
            return None
        torch.mm(gradient.t(), x, out=linear.weight.grad)
        return gradient.mm(weight) if wants_input else None

    def _takes_onednn(self, x: Tensor) -> bool:
        return self._onednn and x.shape[0] * self.linear.weight.numel() >= ONEDNN_FROM
