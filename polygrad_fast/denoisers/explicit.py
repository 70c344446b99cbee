"""Forward and backward passes written out, for training without autograd."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers.explicit_one_step import ExplicitOneStep
from polygrad_fast.denoisers.explicit_residual_mlp import ExplicitResidualMLP
from polygrad_fast.denoisers.one_step import OneStepNetwork
from polygrad_fast.denoisers.residual_mlp import ResidualMLPDenoiser
from polygrad_fast.denoisers.rollout import RolloutDenoiser
from polygrad_fast.denoisers.transformer import TransformerDenoiser
from polygrad_fast.structure import change, parts

NETWORKS = (OneStepNetwork, ResidualMLPDenoiser, RolloutDenoiser, TransformerDenoiser)


class ExplicitPasses(Protocol):
    """A network called like the module it stands for, whose results begin a graph of autograd.

    After `loss.backward()`, `backward()` takes the gradients of these results on to the weights.
    """

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the module would."""

    def backward(self) -> None:
        """Write, not add, the gradient of every weight into its `grad`, which must be there."""


def explicit_passes(
    module: nn.Module, num_train_timesteps: int, dtype: torch.dtype
) -> ExplicitPasses | None:
    """Return the passes of a network of this library, of a rollout those of its step's network, or
    None where there are none.

    Args:
        module: as its constructor made it; see `is_as_built`.
        num_train_timesteps: K.
        dtype: of the products; see `TrainedLinear`.
    """
    if type(module) is ResidualMLPDenoiser:
        return ExplicitResidualMLP(module, num_train_timesteps, dtype)
    if type(module) is OneStepNetwork:
        return ExplicitOneStep(module, dtype)
    if type(module) is RolloutDenoiser:
        return ExplicitOneStep(module.step, dtype)
    return None


def is_as_built(module: nn.Module) -> bool:
    """Whether this is a network of this library that computes what its type says, and nothing
    watches or stops its gradients: no hook, no replaced part, no frozen weight."""
    if type(module) not in NETWORKS or change(module, module.built) is not None:
        return False
    for part in parts(module):
        if part._backward_hooks or part._backward_pre_hooks:
            return False
        for parameter in part._parameters.values():
            if not parameter.requires_grad or parameter._backward_hooks:
                return False
            if parameter._post_accumulate_grad_hooks:
                return False
    return True
