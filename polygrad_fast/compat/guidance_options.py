"""Options of the released code's guided sampling, checked, in this library's terms."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from polygrad_fast.config import SamplerConfig
from polygrad_fast.errors import InputError

ACTION_UPDATES = {"grad": "score", "sample": "sample", "none": "none"}
POLICY_INPUTS = {"recon": "denoised", "posterior_mean": "posterior_mean"}


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of a guided call, with the released code's defaults."""

    guidance_scale: float | Tensor = 1.0
    action_noise_scale: float = 1.0
    clip_std: float | None = None
    states_for_guidance: str = "recon"
    update_states: bool = False
    guidance_type: str = "grad"
    clip_state_change: float = 1.0

    @classmethod
    def from_call(cls, options: dict[str, Any]) -> GuidanceOptions:
        """Check the names of a call's keyword arguments, and values that no sampler knows."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise InputError(f"options must be among {sorted(known)}, got {name!r}")
        result = cls(**options)
        for name, allowed in (
            ("guidance_type", ACTION_UPDATES),
            ("states_for_guidance", POLICY_INPUTS),
        ):
            got = getattr(result, name)
            if got not in list(allowed):
                raise InputError(f"{name} must be one of {list(allowed)}, got {got!r}")
        scale = result.action_noise_scale
        if not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
            raise InputError(f"action_noise_scale must be a finite number, got {scale!r}")
        return result

    def checked_guidance_scale(self) -> float | Tensor:
        """Return the guidance scale, a tensor without its graph; reads it on the host."""
        scale = self.guidance_scale
        if torch.is_tensor(scale):
            scale = scale.detach()
            if scale.numel() != 1 or scale.ndim > 3:
                raise InputError(
                    f"guidance_scale must be one number, got shape {tuple(scale.shape)}"
                )
        number = scale.item() if torch.is_tensor(scale) else scale
        if not (isinstance(number, numbers.Real) and 0 <= number < math.inf):
            raise InputError(
                f"guidance_scale must be a non-negative finite number, got {self.guidance_scale!r}"
            )
        return scale

    def sampler_config(self, prediction_type: str) -> SamplerConfig:
        """Return our options for the same mathematics."""
        return sampler_config(
            prediction_type,
            ACTION_UPDATES[self.guidance_type],
            _limit("clip_std", self.clip_std),
            POLICY_INPUTS[self.states_for_guidance],
            self.guidance_type == "grad" and bool(self.update_states),
            _limit("clip_state_change", self.clip_state_change),
        )


@functools.lru_cache  # building a configuration takes a millisecond
def sampler_config(
    prediction_type: str,
    action_update: str,
    clip_std: float | None,
    policy_input: str,
    update_states: bool,
    clip_state_change: float | None,
) -> SamplerConfig:
    """Return the sampler's options, the same object for the same values."""
    return SamplerConfig.official(
        prediction_type=prediction_type,
        action_update=action_update,
        clip_std=clip_std,
        policy_input=policy_input,
        update_states=update_states,
        clip_state_change=clip_state_change,
    )


def check_call(cond: Any, policy: Any, guidance_options: dict[str, Any]) -> None:
    """Raise InputError for arguments that the released code does not take either."""
    if policy is None and guidance_options:
        raise InputError(
            f"policy must be given with the options {sorted(guidance_options)}, which the "
            f"released code takes with one only, got None"
        )
    if not isinstance(cond, dict) or 0 not in cond:
        raise InputError(
            f"cond must be a dictionary with the observations [B, S] under 0, got "
            f"{list(cond) if isinstance(cond, dict) else type(cond).__name__}"
        )
    if not torch.is_tensor(cond[0]) or cond[0].ndim != 2:
        shape = tuple(cond[0].shape) if torch.is_tensor(cond[0]) else type(cond[0]).__name__
        raise InputError(f"cond[0] must be a tensor [B, S] of observations, got {shape}")


def _limit(name: str, value: float | None) -> float | None:
    """Return a bound as our options take it: infinity is no bound."""
    if value is None or value == math.inf:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{name} must be a positive number or None, got {value!r}")
    return float(value)
