"""What TD3+BC and IQL share: acting, learning rates, targets, state."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.config import OfflineAgentConfig
from polygrad_fast.errors import CheckpointError, InputError, NonFiniteError
from polygrad_fast.learners.networks import BoundedPolicy
from polygrad_fast.transitions import Transitions


class OfflineActorCritic(abc.ABC):
    """Base of the agents that learn from transitions; implements the rest of `OfflineLearner`.

    Attributes:
        config: of the agent.
        policy: what it trains, in place.
        num_updates: taken so far.
    """

    name: str
    policy: BoundedPolicy
    config: OfflineAgentConfig

    def __init__(self, optimized: Mapping[str, Iterable[nn.Parameter]]):
        """Make an Adam per named group of parameters, stepped together."""
        self.num_updates = 0
        self.optimizers = {
            name: torch.optim.Adam(
                list(parameters),
                lr=self.config.learning_rate,
                eps=self.config.adam_eps,
                fused=True,
            )
            for name, parameters in optimized.items()
        }

    @torch.no_grad()
    def predict(
        self,
        observation: np.ndarray,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, None]:
        """Return the action for an observation, within the bounds.

        Args:
            observation: [S] or [N, S], raw.
            deterministic: take the policy's mean instead of a sample; a deterministic policy has
                only that.
            generator: of the samples.

        Returns:
            The action, float32 [A] or [N, A], and None (the state that Stable-Baselines3 returns).

        Raises:
            InputError: another shape, or a number that is not finite.
            NonFiniteError: the policy's weights are not finite.
        """
        policy = self.policy
        device = policy.low.device
        inputs = torch.as_tensor(np.asarray(observation), dtype=torch.float32, device=device)
        if inputs.ndim not in (1, 2) or inputs.shape[-1] != policy.observation_dim:
            size = policy.observation_dim
            raise InputError(
                f"observation must have shape [{size}] or [N, {size}], got {list(inputs.shape)}"
            )
        action = policy.squash(policy.normalize(inputs))
        if not torch.isfinite(action).all():
            if not torch.isfinite(inputs).all():
                raise InputError("observation must hold finite numbers, got one that is not")
            raise NonFiniteError(f"the policy of {self.name} gives actions that are not finite")
        if not deterministic and hasattr(policy, "std"):
            noise = torch.randn(action.shape, generator=generator).to(device)
            action = torch.clamp(action + policy.std * noise, policy.low, policy.high)
        return action.cpu().numpy(), None

    def check_batch(self, batch: Transitions) -> None:
        """Raise InputError unless the batch is of this policy's observations and actions."""
        wanted = self.policy.observation_dim, self.policy.action_dim
        if (batch.observation_dim, batch.action_dim) != wanted:
            raise InputError(
                f"a batch must have (observation, action) dimensions {wanted}, got "
                f"{(batch.observation_dim, batch.action_dim)}"
            )

    def normalized_pairs(self, batch: Transitions) -> Tensor:
        """Return [N, S + A]: observations as the networks read them, and raw actions."""
        if not self.policy.normalizes:
            return batch.pairs
        return torch.cat((self.policy.normalize(batch.observations), batch.actions), dim=1)

    def begin_update(self) -> None:
        """Set the learning rate of this update."""
        learning_rate = self.config.learning_rate_at(self.num_updates)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def step(self, name: str, loss: Tensor) -> None:
        """Take an Adam step on a loss; the gradients stay in the parameters until the next one."""
        parameters = self.optimizers[name].param_groups[0]["params"]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        self.optimizers[name].step()

    @torch.no_grad()
    def move_targets(self) -> None:
        """Move the targets towards the weights; onto them where no update was before."""
        share = 1.0 if self.num_updates == 0 else self.config.polyak
        for target, source in self.targets():
            torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), share)

    @abc.abstractmethod
    def targets(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return each target network with the one it follows."""

    @abc.abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizers' states and the number of updates; weights are saved with
        `modules`."""
        optimizers = {name: o.state_dict() for name, o in self.optimizers.items()}
        return {"num_updates": self.num_updates, "optimizers": optimizers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it is of another agent.
        """
        if set(state["optimizers"]) != set(self.optimizers):
            raise CheckpointError(
                f"the state of {self.name} must hold the optimizers {sorted(self.optimizers)}, got "
                f"{sorted(state['optimizers'])}"
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.num_updates = int(state["num_updates"])


def check_moments(wanted: bool, moments: tuple[Tensor, Tensor] | None) -> None:
    """Raise InputError unless moments of observations are given where they are wanted."""
    if wanted != (moments is not None):
        got = "None" if moments is None else "moments"
        must = "the mean and std of real data's observations" if wanted else "None"
        raise InputError(
            f"observation_moments must be {must} with normalize_observations={wanted}, got {got}"
        )
