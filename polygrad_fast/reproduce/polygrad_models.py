"""World models by the names that PolyGRAD's experiments give them: how each is trained, and what it
imagines with."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from polygrad_fast.config import GuidanceConfig, SamplerConfig, TrainConfig, WorldModelScale
from polygrad_fast.world_models.build import STEPWISE

OFFICIAL = SamplerConfig.official(denoiser_actions="clipped")  # as a dataset's actions are
EXACT = replace(OFFICIAL, action_update="exact", clip_state_change=None)
SAMPLERS = {
    "official": OFFICIAL,
    "paper": SamplerConfig.paper(denoiser_actions="clipped"),
    "exact": EXACT,
    "rollout": replace(EXACT, scale_actions=False),
}
"""Of trajectory diffusion."""
MODELS = (*SAMPLERS, *STEPWISE)
TRAINED_AS = {"exact": "official"}
"""Models that differ from another one in how they imagine only, and the name of that one."""
GUIDANCE = GuidanceConfig(initial=0.05, learning_rate=0.3)
"""Learns the scale in tens of samples instead of a training."""


class Variant(NamedTuple):
    """A trained world model and what it imagines with."""

    model: str
    """One of `MODELS`."""
    horizon: int
    """Steps that it imagines."""
    steps: int | None
    """Diffusion steps of a trajectory; None: it is imagined one step at a time."""

    @property
    def trained_horizon(self) -> int | None:
        """The horizon that it must be trained for; None: any."""
        return None if self.model in STEPWISE else self.horizon

    @property
    def sampler(self) -> SamplerConfig | None:
        """What it imagines with; None: without a sampler."""
        if self.steps is None:
            return None
        return replace(SAMPLERS[self.model], num_inference_steps=self.steps)

    @property
    def is_guided(self) -> bool:
        """Whether its actions follow a guidance scale."""
        return self.steps is not None and self.sampler.action_update == "score"

    @property
    def label(self) -> str:
        """Its name in figures."""
        return self.model if self.steps is None else f"{self.model}, {self.steps} steps"


def variants(scale: WorldModelScale, horizon: int) -> list[Variant]:
    """Return what is measured at a horizon; without numbers of diffusion steps that a denoiser of
    kind "rollout" cannot imagine in."""
    found = []
    for model in scale.models:
        if model in STEPWISE:
            found.append(Variant(model, horizon, None))
            continue
        least = horizon + 1 if model == "rollout" else 1
        steps = [steps for steps in scale.diffusion_steps if steps >= least]
        found += [Variant(model, horizon, number) for number in steps]
    return found


def training_config(
    scale: WorldModelScale, env_id: str, model: str, horizon: int | None
) -> TrainConfig:
    """Return how a model is trained.

    Args:
        scale: sizes.
        env_id: the environment.
        model: one of `MODELS` that is trained itself (see `TRAINED_AS`).
        horizon: of trajectory diffusion; None: of the others, which train on windows of the
            scale's first horizon, the transformer on as many steps as it can see.
    """
    config = TrainConfig.from_preset(scale.preset)
    if horizon is None:
        window = scale.horizons[0]
        if model == "transformer":
            window = min(max(scale.horizons), max(window, config.transformer.context))
        config = replace(config, world_model=model, horizon=window)
    else:
        config = replace(
            config,
            world_model="trajectory_diffusion",
            horizon=horizon,
            schedule=replace(
                config.schedule, num_train_timesteps=max(scale.diffusion_steps), tau=None
            ),
            denoiser=replace(
                config.denoiser,
                kind="rollout" if model == "rollout" else scale.denoiser,
                step_conditioning=None if model == "paper" else "input",
            ),
            sampler=SAMPLERS[model],
            guidance=GUIDANCE,
        )
    group = "denoiser" if config.world_model == "trajectory_diffusion" else model
    if scale.model_batch_size is not None:
        options = replace(getattr(config, group), batch_size=scale.model_batch_size)
        config = replace(config, **{group: options})
    return config.resolved(env_id)
