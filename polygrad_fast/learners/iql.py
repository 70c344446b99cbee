"""Implicit Q-learning (arXiv 2110.06169)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polygrad_fast.config import IQLConfig
from polygrad_fast.learners.networks import BoundedGaussianPolicy, TwinCritics, relu_mlp
from polygrad_fast.learners.offline import OfflineActorCritic, check_moments
from polygrad_fast.policy import log_prob
from polygrad_fast.transitions import Transitions


class IQL(OfflineActorCritic):
    """Policy, value function, twin critics, their targets, and one `update`; weights change in
    place.

    Implements `polygrad_fast.learners.OfflineLearner`.

    Args:
        observation_dim: S.
        low, high: the actions' bounds, [A] finite numbers each.
        config: default `IQLConfig()`, the released settings of Policy-Guided Diffusion.
        observation_moments: mean and standard deviation [S] of the real data's observations, with
            `config.normalize_observations`.
        generator: of the first weights.

    Raises:
        InputError: unsuitable bounds, or moments missing or given without
            `normalize_observations`.
    """

    name = "iql"
    policy: BoundedGaussianPolicy
    config: IQLConfig

    def __init__(
        self,
        observation_dim: int,
        low: Sequence[float] | Tensor,
        high: Sequence[float] | Tensor,
        config: IQLConfig | None = None,
        observation_moments: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ):
        self.config = config = config if config is not None else IQLConfig()
        check_moments(config.normalize_observations, observation_moments)
        self.policy = BoundedGaussianPolicy(
            observation_dim,
            low,
            high,
            config.hidden_dim,
            observation_moments,
            generator,
            config.log_std_min,
            config.log_std_max,
        )
        pair_dim = observation_dim + self.policy.action_dim
        self.critics = TwinCritics(pair_dim, config.hidden_dim, generator)
        self.value_function = relu_mlp(observation_dim, config.hidden_dim, 1, generator)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        trained = (self.policy, self.critics, self.value_function)
        super().__init__({"all": [p for module in trained for p in module.parameters()]})

    def update(
        self, batch: Transitions, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one step of all networks on a batch, all from the weights before it.

        - Targets move: at the first update onto the weights, later by `polyak`.
        - advantage = min(Q1', Q2')(s, a) - V(s); V: mean |expectile - [advantage < 0]| advantage^2.
        - y = r + gamma (1 - d) V(s'); critics: mean over both and the batch of (Q(s, a) - y)^2.
        - Actor: mean of min(exp(beta advantage), max_weight) (-log pi(a|s)).

        Args:
            batch: N transitions, raw.
            generator: not needed: nothing is drawn.

        Returns:
            Scalars on the device, not read on the host: value_loss, q_loss, actor_loss.

        Raises:
            InputError: a batch of other dimensions.
        """
        self.check_batch(batch)
        config = self.config
        self.begin_update()
        if config.target_update == "before":
            self.move_targets()
        pairs = self.normalized_pairs(batch)
        observations = pairs[:, : batch.observation_dim]
        with torch.no_grad():
            target_values = self.target_critics(pairs).amin(dim=0)
            next_observations = self.policy.normalize(batch.next_observations)
            next_values = self.value_function(next_observations).squeeze(-1)
            y = batch.rewards + config.gamma * (1 - batch.terminals) * next_values

        advantages = target_values - self.value_function(observations).squeeze(-1)
        known = advantages.detach()
        share = torch.where(known < 0, 1 - config.expectile, config.expectile)
        value_loss = (share * advantages.square()).mean()
        q_loss = (self.critics(pairs) - y).square().mean()
        weights = (config.beta * known).exp().clamp(max=config.max_weight)
        log_probs = log_prob(batch.actions, *self.policy.distribution(observations))
        actor_loss = -(weights * log_probs).mean()
        self.step("all", value_loss + q_loss + actor_loss)
        self.num_updates += 1
        if config.target_update == "after":
            self.move_targets()
        return {
            "value_loss": value_loss.detach(),
            "q_loss": q_loss.detach(),
            "actor_loss": actor_loss.detach(),
        }

    def targets(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return each target network with the one it follows."""
        return ((self.target_critics, self.critics),)

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        return {
            "policy": self.policy,
            "critics": self.critics,
            "value_function": self.value_function,
            "target_critics": self.target_critics,
        }
