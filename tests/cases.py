"""What several rooms' tests share: small configurations and the recorded results of the released
code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import polygrad_fast as pg
from polygrad_fast.compat import official
from polygrad_fast.sampling.components import SamplerComponents

RECORDED = Path(__file__).parent / "fixtures" / "official"
INDEX = json.loads((RECORDED / "index.json").read_text())
ACTION_UPDATES = ("score", "sample", "exact", "none")
SAMPLES = [name for name in INDEX if name.startswith("sample_")]
UPDATE = {"grad": "score", "sample": "sample", "none": "none"}
"""Names of action updates: the released code's to ours."""


def changed(config: pg.TrainConfig, **options) -> pg.TrainConfig:
    """Return the configuration with options such as denoiser__hidden_dim=8."""
    for name, value in options.items():
        group, _, option = name.rpartition("__")
        part = replace(getattr(config, group), **{option: value}) if group else None
        config = replace(config, **({group: part} if group else {option: value}))
    return config


def tiny_config(**overrides) -> pg.TrainConfig:
    """Return a configuration that trains on Pendulum-v1 in a second; overrides as in `changed`."""
    options = {
        "horizon": 4,
        "schedule__num_train_timesteps": 3,
        "sampler__clip_state_change": None,
        "sampler__denoiser_actions": "clipped",
        "sampler__max_guidance": 0.5,
        "denoiser__learning_rate": 1e-3,
        "denoiser__ema_decay": 0.9,
        "denoiser__ema_start": 0,
        "denoiser__updates_per_env_step": 0.5,
        "denoiser__hidden_dim": 16,
        "denoiser__num_layers": 1,
        "denoiser__batch_size": 16,
        "denoiser__pretrain_updates": 5,
        "autoregressive__hidden_dim": 16,
        "autoregressive__num_layers": 1,
        "autoregressive__batch_size": 16,
        "autoregressive__pretrain_updates": 5,
        "ensemble__hidden_dim": 16,
        "ensemble__num_layers": 1,
        "ensemble__batch_size": 16,
        "ensemble__pretrain_updates": 5,
        "transformer__hidden_dim": 16,
        "transformer__num_layers": 1,
        "transformer__learning_rate": 1e-3,
        "transformer__batch_size": 16,
        "transformer__pretrain_updates": 5,
        "autoregressive_diffusion__hidden_dim": 16,
        "autoregressive_diffusion__num_layers": 1,
        "autoregressive_diffusion__learning_rate": 1e-3,
        "autoregressive_diffusion__batch_size": 16,
        "autoregressive_diffusion__pretrain_updates": 5,
        "autoregressive_diffusion__sampler": pg.config.EDMConfig.paper(num_inference_steps=32),
        "policy__hidden_dim": 8,
        "policy__min_std": 0.3,
        "policy__normed_inputs": True,
        "a2c__saturation_coef": 0.03,
        "a2c__actor_learning_rate": 3e-3,
        "a2c__actor_learning_rate_lr": 0.03,
        "a2c__critic_learning_rate": 2e-3,
        "a2c__target_critic_decay": 0.98,
        "a2c__target_update": 0.02,
        "a2c__final_target_update": 0.01,
        "a2c__reward_rms": 0.1,
        "guidance__initial": 0.05,
        "guidance__learning_rate": 1e-2,
        "guidance__statistic": "mean_abs",
        "guidance__maximum": 0.5,
        "normalizer__refresh": "prefill",
        "normalizer__min_std_rewards": 0.1,
        "normalizer__min_std_terminals": 0.1,
        "policy_updates_per_env_step": 0.5,
        "policy_delay_steps": 0,
        "replay_capacity": 200_000,
        "cpu_threads": 1,
        "imagined_batch_size": 8,
        "learning_starts": 40,
        "eval_interval": 60,
        "eval_episodes": 2,
        "log_interval": 25,
        "checkpoint_interval": 50,
        "total_timesteps": 150,
    }
    return changed(pg.TrainConfig(), **(options | overrides))


