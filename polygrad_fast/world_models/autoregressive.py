"""A plain autoregressive world model: one network, one step at a time, no diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.config import AutoregressiveConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.one_step import OneStepNetwork, one_step_losses
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.sampling import TrajectoryBatch
from polygrad_fast.world_models.base import check_horizon


class Autoregressive:
    """The one-step network, its averaged copy, and the loop that imagines with it.

    Deterministic dynamics; actions are drawn from the policy at each imagined observation, so they
    are on-policy by construction. The network sees actions clipped to the environment's bounds, as
    the environment does; the trajectories hold them as drawn. After a step that is predicted to be
    terminal, the observation stays and the flag stays 1.

    Args:
        config: size and training of the network.
        horizon: H, steps imagined.
        normalizer: shared moments of the data.
        action_bounds: (low, high) of the raw actions, [A] each.
        device: of everything.
    """

    longest_horizon = None

    def __init__(
        self,
        config: AutoregressiveConfig,
        horizon: int,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
    ):
        self.horizon, self.normalizer = horizon, normalizer
        self._low, self._high = (torch.as_tensor(b, device=device) for b in action_bounds)
        dims = normalizer.observation_dim, normalizer.action_dim
        network = OneStepNetwork(*dims, config.hidden_dim, config.num_layers)
        self.trainer = AveragedTrainer(
            network.to(device), config.learning_rate, config.ema_decay, config.ema_interval
        )

    def prepare(self, policy: Any) -> None:
        """Do nothing: any policy will do."""

    def warn(self, stacklevel: int) -> None:
        """Do nothing: nothing is known to go wrong."""

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on every transition of the windows; see `WorldModel.update`.

        The losses are those of `one_step_losses`.
        """
        trajectory = self.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        losses = one_step_losses(
            self.trainer.model,
            trajectory[..., :-2],
            self._seen(windows.actions),
            trajectory[..., -2],
            windows.terminals,
        )
        loss = sum(losses.values())
        self.trainer.minimize(loss)
        losses = {"loss": loss, **losses}
        return {f"dynamics/{name}": value.detach() for name, value in losses.items()}

    def _seen(self, actions: Tensor) -> Tensor:
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
        network, normalizer = self.trainer.ema_model, self.normalizer
        if normalized:
            observation = initial_observations
        else:
            observation = normalizer.normalize(initial_observations, "observations")
        ended = torch.zeros(len(observation), dtype=torch.bool, device=observation.device)
        steps = []
        for _ in range(horizon):
            mean, std = policy(normalizer.unnormalize(observation, "observations"))
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            action = mean + std * noise
            difference, reward, logit = network(observation, self._seen(action))
            ended = ended | (logit > 0)
            steps.append((observation, action, reward, ended.to(reward.dtype)))
            moved = observation + difference * network.difference_scale
            observation = torch.where(ended.unsqueeze(-1), observation, moved)
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

    def feedback(self, metrics: Mapping[str, float]) -> dict[str, float]:
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
