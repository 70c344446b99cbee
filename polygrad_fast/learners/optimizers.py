"""AdamW as the actor-critic steps it, and the clip of its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one fused call, without a choice on the host: a CUDA graph may hold its step.

    Moments and counts are there before the first step.

    Args:
        parameters: to step; those without a gradient are left alone.
        learning_rate: a float32 scalar on the parameters' device, read at every step; it stays the
            same tensor, also in `load_state_dict`.

    Attributes:
        moments: one vector, of which all moments and counts are views.
    """

    moments: Tensor

    def __init__(self, parameters: Iterable[Tensor], learning_rate: Tensor):
        parameters = list(parameters)
        self.learning_rate = learning_rate
        super().__init__(parameters, lr=learning_rate, fused=True)
        self._place_moments()

    def _place_moments(self) -> None:
        """Make all moments and counts views of one vector."""
        wanted = {}
        for p in self.param_groups[0]["params"]:
            zeros = torch.zeros_like(p, requires_grad=False)
            wanted[p] = {"step": zeros.new_zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros}
            wanted[p] |= self.state.get(p, {})
        tensors = [tensor for state in wanted.values() for tensor in state.values()]
        self.moments = torch.cat([tensor.flatten() for tensor in tensors])
        parts = iter(self.moments.split([tensor.numel() for tensor in tensors]))
        for p, state in wanted.items():
            self.state[p] = {name: next(parts).view_as(t) for name, t in state.items()}

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Take a step on the gradients.

        Args:
            skip: a float32 scalar on the device: with 1 nothing is changed, with 0 the step is
                taken; default 0.
        """
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in parameters]
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1.0)
        torch._fused_adamw_(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            counts,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            found_inf=skip,
        )
        if skip is not None:
            torch._foreach_add_(counts, skip, alpha=-1.0)  # without alpha it would be read

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore moments, counts and learning rate; options stay.

        Args:
            state_dict: of this or of any AdamW, as older checkpoints have it: its learning rate a
                number, and nothing in it before the first step.
        """
        (group,), (saved,) = self.param_groups, state_dict["param_groups"]
        options = {name: value for name, value in group.items() if name != "params"}
        groups = [options | {"params": saved["params"]}]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        self.param_groups[0]["lr"] = self.learning_rate.copy_(torch.as_tensor(saved["lr"]))
        self._place_moments()


def clip_gradients(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their norm together is at most `max_norm`, as
    `torch.nn.utils.clip_grad_norm_` does; return the norm before."""
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_(max=1.0))
    return norm
