"""The diffusion of Policy-Guided Diffusion's released code is met: tables, network, training,
sampling.

The environment variable POLYGRAD_RECORDED_PGD names a folder of other recordings; every case of its
index.json of the kinds here is then run.
"""

import pytest
import torch

from cases import part
from polygrad_fast.compat import pgd
from polygrad_fast.config import EDMConfig, EDMTrainingConfig, PolicyGuidanceConfig
from polygrad_fast.diffusion.edm import (
    EDMTrainer,
    NoiseLevels,
    denoise,
    edm_loss,
    learning_rate,
    num_training_updates,
    preconditioning,
    training_sigma,
)
from polygrad_fast.sampling.edm_sampler import EDMNoise, EDMSampler
from polygrad_fast.sampling.heun import heun_step
from polygrad_fast.sampling.policy_score import PolicyGuidance, guidance_weights, policy_score
from polygrad_fast.trajectory_normalizer import TrajectoryNormalizer
from recorded_pgd import INDEX, cases, recorded

NETWORK, INNER = 3e-6, 6e-6  # denoiser_c's output is recorded 2.05e-6 from float64's
LOSS, GRADIENT, WEIGHTS = 1e-6, 5e-6, 6e-5
TABLE = 2e-6
GUIDANCE, TRAJECTORY, TRANSITION = 6e-4, 5e-5, 1e-5


def error(got, wanted) -> float:
    """Return the norm of the error, relative to that of what is wanted."""
    wanted = torch.as_tensor(wanted).double()
    got = torch.as_tensor(got).double()
    assert got.shape == wanted.shape
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def table_error(got, wanted) -> float:
    """Return the largest relative error of an entry; where 0 is wanted, nothing else will do."""
    got, wanted = torch.as_tensor(got).double(), wanted.double()
    assert got.shape == wanted.shape
    assert (got[wanted == 0] == 0).all()
    return ((got - wanted).abs() / wanted.abs().clamp(min=1e-30)).max().item()


def load_denoiser(name: str):
    info = INDEX[name]
    parameters = part(recorded(name), "parameters.")
    return pgd.load_denoiser(parameters, info["observation_dim"], info["action_dim"])


@pytest.mark.parametrize("name", cases("preconditioning"))
def test_preconditioning(name):
    arrays = recorded(name)
    for sigma_data in INDEX[name]["sigma_data"]:
        got = preconditioning(arrays["sigma"], sigma_data)
        for factor in ("c_skip", "c_out", "c_in"):
            wanted = arrays[f"sigma_data_{sigma_data}.{factor}"]
            assert table_error(getattr(got, factor), wanted) < TABLE, factor
        assert error(got.c_noise, arrays["c_noise"]) < TABLE


@pytest.mark.parametrize("name", cases("schedules"))
def test_schedules(name):
    arrays = recorded(name)
    for case, info in INDEX[name]["cases"].items():
        levels = NoiseLevels.of(edm_config(info))
        assert table_error(levels.sigma, arrays[f"{case}.sigma"]) < TABLE, case
        assert table_error(levels.gamma, arrays[f"{case}.gamma"]) < TABLE, case
        assert table_error(levels.sigma_hat, arrays[f"{case}.sigma_hat"]) < TABLE, case
    for case, info in INDEX[name]["denoiser_learning_rates"].items():
        config = EDMTrainingConfig(
            learning_rate=info["learning_rate"],
            batch_size=info["batch"],
            num_epochs=info["epochs"],
        )
        total = num_training_updates(info["dataset_length"], config)
        wanted = arrays[f"denoiser_lr_{case}"]
        assert len(wanted) == total
        got = [learning_rate(update, total, config) for update in range(total)]
        # float32 loses the digits of a cosine near its end
        assert (torch.tensor(got) - wanted).abs().max() < TABLE * info["learning_rate"], case


def edm_config(info) -> EDMConfig:
    names = ("sigma_min", "sigma_max", "rho", "s_churn", "s_tmin", "s_tmax")
    options = {name: float(info[name]) for name in names}
    return EDMConfig(
        num_inference_steps=info["steps"],
        sigma_data=info.get("sigma_data", 1.0),
        s_noise=info.get("s_noise", 1.003),
        second_order=not info.get("first_order", False),
        **options,
    )


