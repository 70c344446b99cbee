"""One step of a world model as a function that can be differentiated."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from polygrad_fast.denoisers.one_step import OneStepNetwork
from polygrad_fast.normalizer import Normalizer


class Dynamics:
    """What follows from an observation and an action, by a network of one step.

    Args:
        network: as it is at each call; its weights get no gradient.
        normalizer: of everything.
        action_bounds: (low, high) of the raw actions, [A] each, to which the network sees them
            clipped; None: it sees them as they are.
    """

    def __init__(
        self,
        network: OneStepNetwork,
        normalizer: Normalizer,
        action_bounds: tuple[Tensor, Tensor] | None,
    ):
        self._network, self._normalizer, self._bounds = network, normalizer, action_bounds

    @torch.no_grad()
    def linearize(
        self, observations: Tensor, actions: Tensor, following: Tensor, rewards: Tensor
    ) -> LinearizedDynamics:
        """Return the steps from normalized observations [N, S] under raw actions [N, A], ready to
        be differentiated there.

        Args:
            following, rewards: what these steps led to, normalized, [N, S] and [N]; what lies on a
                bound of the network's range (`ShownRange`) has been cut off there.
        """
        normalizer = self._normalizer
        slope = 1.0 / normalizer.actions_scale.expand_as(actions)
        if self._bounds is not None:
            low, high = self._bounds
            slope = torch.where((actions >= low) & (actions <= high), slope, 0.0)
            actions = actions.clamp(low, high)
        seen = normalizer.normalize(actions, "actions")
        inside = self._network.range.inside(following, rewards)
        return LinearizedDynamics(self._network, observations, seen, slope, inside)

    def capture_key(self) -> Hashable:
        """Return where the network's numbers are, which a CUDA graph holds on to."""
        tensors = (*self._network.parameters(), *self._network.buffers())
        return tuple(tensor.data_ptr() for tensor in tensors)


class LinearizedDynamics:
    """N steps, and how gradients in what follows from them become gradients in what they are taken
    from: `OneStepNetwork`'s backward pass without that of its weights.

    Args:
        network: of the steps.
        observations: normalized [N, S].
        seen: actions as the network sees them, normalized [N, A].
        slope: of these in the raw actions, [N, A].
        inside: which observations that follow, [N, S], and rewards, [N], change with what is
            predicted; the others have been cut off.

    Attributes:
        logits: of the terminal flags, [N].
    """

    def __init__(
        self,
        network: OneStepNetwork,
        observations: Tensor,
        seen: Tensor,
        slope: Tensor,
        inside: tuple[Tensor, Tensor],
    ):
        self._linears, self._scale = list(network.network[::2]), network.difference_scale
        self._slope, self._sums = slope, []  # before the activations
        self._moves, self._pays = inside
        x = torch.cat([observations, seen], dim=-1)
        for linear in self._linears[:-1]:
            self._sums.append(torch.nn.functional.linear(x, linear.weight, linear.bias))
            x = torch.nn.functional.silu(self._sums[-1])
        last = self._linears[-1]
        self.logits = torch.nn.functional.linear(x, last.weight[-1:], last.bias[-1:]).squeeze(-1)

    @torch.no_grad()
    def pull_back(
        self, rows: slice, following: Tensor, rewards: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients in the observations [R, S] and raw actions [R, A] of some of the
        steps.

        Args:
            rows: of these steps, R of them.
            following: gradient in the observations that follow, o + difference within the range,
                [R, S].
            rewards, logits: gradients in the normalized rewards and in the terminal flags' logits,
                [R] each.
        """
        following = torch.where(self._moves[rows], following, 0.0)
        rewards = torch.where(self._pays[rows], rewards, 0.0)
        outputs = (following * self._scale, rewards.unsqueeze(-1), logits.unsqueeze(-1))
        gradient = torch.cat(outputs, dim=-1) @ self._linears[-1].weight
        for linear, sums in zip(self._linears[-2::-1], self._sums[::-1], strict=True):
            gradient = torch.ops.aten.silu_backward(gradient, sums[rows]) @ linear.weight
        in_observations, in_seen = gradient.split(
            [following.shape[-1], self._slope.shape[-1]], dim=-1
        )
        return following + in_observations, in_seen * self._slope[rows]
