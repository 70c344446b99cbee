"""One layer of the residual MLP denoiser in plain PyTorch, and the folding of its input layers."""

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


def fold_input(
    proj_weight: Tensor,
    proj_bias: Tensor,
    embeddings: Tensor,
    input_weight: Tensor,
    input_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fold input(proj(x) + embedding_k) into one Linear with one bias row per diffusion step.

    W = W_input W_proj and b_k = W_input (b_proj + embedding_k) + b_input, computed in float64.

    Args:
        proj_weight: [E, in_dim]. proj_bias: [E]. embeddings: of every step, [K, E].
        input_weight: [W, E]. input_bias: [W].

    Returns:
        Weight [W, in_dim] and bias rows [K, W], float64.
    """
    input_weight = input_weight.double()
    weight = input_weight @ proj_weight.double()
    rows = (embeddings.double() + proj_bias.double()) @ input_weight.T + input_bias.double()
    return weight, rows


def fold_normalizer(
    weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a Linear on normalized inputs that equals (weight, bias) on raw = norm scale + mean.

    Args:
        weight: [out_dim, S]. bias: [out_dim]. mean, scale: [S].

    Returns:
        Weight [out_dim, S] and bias [out_dim], float64.
    """
    weight = weight.double()
    return weight * scale.double(), bias.double() + weight @ mean.double()
