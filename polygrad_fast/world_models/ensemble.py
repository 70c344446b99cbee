"""An ensemble of probabilistic one-step networks as a world model (PETS, MBPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from polygrad_fast.config import EnsembleConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.ensemble import (
    EnsembleNetwork,
    Steps,
    ensemble_losses,
    is_held_out,
    regularization,
)
from polygrad_fast.diffusion.averaged_trainer import AveragedTrainer
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.terminals import alive_steps
from polygrad_fast.transitions import Transitions
from polygrad_fast.world_models.rollout import StepwiseModel


class Ensemble(StepwiseModel):
    """Members that predict mean and variance; each imagined step is drawn from one of the elites.

    A share of all steps, chosen by a hash of what they hold, is never trained on: by their error
    there the elites are chosen. Every member trains on a bootstrap of each batch.

    Args:
        config: size and training of the networks.
        generator: of their first weights, on the CPU; default torch's.

    The others are those of `StepwiseModel`.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        horizon: int,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
        generator: torch.Generator | None = None,
    ):
        self.config = config
        network = EnsembleNetwork(
            normalizer.observation_dim,
            normalizer.action_dim,
            config.num_members,
            config.num_elites,
            config.hidden_dim,
            config.num_layers,
            generator,
        )
        trainer = AveragedTrainer(
            network.to(device), config.learning_rate, config.ema_decay, config.ema_interval
        )
        super().__init__(trainer, horizon, normalizer, action_bounds, device)

    @property
    def network(self) -> EnsembleNetwork:
        """The averaged members, which imagine."""
        return self.trainer.ema_model

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on every transition of the windows; see `WorldModel.update`.

        Padding carries no weight, and a terminal step none for its difference, as in
        `one_step_losses`.
        """
        following = torch.cat([windows.observations[:, 1:], windows.observations[:, -1:]], dim=1)
        is_real = alive_steps(windows.terminals).float()
        goes_on = is_real * (1.0 - windows.terminals)
        goes_on[:, -1] = 0.0  # what follows is not in the window
        parts = (windows.observations, windows.actions, following, windows.rewards)
        flat = (part.flatten(0, 1) for part in (*parts, windows.terminals, goes_on, is_real))
        return self._fit(*flat, generator)

    def fit(
        self, batch: Transitions, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on raw transitions, all of which count; returns what `update`
        does."""
        return self._fit(
            batch.observations,
            batch.actions,
            batch.next_observations,
            batch.rewards,
            batch.terminals,
            1.0 - batch.terminals,
            torch.ones_like(batch.rewards),
            generator,
        )

    def _fit(
        self,
        observations: Tensor,
        actions: Tensor,
        next_observations: Tensor,
        rewards: Tensor,
        terminals: Tensor,
        goes_on: Tensor,
        is_real: Tensor,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        config, network, normalizer = self.config, self.trainer.model, self.normalizer
        held_out = is_held_out(observations, actions, config.holdout_fraction)
        normalized, following = (
            normalizer.normalize(part, "observations") for part in (observations, next_observations)
        )
        steps = Steps(
            normalized,
            self.seen(actions),
            following - normalized,
            normalizer.normalize(rewards, "rewards"),
            terminals,
            goes_on,
            is_real,
        )
        counts = self._bootstrap(len(rewards), rewards.device, generator)
        losses = ensemble_losses(network, steps, counts, held_out, config.holdout_decay)
        loss = sum(losses.values())
        self.trainer.minimize(
            loss + regularization(network, config.bound_weight, config.weight_decay)
        )
        means = {"loss": loss, **losses}
        means = {name: value.detach() / config.num_members for name, value in means.items()}
        means["holdout_error"] = network.elite_error
        return {f"dynamics/{name}": value for name, value in means.items()}

    def _bootstrap(
        self, number: int, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        """Return how often each member draws each of `number` steps, [M, N]."""
        shape = self.config.num_members, number
        where = device if generator is None else generator.device
        drawn = torch.randint(number, shape, generator=generator, device=where).to(device)
        counts = torch.zeros(shape, device=device)
        return counts.scatter_add_(1, drawn, torch.ones(shape, device=device))

    def step(
        self,
        observations: list[Tensor],
        seen: list[Tensor],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw from elites; see `StepwiseModel.step`."""
        return self.network.draw(observations[-1], seen[-1], generator)
