"""One layer of the residual MLP denoiser in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_mlp_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    relu: bool = False,
    residual: bool = False,
    operand_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return f(x) W^T + b (+ x), f being LayerNorm and ReLU, either or none.

    Args:
        x: [rows, in_dim]. weight: [out_dim, in_dim]. bias: [out_dim].
        norm: (gamma [in_dim], beta [in_dim], eps); None: no LayerNorm.
        relu: apply ReLU (after the LayerNorm). residual: add x.
        operand_dtype: round the GEMM's operands and result to this dtype, as autocast would.
    """
    a = x
    if norm is not None:
        gamma, beta, eps = norm
        a = F.layer_norm(a, a.shape[-1:], gamma, beta, eps)
    if relu:
        a = torch.relu(a)
    if operand_dtype is None:
        out = F.linear(a, weight, bias)
    else:
        operands = (tensor.to(operand_dtype) for tensor in (a, weight, bias))
        out = F.linear(*operands).to(x.dtype)
    return x + out if residual else out


def row_moments(x: Tensor, tile: int) -> Tensor:
    """Return mean and sum of squared deviations of every `tile` columns: [rows, dim] ->
    [tiles, 2, rows]."""
    parts = x.split(tile, dim=-1)
    means = torch.stack([part.mean(-1) for part in parts])
    squares = torch.stack([(part - part.mean(-1, keepdim=True)).square().sum(-1) for part in parts])
    return torch.stack([means, squares], dim=1)
