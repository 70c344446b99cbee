"""What is imagined stays within what the data have shown, however wrong the network."""

from dataclasses import replace

import pytest
import torch

import polygrad_fast as pg
from cases import changed
from linear_system import HIGH, LOW, H, S, make_normalizer, make_windows, policy
from polygrad_fast.config import (
    AutoregressiveConfig,
    AutoregressiveDiffusionConfig,
    EnsembleConfig,
    TransformerModelConfig,
)
from polygrad_fast.denoisers.shown_range import ShownRange
from polygrad_fast.world_models import (
    Autoregressive,
    AutoregressiveDiffusion,
    Ensemble,
    Transformer,
)

BUILT = {
    "autoregressive": (Autoregressive, AutoregressiveConfig(hidden_dim=16)),
    "ensemble": (Ensemble, EnsembleConfig(hidden_dim=16, num_layers=2)),
    "transformer": (Transformer, TransformerModelConfig(hidden_dim=16, num_layers=1)),
    "diffusion": (AutoregressiveDiffusion, AutoregressiveDiffusionConfig(hidden_dim=16)),
}


def make_model(name):
    torch.manual_seed(0)
    built, config = BUILT[name]
    bounds = torch.tensor([LOW]), torch.tensor([HIGH])
    return built(config, H, make_normalizer(), bounds, torch.device("cpu"))


def shown(windows, normalizer):
    """Smallest and largest normalized observation and reward of the windows' real steps."""
    states = normalizer.normalize_trajectory(
        windows.observations, windows.rewards, windows.terminals
    )[..., :-1]
    real = states[windows.terminals.cumsum(1) <= 1]
    return real.amin(0), real.amax(0)


@pytest.mark.parametrize("name", BUILT)
def test_the_range_of_the_windows_is_noted_and_only_widens(name):
    model, normalizer = make_model(name), make_normalizer()
    low = torch.full((S + 1,), torch.inf)
    high = -low
    for seed in range(3):
        windows = make_windows(16, seed)
        model.update(windows, torch.Generator().manual_seed(0))
        least, most = shown(windows, normalizer)
        low, high = low.minimum(least), high.maximum(most)
        for network in model.modules().values():
            torch.testing.assert_close(network.range.lowest, low)
            torch.testing.assert_close(network.range.highest, high)


@pytest.mark.parametrize("name", BUILT)
def test_what_follows_a_terminal_step_shows_nothing(name):
    windows = make_windows(64, 0)
    ended = windows.terminals.cumsum(1) > 1
    assert ended.any()
    junk = replace(
        windows,
        observations=windows.observations.masked_fill(ended[..., None], 77.0),
        rewards=windows.rewards.masked_fill(ended, 55.0),
    )
    model = make_model(name)
    model.update(junk, torch.Generator().manual_seed(0))
    _, most = shown(windows, make_normalizer())
    torch.testing.assert_close(model.trainer.ema_model.range.highest, most)


@pytest.mark.parametrize("name", BUILT)
def test_a_model_that_diverges_is_held_back(name):
    model = make_model(name)
    windows = make_windows(64, 0)
    model.update(windows, torch.Generator().manual_seed(0))
    network = model.trainer.ema_model
    with torch.no_grad():
        network.difference_scale.fill_(1e4)
        for parameter in network.parameters():
            parameter.mul_(3.0)
    g = torch.Generator().manual_seed(1)
    batch = model.imagine(windows.observations[:, 0], policy, g)
    low, high = (bound[:-1] for bound in shown(windows, make_normalizer()))
    found = make_normalizer().normalize(batch.observations, "observations")
    assert (found >= low - 1e-4).all() and (found <= high + 1e-4).all()
    assert ((found - low).abs() < 1e-4).any() or ((found - high).abs() < 1e-4).any()
    low, high = windows.rewards.min(), windows.rewards.max()
    assert (batch.rewards >= low - 1e-4).all() and (batch.rewards <= high + 1e-4).all()


def test_without_windows_there_are_no_bounds():
    shown_range = ShownRange(S)
    observations, rewards = 1e20 * torch.randn(4, S), -1e20 * torch.ones(4)
    kept, paid = shown_range.clamp(observations, rewards)
    assert torch.equal(kept, observations) and torch.equal(paid, rewards)
    assert all(holds.all() for holds in shown_range.holds(observations, rewards))


def test_nan_is_not_hidden():
    shown_range = ShownRange(1)
    shown_range.note(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0]), torch.ones(2))
    kept, paid = shown_range.clamp(torch.tensor([[torch.nan]]), torch.tensor([torch.nan]))
    assert kept.isnan().all() and paid.isnan().all()


@pytest.mark.parametrize("name", ["autoregressive", "trajectory_diffusion"])
def test_what_is_cut_off_has_no_slope(name):
    """Of what is imagined, by finite differences through `imagine`, where some of it is bounded."""
    sizes = {"autoregressive__hidden_dim": 16, "denoiser__hidden_dim": 16, "dtype": "float32"}
    config = changed(pg.TrainConfig.from_preset("laptop"), world_model=name, **sizes)
    agent = pg.PolyGRAD("Pendulum-v1", device="cpu", config=config)
    model = agent.world_model
    network = model.trainer.ema_model
    network = getattr(network, "step", network)
    network.difference_scale.fill_(0.3)
    network.network[-1].bias.data[-1] = -14.0  # nothing ends
    bound = torch.tensor([0.4, 0.5, 0.6, 10.0])
    network.range.lowest.copy_(-bound)
    network.range.highest.copy_(bound)
    g = torch.Generator().manual_seed(0)
    starts, slope = torch.randn(32, 3, generator=g), torch.randn(32, 3, generator=g)

    def still(observation):  # a policy that does not react
        mean = torch.full_like(observation[..., :1], 0.3)
        return mean, torch.full_like(mean, 1e-9)

    def imagined(observations):
        batch = model.imagine(
            observations, still, torch.Generator().manual_seed(1), normalized=True
        )
        return batch.observations[:, 1]

    following = imagined(starts)
    assert (following.abs() <= bound[:-1] + 1e-6).all()
    outside = following.abs() > bound[:-1] - 1e-6
    actions = torch.full((32, 1), 0.3)
    zeros = torch.zeros(32)
    found, _ = (
        model.dynamics().linearize(starts, actions).pull_back(slice(0, 32), slope, zeros, zeros)
    )
    wanted, rows = [], torch.ones(32, dtype=torch.bool)
    for e in 1e-2 * torch.eye(3):
        ends = [imagined(starts + sign * e) for sign in (1, -1)]
        wanted.append(((ends[0] - ends[1]) / 2e-2 * slope).sum(-1))
        for end in ends:  # no step over a bound
            rows &= ((end.abs() > bound[:-1] - 1e-6) == outside).all(-1)
    wanted = torch.stack(wanted, -1)
    assert rows.sum() > 10 and outside[rows].any() and (~outside[rows]).any()
    torch.testing.assert_close(found[rows], wanted[rows], rtol=0.02, atol=5e-3)
