"""TD3+BC (arXiv 2106.06860): TD3 whose actor also clones the dataset's actions."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polygrad_fast.config import TD3BCConfig
from polygrad_fast.errors import InputError
from polygrad_fast.learners.networks import DeterministicPolicy, TwinCritics
from polygrad_fast.learners.offline import OfflineActorCritic, check_moments
from polygrad_fast.transitions import Transitions


class TD3BC(OfflineActorCritic):
    """Policy, twin critics, their targets, and one `update`; weights change in place.

    Implements `polygrad_fast.learners.OfflineLearner`.

    Args:
        observation_dim: S.
        low, high: the actions' bounds, [A] finite numbers each.
        config: default `TD3BCConfig()`, the released settings of Policy-Guided Diffusion.
        observation_moments: mean and standard deviation [S] of the real data's observations, with
            `config.normalize_observations`.
        generator: of the first weights.

    Raises:
        InputError: unsuitable bounds, or moments missing or given without
            `normalize_observations`.
    """

    name = "td3_bc"
    policy: DeterministicPolicy
    config: TD3BCConfig

    def __init__(
        self,
        observation_dim: int,
        low: Sequence[float] | Tensor,
        high: Sequence[float] | Tensor,
        config: TD3BCConfig | None = None,
        observation_moments: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ):
        self.config = config = config if config is not None else TD3BCConfig()
        check_moments(config.normalize_observations, observation_moments)
        self.policy = DeterministicPolicy(
            observation_dim, low, high, config.hidden_dim, observation_moments, generator
        )
        pair_dim = observation_dim + self.policy.action_dim
        self.critics = TwinCritics(pair_dim, config.hidden_dim, generator)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        super().__init__({"policy": self.policy.parameters(), "critics": self.critics.parameters()})

    def update(
        self,
        batch: Transitions,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Take one update on a batch: by default targets, actor, and two critic steps.

        - Targets move: at the first update onto the weights, later by `polyak`.
        - Actor: q = Q1(s, pi(s)), lambda = alpha / (mean |q| + 1e-7) without a gradient; one step
          on -lambda mean q + mean (pi(s) - a)^2.
        - Critics, `critic_updates` times, each with noise n of its own, targets as they are:
          a' = clip(pi'(s') + clip(policy_noise n, -noise_clip, noise_clip), -action_max,
          action_max), y = r + gamma (1 - d) min(Q1', Q2')(s', a'); one step on the mean squared
          errors of Q1 and Q2.

        Args:
            batch: N transitions, raw.
            generator: of the noise, on the CPU.
            noise: standard normals [critic_updates, N, A] instead.

        Returns:
            Scalars on the device, not read on the host: q1_loss, q2_loss (means over the critic
            steps), and of updates with an actor step actor_loss, bc_loss, q_mean (mean of q),
            lambda.

        Raises:
            InputError: a batch or noise of other dimensions.
        """
        self.check_batch(batch)
        config = self.config
        wanted = (config.critic_updates, len(batch), batch.action_dim)
        if noise is None:
            noise = torch.randn(wanted, generator=generator).to(batch.rows.device)
        elif tuple(noise.shape) != wanted:
            raise InputError(f"noise must have shape {wanted}, got {tuple(noise.shape)}")
        self.begin_update()
        with_actor = self.num_updates % config.actor_interval == config.actor_interval - 1
        if config.target_update == "before":
            self.move_targets()
        pairs = self.normalized_pairs(batch)
        metrics = {}
        if with_actor and config.order == "actor_first":
            metrics |= self.step_actor(pairs)
        metrics |= self.step_critics(batch, pairs, noise)
        if with_actor and config.order == "critic_first":
            metrics |= self.step_actor(pairs)
        self.num_updates += 1
        if with_actor and config.target_update == "after":
            self.move_targets()
        return metrics

    def step_actor(self, pairs: Tensor) -> dict[str, Tensor]:
        """Take one actor step; `pairs` [N, S + A] as `normalized_pairs` returns them."""
        observations, actions = pairs.tensor_split([self.policy.observation_dim], dim=1)
        chosen = self.policy.squash(observations)
        q = self.critics.first(torch.cat((observations, chosen), dim=1))
        weight = self.config.alpha / (q.detach().abs().mean() + 1e-7)
        cloning = (chosen - actions).square().mean()
        q_mean = q.mean()
        loss = cloning - weight * q_mean
        self.step("policy", loss)
        return {
            "actor_loss": loss.detach(),
            "bc_loss": cloning.detach(),
            "q_mean": q_mean.detach(),
            "lambda": weight,
        }

    def step_critics(self, batch: Transitions, pairs: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Take the critics' steps; noise [critic_updates, N, A]."""
        losses = []
        for targets in self.critic_targets(batch, noise):
            squares = (self.critics(pairs) - targets).square().mean(dim=1)
            self.step("critics", squares.sum())
            losses.append(squares.detach())
        q1_loss, q2_loss = torch.stack(losses).mean(dim=0)
        return {"q1_loss": q1_loss, "q2_loss": q2_loss}

    @torch.no_grad()
    def critic_targets(self, batch: Transitions, noise: Tensor) -> Tensor:
        """Return y for each critic step, [critic_updates, N], in one pass of the targets."""
        config = self.config
        observations = self.policy.normalize(batch.next_observations)
        noise = torch.clamp(config.policy_noise * noise, -config.noise_clip, config.noise_clip)
        actions = self.target_policy.squash(observations) + noise
        actions = actions.clamp(-config.action_max, config.action_max)
        pairs = torch.cat((observations.expand(len(noise), -1, -1), actions), dim=-1)
        values = self.target_critics(pairs.flatten(0, 1)).amin(dim=0).view(noise.shape[:2])
        return batch.rewards + config.gamma * (1 - batch.terminals) * values

    def targets(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return each target network with the one it follows."""
        return (self.target_policy, self.policy), (self.target_critics, self.critics)

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        return {
            "policy": self.policy,
            "critics": self.critics,
            "target_policy": self.target_policy,
            "target_critics": self.target_critics,
        }