@pytest.mark.parametrize("name", cases("denoiser"))
def test_denoiser(name):
    arrays = recorded(name)
    network, info = load_denoiser(name), INDEX[name]
    assert (network.features, network.num_levels) == (info["features"], info["blocks"])

    found = {}

    def keep(key):
        def hook(module, inputs, output):
            found[key] = output.detach().transpose(1, 2) if output.ndim == 3 else output.detach()

        return hook

    network.noise_embedding.register_forward_hook(keep("time_embedding"))
    network.encoder[0].conv_1.register_forward_hook(keep("first_convolution"))
    network.encoder[0].norm_1.register_forward_hook(keep("first_group_norm"))
    for i, level in enumerate(network.encoder):
        level.register_forward_hook(keep(f"encoder_level_{i}"))
    if network.decoder:
        network.decoder[0].conv_1.register_forward_hook(keep("first_decoder_convolution"))
    with torch.no_grad():
        output = network(arrays["input"], arrays["noise_condition"])
    assert error(output, arrays["output"]) < NETWORK
    for key, got in found.items():
        wanted = arrays[key].squeeze(1) if key == "time_embedding" else arrays[key]
        assert error(got, wanted) < INNER, key

    exported = pgd.export_denoiser(network.state_dict())
    parameters = part(arrays, "parameters.")
    assert exported.keys() == parameters.keys()
    assert all(torch.equal(exported[key], parameters[key]) for key in parameters)


@pytest.mark.parametrize("name", cases("denoiser_loss"))
def test_denoiser_loss(name):
    arrays, info = recorded(name), INDEX[name]
    network = load_denoiser(info["denoiser"])
    config = EDMTrainingConfig(p_mean=info["p_mean"], p_std=info["p_std"])
    sigma = training_sigma(arrays["sigma_normal"], config)
    assert table_error(sigma, arrays["sigma"]) < TABLE
    loss = edm_loss(network, arrays["batch"], sigma, arrays["noise"], info["sigma_data"])
    assert error(loss, arrays["loss"]) < LOSS
    loss.backward()
    gradients = pgd.export_denoiser({n: p.grad for n, p in network.named_parameters()})
    wanted = part(arrays, "gradient.")
    assert gradients.keys() == wanted.keys()
    for key in wanted:
        assert error(gradients[key], wanted[key]) < GRADIENT, key


@pytest.mark.parametrize("name", cases("denoiser_training"))
def test_denoiser_training(name):
    arrays, info = recorded(name), INDEX[name]
    network = load_denoiser(info["denoiser"])
    config = EDMTrainingConfig(
        p_mean=info["p_mean"],
        p_std=info["p_std"],
        learning_rate=info["learning_rate"],
        batch_size=info["batch"],
        num_epochs=info["epochs"],
        ema_decay=info["ema_decay"],
        ema_interval=info["ema_update_every"],
    )
    total = num_training_updates(info["dataset_length"], config)
    trainer = EDMTrainer(network, total, config, info["sigma_data"])
    for step in range(info["steps"]):
        metrics = trainer.update(
            arrays["batches"][step],
            sigma_normal=arrays["sigma_normal"][step],
            noise=arrays["noise"][step],
        )
        # Adam's first steps are signs of gradients, whose rounding the next loss shows
        assert error(metrics["loss"], arrays["losses"][step]) < (LOSS if step == 0 else WEIGHTS)
        assert metrics["learning_rate"] == pytest.approx(
            arrays["learning_rate"][step].item(), rel=TABLE
        )
    for key, module in (("after", trainer.model), ("ema", trainer.ema_model)):
        got, wanted = pgd.export_denoiser(module.state_dict()), part(arrays, f"{key}.")
        assert got.keys() == wanted.keys()
        for weight in wanted:
            assert error(got[weight], wanted[weight]) < WEIGHTS, (key, weight)


STEP_KEYS = (
    "guidance_trajectory",
    "guidance_gradient",
    "guidance_direction",
    "trajectory_after_guidance",
    "trajectory_churned",
    "denoised",
    "trajectory_euler",
    "trajectory_after_step",
)


class RecordedPolicy:
    """The released agents' actor on raw observations, from its recorded weights."""

    def __init__(self, info, arrays):
        self.layers = [
            (arrays[f"policy.Dense_{i}.kernel"], arrays[f"policy.Dense_{i}.bias"]) for i in range(3)
        ]
        low, high = info["action_limits"]
        self.scale, self.bias = (high - low) / 2, (high + low) / 2
        self.log_std = arrays.get("policy.logstd")
        self.moments = None
        if info["policy_normalizes_observations"]:
            self.moments = (
                arrays["policy_observation_mean"],
                arrays["policy_observation_std"] + 1e-3,
            )
        self.activation = {"relu": torch.relu, "tanh": torch.tanh}[info["policy_activation"]]

    def __call__(self, observations):
        x = observations
        if self.moments is not None:
            x = (x - self.moments[0]) / self.moments[1]
        for kernel, bias in self.layers[:-1]:
            x = self.activation(x @ kernel + bias)
        kernel, bias = self.layers[-1]
        action = self.bias + self.scale * torch.tanh(x @ kernel + bias)
        if self.log_std is None:
            return action
        return action, self.log_std.clamp(-20, 2).exp().expand_as(action)


