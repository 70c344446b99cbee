"""Forward and backward passes of `policy.mlp` written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG2_E = math.log2(math.e)
BLOCK_SIZE = 2**18
"""Numbers in the largest block of one layer's activations. Measured with one thread, two layers of
width 256 and 64: smaller blocks cost more calls and smaller products than the cache saves."""

Differentiate = Callable[[Tensor, slice], Tensor]
"""Gets the outputs [O, R] of a block and its rows; returns the loss's gradient in them [O, R]."""


class ExplicitMLP:
    """The passes of num_layers x [Linear, LayerNorm, ELU] and a Linear, as `policy.mlp` makes them,
    a block of rows at a time: for a CPU.

    What autograd does in passes over all rows, which do not fit into the cache, is done for one
    block of rows after another. ELU(y) = max(y, 0) + exp(min(y, 0)) - 1, and its slope is
    s = exp(min(y, 0)). PyTorch's exp2 takes a third of its exp, so y' = (y - 1) log2 e is what
    LayerNorm returns, with its gain and bias changed; then

        s / e          = 2^max'(y'),    max'(y') = min(y', -log2 e)
        ELU(y) log2 e  = max(y', -log2 e) + (e log2 e) s / e

    The factor log2 e is taken out of the next layer's weight, e put into LayerNorm's gain.

    Outputs lie output by output, [O, N]: they are few, and PyTorch is slow where the last axis is
    short. All of it is without autograd, and not for several threads of Python at a time.

    Args:
        network: of `policy.mlp`; it gives shapes, dtype and device.

    Attributes:
        gradients: of the parameters in their order, overwritten by each `backpropagate`.
    """

    def __init__(self, network: nn.Sequential):
        self._norms: list[nn.LayerNorm] = [m for m in network if isinstance(m, nn.LayerNorm)]
        self._widths = [m.out_features for m in network if isinstance(m, nn.Linear)]
        parameters = [p.detach() for p in network.parameters()]
        sizes = [p.numel() for p in parameters]
        self._flat = torch.cat([p.flatten() for p in parameters])
        parts = self._flat.split(sizes)
        self.gradients = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        self._parameters, self._scaled = parameters, [torch.empty_like(p) for p in parameters]
        self._gains = [torch.empty_like(norm.weight.detach()) for norm in self._norms]
        self._blocks: list[tuple[Tensor, Tensor, Tensor]] = []

    def fits(self, network: nn.Sequential) -> bool:
        """Whether a network of these shapes has this dtype on this device."""
        weight = network[0].weight
        return (weight.dtype, weight.device) == (self._flat.dtype, self._flat.device)

    @torch.no_grad()
    def read(self, parameters: Sequence[Tensor]) -> None:
        """Compute with these parameters, in the network's order, from now on; where they change
        they must be read again."""
        self._parameters = [p.detach() for p in parameters]
        for i, back in enumerate(self._gains):
            gain, bias = self._parameters[4 * i + 2 : 4 * i + 4]
            torch.mul(gain, LOG2_E, out=self._scaled[4 * i + 2])
            torch.mul(bias, LOG2_E, out=self._scaled[4 * i + 3]).sub_(LOG2_E)
            torch.mul(gain, math.e, out=back)
            following = 4 * i + 4
            torch.mul(self._parameters[following], 1.0 / LOG2_E, out=self._scaled[following])

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the outputs [O, N] at inputs [N, I]."""
        results = inputs.new_empty(self._widths[-1], len(inputs))
        for rows in self._rows(len(inputs)):
            results[:, rows], _ = self._forward(inputs[rows])
        return results

    @torch.no_grad()
    def backpropagate(self, inputs: Tensor, differentiate: Differentiate) -> None:
        """Set `gradients` to those of a loss at inputs [N, I]."""
        self._flat.zero_()
        for rows in self._rows(len(inputs)):
            outputs, hidden = self._forward(inputs[rows])
            self._backward(inputs[rows], hidden, differentiate(outputs, rows))
        for i in range(len(self._norms)):
            torch._foreach_mul_(self.gradients[4 * i + 2 : 4 * i + 4], math.e)

    def _rows(self, count: int) -> Iterator[slice]:
        """Yield the rows of blocks of equal size; make room for their activations."""
        num_blocks = max(1, math.ceil(count * max(self._widths) / BLOCK_SIZE))
        size = math.ceil(count / num_blocks)
        if not self._blocks or len(self._blocks[0][0]) < size:
            self._blocks = [
                self._flat.new_empty(3, size, width).unbind() for width in self._widths[:-1]
            ]  # of each layer: before LayerNorm, slopes, and gradients
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def _forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return a block's outputs [O, R], and of each layer the activations, times log2 e, and the
        mean and 1 / std of its LayerNorm."""
        hidden = []
        weight = self._parameters[0]
        for i, (norm, (before, slopes, _)) in enumerate(
            zip(self._norms, self._blocks, strict=True)
        ):
            before, slopes = before[: len(x)], slopes[: len(x)]
            torch.addmm(self._parameters[4 * i + 1], x, weight.t(), out=before)
            gain, bias, weight = self._scaled[4 * i + 2 : 4 * i + 5]
            x, mean, rstd = torch.native_layer_norm(
                before, norm.normalized_shape, gain, bias, norm.eps
            )
            torch.clamp_max(x, -LOG2_E, out=slopes).exp2_()
            x.clamp_min_(-LOG2_E).add_(slopes, alpha=math.e * LOG2_E)
            hidden.append((x, mean, rstd))
        return torch.addmm(self._parameters[-1].unsqueeze(1), weight, x.t()), hidden

    def _backward(
        self, inputs: Tensor, hidden: list[tuple[Tensor, Tensor, Tensor]], gradient: Tensor
    ) -> None:
        """Add a block's part to `gradients`, from the gradient in its outputs [O, R]."""
        for i in reversed(range(len(self._widths))):
            weight, bias = self.gradients[4 * i : 4 * i + 2]
            bias.add_(gradient.sum(1))
            if i == 0:
                weight.addmm_(gradient, inputs)
                return
            x, mean, rstd = hidden[i - 1]
            weight.addmm_(gradient, x, alpha=1.0 / LOG2_E)
            before, slopes, buffer = (t[: len(x)] for t in self._blocks[i - 1])
            torch.mm(gradient.t(), self._parameters[4 * i], out=buffer).mul_(slopes)
            gain, bias = self.gradients[4 * i - 2 : 4 * i]
            gradient, gain_part, bias_part = torch.ops.aten.native_layer_norm_backward(
                buffer, before, self._norms[i - 1].normalized_shape, mean, rstd,
                self._gains[i - 1], bias, [True, True, True],
            )  # fmt: skip
            gradient = gradient.t()
            gain.add_(gain_part)
            bias.add_(bias_part)


