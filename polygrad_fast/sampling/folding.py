"""Neighbouring Linears of this library's networks folded into one, and which networks may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.denoisers import (
    ResidualMLPDenoiser,
    RolloutDenoiser,
    TemporalUNet,
    TransformerDenoiser,
)
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.structure import change, parts


@dataclass(frozen=True)
class FoldedLayer:
    """One layer of the residual MLP: x + W ReLU(LayerNorm(x)) + b, or without the LayerNorm."""

    norm: nn.LayerNorm | None
    weight: Tensor  # [W, W]
    rows: Tensor  # its bias in every diffusion step, [K, W], or [1, W] where all are the same


@dataclass(frozen=True)
class FoldedMLP:
    """A residual MLP whose diffusion step is part of its biases."""

    input_weight: Tensor  # [W, H (D + A)]
    input_rows: Tensor  # its bias in every diffusion step, [K, W]
    layers: list[FoldedLayer]
    norm: nn.LayerNorm | None  # before the output
    output: nn.Linear


def fold_residual_mlp(denoiser: ResidualMLPDenoiser, timesteps: Tensor) -> FoldedMLP:
    """Fold a residual MLP's current input Linears and step embedding, in the weights' dtype.

    With step_conditioning "input" the network begins with input(proj(x) + embedding_k). That is one
    Linear with W = W_input W_proj and b_k = W_input (b_proj + embedding_k) + b_input. With "layer"
    every layer's bias takes its embedding of the step.

    Args:
        timesteps: the K steps to embed, int64 [K].
    """
    d = denoiser
    if d.step_conditioning == "layer":
        layers = [
            FoldedLayer(None, b.linear.weight, b.linear.bias + b.step_embedding(timesteps))
            for b in d.blocks
        ]
        rows = d.input.bias.expand(len(timesteps), -1)
        return FoldedMLP(d.input.weight, rows, layers, None, d.output)
    weight = d.input.weight @ d.proj.weight
    rows = F.linear(d.proj.bias + d.step_mlp(timesteps), d.input.weight, d.input.bias)
    layers = [FoldedLayer(b.norm, b.linear.weight, b.linear.bias[None]) for b in d.blocks]
    return FoldedMLP(weight, rows, layers, d.norm, d.output)


def fold_policy_input(policy: GaussianPolicy, normalizer: Normalizer) -> tuple[Tensor, Tensor]:
    """Return weight [P, S] and bias [P] of the policy's first Linear on normalized observations.

    A policy on raw observations s = s_norm scale + mean gets W diag(scale) and b + W mean, in
    float64: means that dwarf their spread cost no digits. A policy on normalized ones has its own.
    """
    first = policy.network[0]
    if policy.normed_inputs:
        return first.weight, first.bias
    weight = first.weight.double()
    mean = normalizer.observations_mean.double()
    return weight * normalizer.observations_scale.double(), first.bias.double() + weight @ mean


_FORWARDS = {
    kind: kind.forward
    for kind in (
        ResidualMLPDenoiser,
        RolloutDenoiser,
        TransformerDenoiser,
        TemporalUNet,
        GaussianPolicy,
    )
}


def why_foreign(module, differentiated: bool = False) -> str | None:
    """Return why a denoiser or policy is to be called as it is, for instance "is a Foo" or "has a
    forward hook in blocks.0", or None where it can be folded.

    Only what its constructor made of exactly that type can: a subclass, a hook, a parametrization
    or a replaced part may compute something else with the same weights.

    Args:
        differentiated: whether its gradient is followed, which runs backward hooks too.
    """
    kind = type(module)
    if kind not in _FORWARDS:
        return f"is a {kind.__name__}"
    if kind.forward is not _FORWARDS[kind]:
        return f"is a {kind.__name__} with another forward"
    found = change(module, module.built)
    if found is None and differentiated:
        if any(part._backward_hooks or part._backward_pre_hooks for part in parts(module)):
            found = "has a backward hook"
    return found