class RecordedSample:
    """One recorded sample and this library's parts for it."""

    def __init__(self, name: str):
        self.info = info = INDEX[name]
        self.arrays = recorded(name)
        self.config = edm_config(info)
        self.levels = NoiseLevels.of(self.config)
        self.network = load_denoiser(info["denoiser"])
        moments = part(recorded(info["denoiser"]), "normalizer.")
        mean, std = (
            torch.cat(
                [moments[f"{field}.{moment}"] for field in ("obs", "action", "reward", "done")]
            )
            for moment in ("mean", "std")
        )
        dims = info["observation_dim"], info["action_dim"]
        self.normalizer = TrajectoryNormalizer(mean, std, *dims)
        self.guidance = None
        if info["policy"] is not None:
            options = PolicyGuidanceConfig(
                coefficient=float(info["guidance_coefficient"]),
                cosine_coefficient=info["cosine_coefficient"],
                delay_steps=info["delay_steps"],
                normalize=info["normalize_guidance"],
                denoised=info["denoised_guidance"],
            )
            policy = RecordedPolicy(info, self.arrays)
            assert (policy.log_std is None) == (info["policy"] == "deterministic")
            self.guidance = PolicyGuidance(policy, self.normalizer, options)

    def denoise(self, trajectories, sigma):
        levels = torch.full((len(trajectories),), sigma)
        return denoise(self.network, trajectories, levels, self.config.sigma_data)


@pytest.mark.parametrize("name", cases("sample"))
@torch.no_grad()
def test_steps(name):
    """Each recorded step from the recorded trajectory before it, where that is recorded too."""
    sample = RecordedSample(name)
    arrays, levels = sample.arrays, sample.levels
    for key in ("sigma", "gamma", "sigma_hat"):
        assert table_error(getattr(levels, key), arrays[key]) < TABLE, key
    start = levels.sigma[0] * arrays["initial_noise"]
    assert error(start, arrays["trajectory_start"]) < TABLE
    guidance = sample.guidance
    if guidance is not None:
        weights = torch.tensor(guidance_weights(guidance.config, levels))
        assert (weights - arrays["guidance_weight"]).abs().max() < TABLE * weights.max()

    rows = {int(step): row for row, step in enumerate(arrays["recorded_steps"])}
    assert rows
    before = arrays["trajectory_start"]
    for step, noise in enumerate(arrays["step_noise"]):
        got = heun_step(before, step, levels, sample.config, sample.denoise, noise, guidance)
        if step not in rows:
            before = got.trajectories
            continue
        wanted = {k: arrays[k][rows[step]] for k in STEP_KEYS if k in arrays}
        for key, value in (
            ("trajectory_after_guidance", got.guided),
            ("trajectory_churned", got.churned),
            ("denoised", got.denoised),
            ("trajectory_euler", got.euler),
            ("trajectory_after_step", got.trajectories),
        ):
            if key in wanted:
                assert error(value, wanted[key]) < TRAJECTORY, (step, key)
        if guidance is not None:
            at = before
            if guidance.config.denoised:
                at = sample.denoise(before, levels.sigma[step])
            if "guidance_trajectory" in wanted:
                assert error(at, wanted["guidance_trajectory"]) < TRAJECTORY, step
            if "guidance_gradient" in wanted:
                gradient = policy_score(guidance.policy, at, sample.normalizer)
                assert error(gradient, wanted["guidance_gradient"]) < GUIDANCE, step
            assert error(guidance.direction(at), wanted["guidance_direction"]) < GUIDANCE, step
        before = wanted["trajectory_after_step"]


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("name", cases("sample"))
def test_whole_chain(name, engine):
    sample = RecordedSample(name)
    arrays = sample.arrays
    sampler = EDMSampler(sample.network, sample.config, engine=engine)
    noise = EDMNoise(arrays["initial_noise"], arrays["step_noise"])
    batch, length, _ = arrays["initial_noise"].shape
    result = sampler.sample(batch, length, noise=noise, guidance=sample.guidance, return_chain=True)
    rows = arrays["recorded_steps"].long()
    for row, got, wanted in zip(
        rows.tolist(), result.chain[rows], arrays["trajectory_after_step"], strict=True
    ):
        assert error(got, wanted) < TRAJECTORY, row
    assert torch.equal(result.trajectories, result.chain[-1])
    raw = sample.normalizer.unnormalize(result.trajectories)
    for key, got in (
        ("observation", raw.observations[:, :-1]),
        ("action", raw.actions[:, :-1]),
        ("reward", raw.rewards[:, :-1, None]),
        ("next_observation", raw.observations[:, 1:]),
    ):
        assert error(got, arrays[f"rollout.{key}"]) < TRANSITION, key
    assert torch.equal(raw.terminals[:, :-1, None], arrays["rollout.done"].float())
