"""The transformer and the diffusion of single steps learn a system whose answers are known."""

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
from polygrad_fast.config import AutoregressiveDiffusionConfig, EDMConfig, TransformerModelConfig
from polygrad_fast.denoisers.transformer_dynamics import TransformerDynamics
from polygrad_fast.diffusion.edm import edm_loss
from polygrad_fast.world_models import AutoregressiveDiffusion, Transformer

TRANSFORMER = TransformerModelConfig(
    context=4, hidden_dim=32, num_layers=2, num_heads=2, learning_rate=3e-3
)
DIFFUSION = AutoregressiveDiffusionConfig(
    hidden_dim=64,
    num_layers=2,
    learning_rate=2e-3,
    sampler=EDMConfig.paper(num_inference_steps=20, s_churn=0.0),  # with 10 it is 1.2 times as wide
)
BUILT = {
    "transformer": (Transformer, TRANSFORMER),
    "diffusion": (AutoregressiveDiffusion, DIFFUSION),
}


def make_model(name: str, **options):
    torch.manual_seed(0)
    built, config = BUILT[name]
    bounds = torch.tensor([LOW]), torch.tensor([HIGH])
    config = replace(config, **options)
    return built(config, H, make_normalizer(), bounds, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained():
    models = {name: make_model(name) for name in BUILT}
    for seed in range(300):
        for model in models.values():
            model.update(make_windows(64, seed), torch.Generator().manual_seed(seed))
    return models


@pytest.mark.parametrize("name", BUILT)
def test_imagined_steps_are_those_of_the_system(trained, name):
    g = torch.Generator().manual_seed(5)
    s0 = MEAN + STD * torch.randn(512, S, generator=g)
    batch = trained[name].imagine(s0, policy, g)
    assert batch.observations.shape == (512, H, S) and batch.actions.shape == (512, H, A)
    assert torch.equal(batch.observations[:, 0], s0)
    moved, rewards, terminals = step(batch.observations, batch.actions)
    clear = batch.observations[..., 1].abs() > 0.25  # away from where the flag changes
    alive = batch.terminals == 0
    wrong = (batch.terminals[:, 0] != terminals[:, 0])[clear[:, 0]].float().mean()
    assert wrong < 0.02
    error = (batch.observations[:, 1:] - moved[:, :-1])[alive[:, :-1]].abs()
    assert (error.mean(0) < 0.15 * STD).all()
    assert (batch.rewards - rewards)[alive].abs().mean() < 0.3
    assert (batch.terminals[:, 1:] >= batch.terminals[:, :-1]).all()


@pytest.mark.parametrize("name", BUILT)
def test_what_follows_a_terminal_step_does_not_count(name):
    windows = make_windows(64, 0)
    junk, ended = with_junk_after_ends(windows)
    losses = [
        make_model(name).update(w, torch.Generator().manual_seed(0))["dynamics/loss"]
        for w in (windows, junk)
    ]
    assert losses[0] == losses[1]
    counted = replace(windows, rewards=windows.rewards.masked_fill(~ended, 55.0))
    assert make_model(name).update(counted, torch.Generator())["dynamics/loss"] > 2 * losses[0]


@pytest.mark.parametrize("name", BUILT)
def test_training_continues_exactly_from_a_saved_state(name):
    def train(model, seeds):
        for seed in seeds:
            model.update(make_windows(8, seed), torch.Generator().manual_seed(seed))

    whole, part, resumed = (make_model(name) for _ in range(3))
    train(whole, range(6))
    train(part, range(3))
    for key, module in part.modules().items():
        resumed.modules()[key].load_state_dict(module.state_dict())
    resumed.load_state_dict(part.state_dict())
    train(resumed, range(3, 6))
    for key, module in whole.modules().items():
        for entry, tensor in module.state_dict().items():
            assert torch.equal(tensor, resumed.modules()[key].state_dict()[entry]), (key, entry)


def test_the_transformer_sees_this_step_and_those_before():
    torch.manual_seed(0)
    network = TransformerDynamics(S, A, context=4, hidden_dim=16, num_layers=2, num_heads=2)
    observations, actions = torch.randn(3, 4, S), torch.randn(3, 4, A)

    @torch.no_grad()
    def predicted(actions):
        differences, rewards, logits = network(observations, actions)
        return torch.cat([differences, rewards[..., None], logits[..., None]], dim=-1)

    before = predicted(actions)
    for t in range(4):
        changed = actions.clone()
        changed[:, t] += 1.0
        moved = (predicted(changed) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [i >= t for i in range(4)]
    with pytest.raises(pg.InputError, match="at most 4 steps, got 5"):
        network(torch.randn(3, 5, S), torch.randn(3, 5, A))
    with pytest.raises(pg.InputError, match="hidden_dim must be a multiple of num_heads"):
        TransformerDynamics(S, A, hidden_dim=10, num_heads=4)


def test_the_transformer_imagines_beyond_its_context_from_the_last_steps():
    model, seen = make_model("transformer", context=3), []
    network = model.trainer.ema_model
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    s0 = MEAN + STD * torch.randn(5, S)
    batch = model.imagine(s0, policy, torch.Generator().manual_seed(0), normalized=True, horizon=7)
    assert [inputs[0].shape[1] for inputs in seen] == [1, 2, 3, 3, 3, 3, 3]
    torch.testing.assert_close(seen[-1][0], batch.observations[:, 4:])


def test_the_noise_of_a_step_is_learnt():
    """A diffusion of steps imagines the chance of a system: here of its reward alone."""
    model, g = make_model("diffusion", ema_decay=0.98), torch.Generator().manual_seed(10**6)
    for seed in range(400):
        windows = make_windows(64, seed)
        chance = 3.0 * torch.randn(windows.rewards.shape, generator=g)
        model.update(
            replace(windows, rewards=windows.rewards + chance),
            torch.Generator().manual_seed(seed),
        )
    s0 = torch.tensor([[0.0, -1.5]]).expand(2000, -1)
    batch = model.imagine(s0, policy, torch.Generator().manual_seed(0), horizon=1)
    wanted = step(batch.observations, batch.actions)[1]
    residuals = (batch.rewards - wanted).flatten()
    assert residuals.std().item() == pytest.approx(3.0, rel=0.15)
    assert abs(residuals.mean().item()) < 0.6


def test_entries_count_in_the_loss_by_their_weights():
    generator = torch.Generator().manual_seed(0)
    batch, noise = (torch.randn(6, 2, 3, generator=generator) for _ in range(2))
    sigma = torch.rand(6, generator=generator) + 0.1
    weights = torch.randint(2, batch.shape, generator=generator).float()

    def network(x, c_noise):
        return 0.5 * x + c_noise.view(-1, 1, 1)

    kept = [
        edm_loss(network, batch[i : i + 1], sigma[i : i + 1], noise[i : i + 1], 1.0, w[None])
        for i, w in enumerate(weights)
    ]
    counts = weights.sum((1, 2))
    wanted = (torch.stack(kept) * counts).sum() / counts.sum()
    got = edm_loss(network, batch, sigma, noise, 1.0, weights)
    torch.testing.assert_close(got, wanted)
    ones = edm_loss(network, batch, sigma, noise, 1.0, torch.ones_like(batch))
    torch.testing.assert_close(ones, edm_loss(network, batch, sigma, noise, 1.0))
    assert (got - ones).abs() > 1e-4