@st.composite
def sampler_configs(draw, num_inference_steps=(None, 1, 2)) -> pg.SamplerConfig:
    """Draw a sampler's configuration of every combination of options."""
    action_update = draw(st.sampled_from(ACTION_UPDATES))
    policy_input = draw(st.sampled_from(["denoised", "posterior_mean", "noisy"]))
    moves_states = action_update == "score" and policy_input != "noisy"
    return pg.SamplerConfig(
        prediction_type=draw(st.sampled_from(["sample", "epsilon"])),
        action_update=action_update,
        clip_std=draw(st.sampled_from([None, 0.5, 3.0])),
        clip_order=draw(st.sampled_from(["before", "after"])),
        clip_final_actions=draw(st.booleans()),
        policy_input=policy_input,
        update_states=moves_states and draw(st.booleans()),
        clip_state_change=draw(st.sampled_from([None, 0.05, 0.25])),
        clip_state_change_steps=draw(st.sampled_from([0, 1, 3, 11])),
        variance_type=draw(st.sampled_from(["posterior", "beta"])),
        scale_actions=draw(st.booleans()),
        denoiser_actions=draw(st.sampled_from(["raw", "clipped"])),
        max_guidance=draw(st.sampled_from([None, 0.1, 1.0])),
        num_inference_steps=draw(st.sampled_from(num_inference_steps)),
    )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the largest error, relative to what is wanted where that is above 1."""
    return ((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max().item()


def recorded_arrays(name: str, folder: Path = RECORDED) -> dict[str, Tensor]:
    """Return what is recorded of one case."""
    with np.load(folder / f"{name}.npz") as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, which is taken off."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def recorded_moments(arrays: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the recorded (mean, std) of observations, actions and rewards."""
    return {
        field: (arrays[f"normalizer.{field}.mean"], arrays[f"normalizer.{field}.std"])
        for field in ("observations", "actions", "rewards")
    }


class RecordedSample(NamedTuple):
    """A recorded call of the released sampler, and the parts of this library's."""

    components: SamplerComponents
    arrays: dict[str, Tensor]
    noise: pg.SampleNoise
    guidance_scale: float


def recorded_sample(
    name: str, device: str | torch.device = "cpu", folder: Path = RECORDED
) -> RecordedSample:
    """Return a recorded sample on a device."""
    info = json.loads((folder / "index.json").read_text())[name]
    arrays = recorded_arrays(name, folder)
    variant = info["variant"]
    read = variant.get("states_for_guidance", "recon")
    dims = info["observation_dim"], info["action_dim"], info["horizon"]
    arrays = {key: value.to(device) for key, value in arrays.items()}
    normalizer = pg.Normalizer.from_moments(**recorded_moments(arrays))
    config = pg.SamplerConfig.official(
        prediction_type="epsilon" if info["predict_epsilon"] else "sample",
        action_update=UPDATE[variant["guidance_type"]],
        clip_std=variant["clip_std"],
        policy_input="denoised" if read == "recon" else "posterior_mean",
        update_states=variant.get("update_states", False),
        clip_state_change=info["clip_state_change"],
    )
    policy = official.load_policy(
        part(arrays, "actor."), arrays["logstd"], info["min_std"], normalizer
    )
    components = SamplerComponents(
        official.load_denoiser(part(arrays, "model."), *dims).to(device),
        policy.to(device),
        pg.NoiseSchedule.cosine(info["n_timesteps"], info["noise_sched_tau"]).to(device),
        normalizer.to(device),
        config,
        torch.device(device),
        None,
    )
    noise = pg.SampleNoise(
        *(arrays[key] for key in ("x_init", "act_init", "state_noise", "action_noise"))
    )
    return RecordedSample(components, arrays, noise, info["guidance_scale"])


def refresh_weights(*owners) -> None:
    """Compute the operands of engine "triton" from their modules' weights."""
    from polygrad_fast.sampling.triton_operands import Refresh

    refresh = Refresh(owners[0].sources()[0].device, *owners)
    assert refresh.follow() and not refresh.follow()
    refresh()
