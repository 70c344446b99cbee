"""The network for one step of an environment, its passes written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polygrad_fast.denoisers.one_step import OneStepNetwork
from polygrad_fast.denoisers.products import TrainedLinear


class ExplicitOneStep:
    """See `polygrad_fast.denoisers.explicit.ExplicitPasses`.

    Args:
        network: as its constructor made it.
        dtype: of the products.
    """

    def __init__(self, network: OneStepNetwork, dtype: torch.dtype):
        self.network = network
        self._linears = [TrainedLinear(linear, dtype) for linear in network.network[::2]]

    @torch.no_grad()
    def __call__(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `OneStepNetwork` returns of [..., S] and [..., A]."""
        x = torch.cat([observations, actions], dim=-1)
        batch, x = x.shape[:-1], x.flatten(0, -2)
        self._sums = []  # before the activations
        for linear in self._linears[:-1]:
            self._sums.append(linear.forward(x))
            x = F.silu(self._sums[-1])
        self._output = self._linears[-1].forward(x)
        with torch.enable_grad():
            output = self._output.requires_grad_().view(*batch, -1)
            return output[..., :-2], output[..., -2], output[..., -1]

    @torch.no_grad()
    def backward(self) -> None:
        """See `ExplicitPasses.backward`."""
        gradient = self._linears[-1].backward(self._output.grad)
        for i in reversed(range(len(self._sums))):
            torch.ops.aten.silu_backward.grad_input(gradient, self._sums[i], grad_input=gradient)
            gradient = self._linears[i].backward(gradient, wants_input=i > 0)
