"""The diffusion of Policy-Guided Diffusion's released code is met: tables, network, training,
sampling.

The environment variable POLYGRAD_RECORDED_PGD names a folder of other recordings; every case of its
index.json of the kinds here is then run.
"""

import pytest
import torch
from recorded_pgd import INDEX, cases, recorded

from cases import part
from polygrad_fast.compat import pgd
from polygrad_fast.config import EDMConfig, EDMTrainingConfig
from polygrad_fast.diffusion.edm import (
    EDMTrainer,
    NoiseLevels,
    edm_loss,
    learning_rate,
    num_training_updates,
    preconditioning,
    training_sigma,
)

NETWORK, INNER = 2e-6, 6e-6
LOSS, GRADIENT, WEIGHTS = 1e-6, 5e-6, 6e-5
TABLE = 2e-6


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
