"""What the steps' kernels are told of a sampler: constants per diffusion step and options.

The table has 32 bytes per step; it is computed once per sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from polygrad_fast.config import check_choices

# Columns of the schedule table, [K, NUM_COLUMNS].
X_SCALE = tl.constexpr(0)  # x0_hat = X_SCALE x - PREDICTION_SCALE prediction ("epsilon")
PREDICTION_SCALE = tl.constexpr(1)
DENOISED_COEF = tl.constexpr(2)  # posterior mean = DENOISED_COEF x0_hat + X_COEF x
X_COEF = tl.constexpr(3)
NOISE_STD = tl.constexpr(4)
CHANGE_LIMIT = tl.constexpr(5)  # infinite where the state change is not limited
ACTION_SCALE = tl.constexpr(6)  # of the denoiser's actions in this step
NUM_COLUMNS = tl.constexpr(8)  # rows of 32 bytes


@dataclass(frozen=True)
class StepOptions:
    """The options of `SamplerConfig` that the kernel is compiled for."""

    prediction_type: str
    action_update: str
    clip_std: float | None
    clip_order: str
    clip_final_actions: bool
    policy_input: str
    limits_state_change: bool
    variance_type: str
    clips_denoiser_actions: bool
    max_guidance: float | None


def schedule_table(schedule, options: StepOptions, config) -> Tensor:
    """Return the constants of every step, [K, 8] float32, on the schedule's device.

    Args:
        schedule: a `NoiseSchedule`. options: as for the kernel. config: the `SamplerConfig`.
    """
    table = schedule.betas.new_zeros((schedule.num_train_timesteps, NUM_COLUMNS.value))
    table[:, X_SCALE.value] = schedule.sqrt_recip_alphas_cumprod
    table[:, PREDICTION_SCALE.value] = schedule.sqrt_recipm1_alphas_cumprod
    coefficients = schedule.step_coefficients(options.variance_type)
    for column, values in zip((DENOISED_COEF, X_COEF, NOISE_STD), coefficients, strict=True):
        table[:, column.value] = values
    table[:, CHANGE_LIMIT.value] = float("inf")
    if options.limits_state_change:
        table[: config.clip_state_change_steps, CHANGE_LIMIT.value] = config.clip_state_change
    table[:, ACTION_SCALE.value] = schedule.alphas_cumprod.sqrt() if config.scale_actions else 1.0
    return table.contiguous()


def step_options(config) -> StepOptions:
    """Return what the kernel needs of a `SamplerConfig`."""
    check_choices(config)
    return StepOptions(
        prediction_type=config.prediction_type,
        action_update=config.action_update,
        clip_std=config.clip_std,
        clip_order=config.clip_order,
        clip_final_actions=config.clip_final_actions,
        policy_input=config.policy_input,
        limits_state_change=config.clip_state_change is not None,
        variance_type=config.variance_type,
        clips_denoiser_actions=config.denoiser_actions == "clipped",
        max_guidance=config.max_guidance,
    )
