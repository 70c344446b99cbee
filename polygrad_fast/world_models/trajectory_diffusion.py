"""Policy-guided trajectory diffusion as a world model: Algorithm 1 trains it, Algorithm 2
imagines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.config import TrainConfig
from polygrad_fast.data.replay import Windows
from polygrad_fast.denoisers.build import build_denoiser
from polygrad_fast.denoisers.dynamics import Dynamics
from polygrad_fast.denoisers.rollout import RolloutDenoiser
from polygrad_fast.diffusion.ddpm import NoiseSchedule, warn_of_amplified_errors
from polygrad_fast.diffusion.trainer import DenoiserTrainer
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.profiling import annotate
from polygrad_fast.sampling import PolicyGuidedSampler, TrajectoryBatch
from polygrad_fast.structure import change
from polygrad_fast.world_models.base import check_horizon
from polygrad_fast.world_models.guidance import GuidanceTuner


class TrajectoryDiffusion:
    """A denoiser, its averaged copy, the sampler that reads the copy, and the guidance scale delta.

    Args:
        config: horizon, schedule, sampler, denoiser, guidance, engine and dtype are read.
        normalizer: shared moments of the data.
        action_bounds: (low, high) of the raw actions.
        device: of everything.
        denoiser: a network of the caller's instead of the configured one.
    """

    def __init__(
        self,
        config: TrainConfig,
        normalizer: Normalizer,
        action_bounds: tuple,
        device: torch.device,
        denoiser: nn.Module | None = None,
    ):
        self.config, self.normalizer, self.device = config, normalizer, device
        num_steps = config.schedule.num_train_timesteps
        self.schedule = NoiseSchedule.cosine(num_steps, config.schedule.tau).to(device)
        if denoiser is None:
            dims = normalizer.observation_dim, normalizer.action_dim
            denoiser = build_denoiser(config.denoiser, *dims, config.horizon, num_steps)
        self.trainer = DenoiserTrainer(
            denoiser.to(device), self.schedule, config.denoiser, config.sampler
        )
        self.guidance = GuidanceTuner(config.guidance, device)
        self._action_bounds = action_bounds
        self._sampler: PolicyGuidedSampler | None = None

    @property
    def longest_horizon(self) -> int:
        """The denoiser's horizon: a trajectory is imagined as a whole."""
        return self.config.horizon

    @property
    def denoiser(self) -> nn.Module:
        """The averaged denoiser, which imagines."""
        return self.trainer.ema_model

    def prepare(self, policy: Any) -> None:
        """Build the sampler under a policy; see `WorldModel.prepare`."""
        self.sampler(policy)

    def warn(self, stacklevel: int) -> None:
        """Warn where the schedule multiplies the denoiser's error."""
        warn_of_amplified_errors(self.schedule, self.config.sampler, stacklevel + 1)

    def sampler(self, policy: Any) -> PolicyGuidedSampler:
        """Return the sampler under a policy; it is kept until another policy is asked for."""
        if self._sampler is None or self._sampler.components.policy is not policy:
            self._sampler = PolicyGuidedSampler(
                self.denoiser,
                policy,
                self.schedule,
                self.normalizer,
                self.config.sampler,
                engine=self.config.engine,
                dtype=self.config.dtype,
                device=self.device,
                action_bounds=self._action_bounds,
            )
        return self._sampler

    def use_action_update(self, action_update: str) -> None:
        """Imagine with another `SamplerConfig.action_update` from now on.

        Raises:
            InputError: an unknown one, or one that does not fit the other options.
        """
        sampler = replace(self.config.sampler, action_update=action_update)
        self.config = replace(self.config, sampler=sampler)
        self._sampler = None  # its engine is built for its options

    def update(
        self, windows: Windows, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step of Algorithm 1; see `WorldModel.update`."""
        trajectory = self.normalizer.normalize_trajectory(
            windows.observations, windows.rewards, windows.terminals
        )
        actions = self.normalizer.normalize(windows.actions, "actions")
        losses = self.trainer.update(trajectory, actions, generator)
        return {f"denoiser/{name}": value for name, value in losses.items()}

    def imagine(
        self,
        initial_observations: Tensor,
        policy: Any,
        generator: torch.Generator | None = None,
        normalized: bool = False,
        horizon: int | None = None,
    ) -> TrajectoryBatch:
        """Sample by Algorithm 2 at the current guidance scale; see `WorldModel.imagine`. Of fewer
        steps than the denoiser's they are the first, and cost the same. Values are not read on the
        host: from observations that are not finite, neither are trajectories."""
        horizon = self.config.horizon if horizon is None else check_horizon(self, horizon)
        batch = self.sampler(policy).sample(
            initial_observations,
            self.guidance.value,
            generator,
            normalized=normalized,
            check_finite=False,
        )
        return batch if horizon == self.config.horizon else batch.first_steps(horizon)

    def feedback(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tune the guidance scale so that standardized actions spread as the policy's do
        (equation 10)."""
        if self.config.sampler.action_update == "score":
            statistic = {"std": "action_std", "mean_abs": "action_mean_abs"}
            with annotate("guidance_update"):
                self.guidance.update(metrics[statistic[self.config.guidance.statistic]])
        return {"a2c/guidance_scale": self.guidance.value}

    def dynamics(self) -> Dynamics | None:
        """Return the step that a denoiser of kind "rollout" repeats, where actions are exact and
        have settled, so that states and actions agree; see `WorldModel.dynamics`."""
        sampler, denoiser = self.config.sampler, self.denoiser
        if type(denoiser) is not RolloutDenoiser or sampler.action_update != "exact":
            return None
        if change(denoiser, denoiser.built) is not None:
            return None
        bounds = [torch.as_tensor(bound, device=self.device) for bound in self._action_bounds]
        seen = tuple(bounds) if sampler.denoiser_actions == "clipped" else None
        return Dynamics(denoiser.step, self.normalizer, seen)

    def modules(self) -> dict[str, nn.Module]:
        """Return the trained denoiser and its averaged copy."""
        return {"denoiser": self.trainer.model, "ema_denoiser": self.trainer.ema_model}

    def state_dict(self) -> dict[str, Any]:
        """Return guidance scale, optimizer and counters."""
        return {
            "guidance_scale": self.guidance.value.item(),
            "denoiser_trainer": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.guidance.value = state["guidance_scale"]
        self.trainer.load_state_dict(state["denoiser_trainer"])
