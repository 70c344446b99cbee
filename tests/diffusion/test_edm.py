import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygrad_fast.config import EDMConfig, EDMTrainingConfig, PolicyGuidanceConfig
from polygrad_fast.diffusion.edm import (
    EDMTrainer,
    NoiseLevels,
    denoise,
    edm_loss,
    epoch_batches,
    learning_rate,
    num_training_updates,
    preconditioning,
    training_sigma,
)
from polygrad_fast.errors import InputError


@given(sigma=st.floats(1e-3, 100), sigma_data=st.floats(0.1, 3))
def test_preconditioning_keeps_variances(sigma, sigma_data):
    """Inputs and targets have variance 1, where data have sigma_data^2 (appendix B.6)."""
    c = preconditioning(torch.tensor([sigma], dtype=torch.float64), sigma_data)
    assert c.c_in.item() ** 2 * (sigma**2 + sigma_data**2) == pytest.approx(1)
    # target (y - c_skip (y + n)) / c_out
    of_target = (1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2
    assert (of_target / c.c_out**2).item() == pytest.approx(1)
    assert math.exp(4 * c.c_noise.item()) == pytest.approx(sigma)


def test_the_loss_is_the_weighted_error():
    generator = torch.Generator().manual_seed(0)
    batch, noise = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    called = []

    def network(x, c):
        called.append((x, c))
        return x * c[:, None, None]

    loss = edm_loss(network, batch, sigma, noise, 0.5)
    wanted = 0.0
    for b, s in enumerate(sigma.tolist()):
        root = math.sqrt(s**2 + 0.25)
        noisy = batch[b] + s * noise[b]
        output = noisy / root * math.log(s) / 4
        error = 0.25 / root**2 * noisy + s * 0.5 / root * output - batch[b]
        wanted += root**2 / (s * 0.5) ** 2 * error.square().sum().item()
    assert loss.item() == pytest.approx(wanted / batch.numel())
    assert len(called) == 1 and called[0][1].shape == (3,)


def test_training_noise_levels_are_log_normal():
    sigma = training_sigma(torch.tensor([-1.0, 0.0, 2.0]), EDMTrainingConfig(p_mean=-1, p_std=0.5))
    assert sigma.log().tolist() == pytest.approx([-1.5, -1.0, 0.0], abs=1e-6)


@settings(max_examples=50)
@given(
    n=st.integers(2, 50),
    rho=st.floats(1, 10),
    churn=st.floats(0, 100),
    smin=st.floats(1e-3, 0.1),
    smax=st.floats(1, 100),
)
def test_noise_levels(n, rho, churn, smin, smax):
    config = EDMConfig(
        num_inference_steps=n, rho=rho, s_churn=churn, sigma_min=smin, sigma_max=smax
    )
    levels = NoiseLevels.of(config)
    assert levels.num_steps == n and len(levels.sigma) == n + 1
    assert levels.sigma[0] == pytest.approx(smax) and levels.sigma[n - 1] == pytest.approx(smin)
    assert levels.sigma[n] == 0 and all(a > b for a, b in pairwise(levels.sigma))
    steps = [s ** (1 / rho) for s in levels.sigma[:-1]]
    assert all(
        a - b == pytest.approx((steps[0] - steps[-1]) / (n - 1), rel=1e-6, abs=1e-9)
        for a, b in pairwise(steps)
    )
    for sigma, gamma, raised in zip(levels.sigma[:-1], levels.gamma, levels.sigma_hat, strict=True):
        inside = config.s_tmin <= sigma <= config.s_tmax
        assert gamma == (min(churn / n, math.sqrt(2) - 1) if inside else 0)
        assert raised == sigma * (1 + gamma)


def test_learning_rate():
    config = EDMTrainingConfig(learning_rate=1.0)
    rates = [learning_rate(j, 100, config) for j in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[5] == pytest.approx(0.55)
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert learning_rate(200, 100, config) == pytest.approx(0)
    assert learning_rate(0, 5, config) == 1.0  # no warm-up in so few


def test_batches_of_an_epoch():
    config = EDMTrainingConfig(batch_size=4, num_epochs=3)
    assert num_training_updates(11, config) == 6
    first, other = (
        list(epoch_batches(11, 4, torch.Generator().manual_seed(seed))) for seed in (0, 1)
    )
    assert [len(batch) for batch in first] == [4, 4]
    used = torch.cat(first).tolist()
    assert len(set(used)) == 8 and set(used) <= set(range(11))
    assert used != torch.cat(other).tolist()
    with pytest.raises(InputError, match="batch_size must be at most .* windows, 3, got 4"):
        num_training_updates(3, config)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, c):
        return self.weight * x


def make_trainer(interval=3, **options):
    config = EDMTrainingConfig(ema_interval=interval, ema_decay=0.9, **options)
    return EDMTrainer(Scale(), 20, config)


def batches(count):
    return torch.randn(count, 4, 5, 3, generator=torch.Generator().manual_seed(0))


def test_the_average_moves_after_every_third_update():
    trainer = make_trainer()
    average = 0.5
    for count, batch in enumerate(batches(7), 1):
        trainer.update(batch, torch.Generator().manual_seed(count))
        if count % 3 == 0:
            average = 0.9 * average + 0.1 * trainer.model.weight.item()
        assert trainer.ema_model.weight.item() == pytest.approx(average, rel=1e-6), count
    assert average != 0.5


def test_the_first_update_is_adams_with_the_learning_rate():
    trainer = make_trainer(learning_rate=0.01)
    metrics = trainer.update(batches(1)[0], torch.Generator().manual_seed(0))
    assert metrics["learning_rate"] == pytest.approx(0.001)
    assert abs(trainer.model.weight.item() - 0.5) == pytest.approx(0.001, rel=1e-4)
    metrics = trainer.update(batches(1)[0], torch.Generator().manual_seed(0))
    assert metrics["learning_rate"] == pytest.approx(0.0055)


def test_training_resumes_exactly():
    whole, part = make_trainer(), make_trainer()
    data = batches(8)
    for trainer, count in ((whole, 8), (part, 5)):
        for step in range(count):
            trainer.update(data[step], torch.Generator().manual_seed(step))
    resumed = make_trainer()
    resumed.model.load_state_dict(part.model.state_dict())
    resumed.ema_model.load_state_dict(part.ema_model.state_dict())
    resumed.load_state_dict(part.state_dict())
    for step in range(5, 8):
        resumed.update(data[step], torch.Generator().manual_seed(step))
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.ema_model.weight, whole.ema_model.weight)


