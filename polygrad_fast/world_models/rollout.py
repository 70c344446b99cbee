"""Imagining one step at a time, as every world model without diffusion does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.data.replay import Windows
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.sampling import TrajectoryBatch
from polygrad_fast.world_models.base import WorldModel, check_horizon


class StepwiseModel(WorldModel):
    """A network of one step, its averaged copy, and the loop that imagines with it.

    Actions are drawn from the policy at each imagined observation, so they are on-policy by
    construction. The network sees actions clipped to the environment's bounds, as the environment
    does; the trajectories hold them as drawn. Observations and rewards stay within what the data
    have shown (`ShownRange`). After a step that is predicted to be terminal, the observation stays
    and the flag stays 1.

    `prepare` and `warn` do nothing, as in the protocol: any policy will do.

    Args:
        trainer: of the network.
        horizon: H, steps imagined.
        normalizer: shared moments of the data.
        action_bounds: (low, high) of the raw actions, [A] each.
        device: of everything.
    """

    longest_horizon = None

    def __init__(
        self,
        trainer: AveragedTrainer,
        horizon: int,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
    ):
        self.trainer, self.horizon, self.normalizer = trainer, horizon, normalizer
        self._low, self._high = (torch.as_tensor(b, device=device) for b in action_bounds)

    @abstractmethod
    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step; see `WorldModel.update`."""

    def minimize(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take one gradient step on the sum of scalars; return it and them, detached, by the names
        of their columns."""
        loss = sum(losses.values())
        self.trainer.minimize(loss)
        losses = {"loss": loss, **losses}
        return {f"dynamics/{name}": value.detach() for name, value in losses.items()}

    @abstractmethod
    def step(
        self,
        observations: list[Tensor],
        seen: list[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the difference to the next observation [B, S], the reward [B] and the terminal
        flag's logit [B] that the averaged network predicts.

        Args:
            observations: of the trajectories so far, normalized, [B, S] each; the last is now.
            seen: their actions, clipped and normalized, [B, A] each.
            generator: of what is drawn.
        """

    def seen(self, actions: Tensor) -> Tensor:
        """Return raw actions as the network sees them: clipped and normalized."""
        return self.normalizer.normalize(actions.clamp(self._low, self._high), "actions")

    @torch.no_grad()
    def imagine(
        self,
        initial_observations: Tensor,
        policy: Any,
        generator: torch.Generator | None = None,
        normalized: bool = False,
        horizon: int | None = None,
    ) -> TrajectoryBatch:
        """Roll the averaged network out under the policy; see `WorldModel.imagine`."""
        horizon = self.horizon if horizon is None else check_horizon(self, horizon)
        normalizer = self.normalizer
        if normalized:
            observation = initial_observations
        else:
            observation = normalizer.normalize(initial_observations, "observations")
        ended = torch.zeros(len(observation), dtype=torch.bool, device=observation.device)
        steps, observations, seen = [], [], []
        for _ in range(horizon):
            mean, std = policy(normalizer.unnormalize(observation, "observations"))
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            action = mean + std * noise
            observations.append(observation)
            seen.append(self.seen(action))
            difference, reward, logit = self.step(observations, seen, generator)
            ended = ended | (logit > 0)
            following, reward = self.trainer.ema_model.range.clamp(observation + difference, reward)
            steps.append((observation, action, reward, ended.to(reward.dtype)))
            observation = torch.where(ended.unsqueeze(-1), observation, following)
        observations, actions, rewards, terminals = (
            torch.stack(part, dim=1) for part in zip(*steps, strict=True)
        )
        if normalized:
            actions = normalizer.normalize(actions, "actions")
            terminals = normalizer.normalize(terminals, "terminals")
        else:
            observations = normalizer.unnormalize(observations, "observations")
            observations[:, 0] = initial_observations  # exact, not through the normalizer and back
            rewards = normalizer.unnormalize(rewards, "rewards")
        return TrajectoryBatch(observations, actions, rewards, terminals)

    def feedback(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing: there is nothing to tune."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        """Return the trained network and its averaged copy."""
        return {"dynamics": self.trainer.model, "ema_dynamics": self.trainer.ema_model}

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer and counter."""
        return {"dynamics_trainer": self.trainer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.trainer.load_state_dict(state["dynamics_trainer"])
