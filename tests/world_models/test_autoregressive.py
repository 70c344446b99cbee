"""The autoregressive world model learns a system whose answers are known."""

from dataclasses import replace

import pytest
import torch

import polygrad_fast as pg
from linear_system import (
    HIGH,
    LOW,
    MEAN,
    STD,
    A,
    H,
    S,
    make_normalizer,
    make_windows,
    policy,
    step,
    with_junk_after_ends,
)
from polygrad_fast.config import AutoregressiveConfig
from polygrad_fast.world_models.autoregressive import Autoregressive


def make_model(config=None) -> Autoregressive:
    torch.manual_seed(0)
    config = config or AutoregressiveConfig(hidden_dim=64, num_layers=2)
    bounds = torch.tensor([LOW]), torch.tensor([HIGH])
    return Autoregressive(config, H, make_normalizer(), bounds, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained() -> Autoregressive:
    model = make_model()
    for seed in range(1500):
        losses = model.update(make_windows(64, seed))
    assert losses["dynamics/loss"] < 0.1
    return model


def test_imagined_steps_are_those_of_the_system(trained):
    g = torch.Generator().manual_seed(5)
    s0 = MEAN + STD * torch.randn(512, S, generator=g)
    batch = trained.imagine(s0, policy, g)
    assert batch.observations.shape == (512, H, S) and batch.actions.shape == (512, H, A)
    assert torch.equal(batch.observations[:, 0], s0)
    moved, rewards, terminals = step(batch.observations, batch.actions)
    clear = batch.observations[..., 1].abs() > 0.2  # away from where the flag changes
    alive = batch.terminals == 0
    assert (batch.terminals[:, 0] == terminals[:, 0])[clear[:, 0]].all()
    error = (batch.observations[:, 1:] - moved[:, :-1])[alive[:, :-1]].abs()
    assert error.mean() < 0.05 * STD.mean()
    assert (batch.rewards - rewards)[alive].abs().mean() < 0.15
    # once ended, always ended, and the observation stays
    assert (batch.terminals[:, 1:] >= batch.terminals[:, :-1]).all()
    stays = batch.terminals[:, :-1] == 1
    assert torch.equal(batch.observations[:, 1:][stays], batch.observations[:, :-1][stays])


def test_actions_are_drawn_from_the_policy_at_their_own_states(trained):
    g = torch.Generator().manual_seed(6)
    s0 = MEAN + STD * torch.randn(20_000, S, generator=g)
    batch = trained.imagine(s0, policy, g)
    mean, std = policy(batch.observations)
    z = ((batch.actions - mean) / std).flatten()
    assert z.mean().abs() < 0.02 and (z.std() - 1).abs() < 0.02
    columns = batch.observations.flatten(0, 1)
    for column in columns.unbind(-1):
        assert torch.corrcoef(torch.stack([z, column]))[0, 1].abs() < 0.015


def test_normalized_batches_are_the_same_trajectories(trained):
    s0 = MEAN + STD * torch.randn(64, S, generator=torch.Generator().manual_seed(7))
    normalizer = trained.normalizer
    raw = trained.imagine(s0, policy, torch.Generator().manual_seed(8))
    normed = trained.imagine(
        normalizer.normalize(s0, "observations"),
        policy,
        torch.Generator().manual_seed(8),
        normalized=True,
    )
    for name in ("observations", "actions", "rewards", "terminals"):
        back = normalizer.unnormalize(getattr(normed, name), name)
        assert torch.allclose(back, getattr(raw, name), atol=1e-5), name


def test_any_horizon_can_be_imagined(trained):
    s0 = MEAN + STD * torch.randn(64, S, generator=torch.Generator().manual_seed(7))
    assert trained.longest_horizon is None
    usual, longer, shorter = (
        trained.imagine(s0, policy, torch.Generator().manual_seed(8), horizon=horizon)
        for horizon in (None, 3 * H, 2)
    )
    assert longer.observations.shape == (64, 3 * H, S) and shorter.rewards.shape == (64, 2)
    for name in ("observations", "actions", "rewards", "terminals"):
        assert torch.equal(getattr(longer, name)[:, :H], getattr(usual, name)), name
        assert torch.equal(getattr(shorter, name), getattr(usual, name)[:, :2]), name
    with pytest.raises(pg.InputError, match="horizon must be an integer of at least 1, got 0"):
        trained.imagine(s0, policy, horizon=0)


def test_padding_and_what_follows_a_terminal_step_do_not_count():
    windows = make_windows(64, 0)
    losses = make_model().update(windows)
    junk, ended = with_junk_after_ends(windows)
    assert make_model().update(junk) == losses
    alive = replace(windows, rewards=windows.rewards.masked_fill(~ended, 55.0))
    assert make_model().update(alive)["dynamics/reward_loss"] > losses["dynamics/reward_loss"]


def test_training_continues_exactly_from_a_saved_state():
    whole, part = make_model(), make_model()
    for seed in range(20):
        whole.update(make_windows(16, seed))
    for seed in range(10):
        part.update(make_windows(16, seed))
    resumed = make_model(AutoregressiveConfig(hidden_dim=64, num_layers=2))
    for name, module in part.modules().items():
        resumed.modules()[name].load_state_dict(module.state_dict())
    resumed.load_state_dict(part.state_dict())
    for seed in range(10, 20):
        resumed.update(make_windows(16, seed))
    for name, module in whole.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, resumed.modules()[name].state_dict()[key]), (name, key)


def test_process_noise_is_drawn_in_every_step():
    model = make_model(AutoregressiveConfig(hidden_dim=16, num_layers=2, process_noise=True))
    network, spread = model.trainer.ema_model, torch.linspace(0.1, 0.4, S + 1)
    network.residual_squares.copy_(spread.square())
    network.residual_weight.fill_(1.0)
    network.difference_scale.copy_(torch.linspace(0.5, 2.0, S))
    observation, seen = torch.randn(1, S).expand(20_000, -1), torch.zeros(20_000, A)
    difference, reward, logit = model.step([observation], [seen], torch.Generator().manual_seed(0))
    assert torch.equal(logit, logit[:1].expand(20_000))
    with torch.no_grad():
        mean, mean_reward, _ = network(observation[0], seen[0])
    drawn = torch.cat(
        [difference / network.difference_scale - mean, reward[:, None] - mean_reward], 1
    )
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.03, atol=0)
    assert (torch.corrcoef(drawn.T) - torch.eye(S + 1)).abs().max() < 0.03
    again = model.step([observation], [seen], torch.Generator().manual_seed(0))
    assert torch.equal(again[0], difference) and torch.equal(again[1], reward)