def test_training_learns_the_posterior_mean():
    """Of data N(0, 0.5^2), sigma_data 0.5, the best output is F = 0 for every sigma."""
    trainer = EDMTrainer(Scale(), 400, EDMTrainingConfig(learning_rate=0.02), sigma_data=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        trainer.update(0.5 * torch.randn(64, 4, 2, generator=generator), generator)
    assert abs(trainer.model.weight.item()) < 0.02
    x = torch.full((1, 2, 2), 0.7)
    denoised = denoise(trainer.model, x, torch.tensor([0.5]), 0.5)
    assert denoised[0, 0, 0].item() == pytest.approx(0.35, abs=0.01)


@pytest.mark.parametrize(
    ("config", "option", "value", "message"),
    [
        (EDMConfig, "num_inference_steps", 1, "at least 2, got 1"),
        (EDMConfig, "sigma_max", 0.001, "above 0.002, got 0.001"),
        (EDMConfig, "s_tmax", 0.01, "at least s_tmin, 0.05, got 0.01"),
        (EDMConfig, "euler_from", "both", r"one of \['trajectory', 'churned'\], got 'both'"),
        (EDMTrainingConfig, "warmup_fraction", 1.0, r"in \[0, 1\), got 1.0"),
        (EDMTrainingConfig, "ema_decay", 1.5, r"in \[0, 1\], got 1.5"),
        (PolicyGuidanceConfig, "schedule", "cosine", "got 'cosine'"),
        (PolicyGuidanceConfig, "delay_steps", -1, "at least 0, got -1"),
    ],
)
def test_options_out_of_range(config, option, value, message):
    with pytest.raises(InputError, match=f"{config.__name__}.{option} must be .*{message}"):
        config(**{option: value})


def test_presets():
    assert EDMConfig.paper() == EDMConfig(euler_from="churned")
    assert EDMTrainingConfig.paper(num_epochs=3).batch_size == 16
    paper = PolicyGuidanceConfig.paper()
    assert paper.normalize and paper.denoised and paper.coefficient == 1.0
    assert PolicyGuidanceConfig().coefficient == 0.0
