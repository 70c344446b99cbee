"""The residual MLP, its passes written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.denoisers.products import TrainedLinear
from polygrad_fast.denoisers.residual_mlp import ResidualMLPDenoiser
from polygrad_fast.denoisers.step_embedding import check_inputs


class ExplicitResidualMLP:
    """See `polygrad_fast.denoisers.explicit.ExplicitPasses`.

    The embedding of the diffusion step is evaluated once per step, not once per window, where there
    are fewer steps than windows.

    Args:
        denoiser: as its constructor made it.
        num_train_timesteps: K.
        dtype: of the products.
    """

    def __init__(self, denoiser: ResidualMLPDenoiser, num_train_timesteps: int, dtype: torch.dtype):
        self.denoiser = d = denoiser
        self._embedding = None
        if d.step_conditioning == "input":
            self._embedding = _StepEmbedding(d.step_mlp, num_train_timesteps, dtype)
            self._projection = TrainedLinear(d.proj, dtype)
        self._input = TrainedLinear(d.input, dtype)
        self._blocks = [_Block(block, dtype) for block in d.blocks]
        self._norm = _Norm(d.norm) if d.step_conditioning == "input" else None
        self._output = TrainedLinear(d.output, dtype)

    @torch.no_grad()
    def __call__(self, trajectory: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Return what `ResidualMLPDenoiser` returns."""
        check_inputs(self.denoiser, trajectory, actions, timesteps)
        x = torch.cat([trajectory, actions], dim=-1).flatten(1)
        if self._embedding is not None:
            x = self._projection.forward(x).add_(self._embedding.forward(timesteps))
        x = self._input.forward(x)
        for block in self._blocks:
            x = block.forward(x, timesteps)
        self._last = torch.relu_(self._norm.forward(x)) if self._norm else torch.relu_(x)
        self._prediction = self._output.forward(self._last)
        with torch.enable_grad():
            return self._prediction.requires_grad_().view(trajectory.shape)

    @torch.no_grad()
    def backward(self) -> None:
        """See `ExplicitPasses.backward`."""
        gradient = _through_relu(self._output.backward(self._prediction.grad), self._last)
        if self._norm:
            gradient = self._norm.backward(gradient)
        for block in reversed(self._blocks):
            gradient = block.backward(gradient)
        embedding = self._embedding
        gradient = self._input.backward(gradient, wants_input=embedding is not None)
        if embedding is not None:
            self._projection.backward(gradient, wants_input=False)
            embedding.backward(gradient)


class _Norm:
    """LayerNorm."""

    def __init__(self, norm: nn.LayerNorm):
        self._norm = norm

    def forward(self, x: Tensor) -> Tensor:
        n = self._norm
        self._x = x
        out, *self._moments = torch.native_layer_norm(
            x, n.normalized_shape, n.weight, n.bias, n.eps
        )
        return out

    def backward(self, gradient: Tensor) -> Tensor:
        n = self._norm
        gradient, weight, bias = torch.ops.aten.native_layer_norm_backward(
            gradient, self._x, n.normalized_shape, *self._moments, n.weight, n.bias, [True] * 3
        )
        n.weight.grad.copy_(weight)
        n.bias.grad.copy_(bias)
        return gradient


class _Block:
    """`ResidualBlock` or `StepConditionedBlock`."""

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        self._norm = _Norm(block.norm) if hasattr(block, "norm") else None
        self._linear = TrainedLinear(block.linear, dtype)
        self._embedding = getattr(block, "step_embedding", None)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self._active = torch.relu_(self._norm.forward(x)) if self._norm else torch.relu(x)
        x = self._linear.forward(self._active, x)
        if self._embedding is not None:
            self._timesteps = timesteps
            x += F.embedding(timesteps, self._embedding.weight)
        return x

    def backward(self, gradient: Tensor) -> Tensor:
        if self._embedding is not None:
            self._embedding.weight.grad.zero_().index_add_(0, self._timesteps, gradient)
        inner = _through_relu(self._linear.backward(gradient), self._active)
        return (self._norm.backward(inner) if self._norm else inner).add_(gradient)


class _StepEmbedding:
    """What `step_mlp` makes: features of the diffusion step -> Linear -> SiLU -> Linear."""

    def __init__(self, network: nn.Sequential, num_train_timesteps: int, dtype: torch.dtype):
        self._features, self._num_steps = network[0], num_train_timesteps
        self._first, self._second = (
            TrainedLinear(network[1], dtype),
            TrainedLinear(network[3], dtype),
        )
        self._steps = torch.arange(num_train_timesteps, device=network[1].weight.device)

    def forward(self, timesteps: Tensor) -> Tensor:
        self._timesteps = timesteps if len(timesteps) > self._num_steps else None
        steps = timesteps if self._timesteps is None else self._steps
        self._sums = self._first.forward(self._features(steps))
        rows = self._second.forward(F.silu(self._sums))
        return rows if self._timesteps is None else rows[timesteps]

    def backward(self, gradient: Tensor) -> None:
        if self._timesteps is not None:
            rows = gradient.new_zeros(self._num_steps, gradient.shape[1])
            gradient = rows.index_add_(0, self._timesteps, gradient)
        gradient = self._second.backward(gradient)
        torch.ops.aten.silu_backward.grad_input(gradient, self._sums, grad_input=gradient)
        self._first.backward(gradient, wants_input=False)


def _through_relu(gradient: Tensor, active: Tensor) -> Tensor:
    """Set the gradient of what a ReLU made 0 to 0, in place."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, active, 0, grad_input=gradient)
