"""Results recorded from the released code are met."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.compat import official
from polygrad_fast.training.denoiser import denoising_loss

FIXTURES = Path(__file__).parents[1] / "fixtures" / "official"
INDEX = json.loads((FIXTURES / "index.json").read_text())
SAMPLES = [name for name in INDEX if name.startswith("sample_")]
UPDATE = {"grad": "score", "sample": "sample", "none": "none"}


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def part(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max().item()


def load_normalizer(arrays) -> pg.Normalizer:
    moments = {
        field: (arrays[f"normalizer.{field}.mean"], arrays[f"normalizer.{field}.std"])
        for field in ("observations", "actions", "rewards")
    }
    return pg.Normalizer.from_moments(**moments)


@pytest.mark.parametrize("num_steps, tau", [(128, 1.0), (128, 0.1), (16, 1.0), (7, 0.5)])
def test_schedule(num_steps, tau):
    tables = part(load("schedule"), f"N{num_steps}_tau{tau}.")
    schedule = pg.NoiseSchedule.cosine(num_steps, tau)
    assert len(tables) == 9
    for name, wanted in tables.items():
        got = getattr(schedule, name)
        assert got.dtype == torch.float32
        assert relative_error(got, wanted) < 1e-6, name


@pytest.mark.parametrize("name", [n for n in INDEX if n.startswith("denoiser_")])
def test_denoiser_loss_and_gradients(name):
    arrays, info = load(name), INDEX[name]
    denoiser = official.load_denoiser(
        part(arrays, "model."), info["observation_dim"], info["action_dim"], info["horizon"]
    )
    y = denoiser(arrays["x"], arrays["act"], arrays["t"])
    assert relative_error(y, arrays["y"]) < 1e-5

    config = pg.SamplerConfig.official(
        prediction_type="epsilon" if info["predict_epsilon"] else "sample"
    )
    schedule = pg.NoiseSchedule.cosine(info["n_timesteps"])
    loss, _ = denoising_loss(
        denoiser,
        arrays["x"],
        arrays["act"],
        arrays["t"],
        arrays["loss_noise_state"],
        schedule,
        config,
    )
    assert relative_error(loss, arrays["loss"]) < 1e-5
    loss.backward()
    released = official.export_denoiser(
        {n: p.grad for n, p in denoiser.named_parameters()}, denoiser
    )
    gradients = part(arrays, "grad.")
    assert len(gradients) >= 10
    for key, wanted in gradients.items():
        assert (released[key] - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max()), key


def build_sampler(name):
    arrays, info = load(name), INDEX[name]
    normalizer = load_normalizer(arrays)
    denoiser = official.load_denoiser(
        part(arrays, "model."), info["observation_dim"], info["action_dim"], info["horizon"]
    )
    policy = official.load_policy(
        part(arrays, "actor."), arrays["logstd"], info["min_std"], normalizer
    )
    variant = info["variant"]
    config = pg.SamplerConfig.official(
        prediction_type="epsilon" if info["predict_epsilon"] else "sample",
        action_update=UPDATE[variant["guidance_type"]],
        clip_std=variant["clip_std"],
        policy_input={"recon": "denoised"}.get(
            variant.get("states_for_guidance", "recon"), "posterior_mean"
        ),
        update_states=variant.get("update_states", False),
        clip_state_change=info["clip_state_change"],
    )
    schedule = pg.NoiseSchedule.cosine(info["n_timesteps"], info["noise_sched_tau"])
    sampler = pg.PolicyGuidedSampler(
        denoiser, policy, schedule, normalizer, config, engine="reference"
    )
    return sampler, arrays, info


@pytest.mark.parametrize("name", SAMPLES)
def test_sampling_chain(name):
    sampler, arrays, info = build_sampler(name)
    noise = pg.SampleNoise(
        arrays["x_init"], arrays["act_init"], arrays["state_noise"], arrays["action_noise"]
    )
    batch = sampler.sample(
        arrays["s0"], info["guidance_scale"], noise=noise, normalized=True, return_chain=True
    )
    for k in range(info["n_timesteps"]):
        assert relative_error(batch.chain_trajectories[k], arrays["x_chain"][k]) < 1e-5, k
        assert relative_error(batch.chain_actions[k], arrays["act_chain"][k]) < 1e-5, k
    assert torch.equal(batch.actions, batch.chain_actions[-1])
    assert torch.equal(batch.observations[:, 0], arrays["s0"])


@pytest.mark.parametrize("name", ["a2c_raw_inputs", "a2c_normed_inputs"])
def test_a2c_update(name):
    arrays, info = load(name), INDEX[name]
    actor_critic = official.load_actor_critic(
        part(arrays, "before.actor."),
        part(arrays, "before.critic."),
        log_std=arrays["before.logstd"],
        normalizer=load_normalizer(arrays),
        config=pg.A2CConfig(),
        normed_inputs=info["use_normed_inputs"],
    )
    metrics = actor_critic.update(
        arrays["states"], arrays["actions_normed"], arrays["rewards"], arrays["terminals"]
    )
    for ours, theirs in {
        "actor_loss": "loss_actor",
        "critic_loss": "loss_critic",
        "entropy": "policy_entropy",
        "action_mean": "act_mean",
        "action_std": "act_std",
        "update_size_initial": "update_delta_logprob_initial",
        "update_size": "update_delta_logprob_final",
        "linesearch_steps": "update_linesearch_steps",
        "actor_learning_rate": "lr_actor",
        "actor_grad_norm": "gradients/actor_grad_norm",
        "critic_grad_norm": "gradients/critic_grad_norm",
        "policy_std": "policy_std",
        "value": "policy_value",
        "reward": "policy_reward",
    }.items():
        assert metrics[ours] == pytest.approx(arrays[f"metric.{theirs}"].item(), rel=1e-4), ours
    after = part(arrays, "after.")
    modules = {
        "actor.model.": actor_critic.policy.network,
        "critic.model.": actor_critic.value_function.network,
        "critic_target.model.": actor_critic.target_value_function.network,
    }
    for prefix, module in modules.items():
        weights = part(after, prefix)
        assert weights
        for key, wanted in weights.items():
            got = module.state_dict()[key]
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-7), prefix + key
    assert torch.allclose(actor_critic.policy.log_std, after["logstd"], rtol=1e-4, atol=1e-7)