class LinearizedMLP:
    """`policy.mlp` at some inputs, and how gradients in its outputs become gradients in these: the
    backward pass without that of the weights. Activations of all rows are kept.

    Args:
        network: of `policy.mlp`; it gives shapes and the epsilon of LayerNorm.
        parameters: to compute with, in the network's order.
        inputs: [N, I].

    Attributes:
        outputs: [N, O].
    """

    @torch.no_grad()
    def __init__(self, network: nn.Sequential, parameters: Sequence[Tensor], inputs: Tensor):
        norms = [m for m in network if isinstance(m, nn.LayerNorm)]
        *_, self._last, bias = parameters
        self._layers, x = [], inputs
        for i, norm in enumerate(norms):
            weight, shift, gain, offset = parameters[4 * i : 4 * i + 4]
            before = F.linear(x, weight, shift)
            after, mean, rstd = torch.native_layer_norm(
                before, norm.normalized_shape, gain, offset, norm.eps
            )
            self._layers.append((weight, gain, before, after, mean, rstd))
            x = F.elu(after)
        self.outputs = F.linear(x, self._last, bias)

    @torch.no_grad()
    def pull_back(self, rows: slice, gradient: Tensor) -> Tensor:
        """Return the gradients in the inputs [R, I] of some rows from those in their outputs
        [R, O]."""
        gradient = gradient @ self._last
        for weight, gain, *numbers in reversed(self._layers):
            before, after, mean, rstd = (tensor[rows] for tensor in numbers)
            gradient = torch.ops.aten.elu_backward(gradient, 1.0, 1.0, 1.0, False, after)
            gradient, *_ = torch.ops.aten.native_layer_norm_backward(
                gradient, before, gain.shape, mean, rstd, gain, None, [True, False, False]
            )
            gradient = gradient @ weight
        return gradient
