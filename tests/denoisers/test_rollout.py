import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import polygrad_fast as pg
from cases import changed
from polygrad_fast.config import DenoiserConfig, TrainConfig
from polygrad_fast.denoisers.build import build_denoiser
from polygrad_fast.denoisers.one_step import OneStepNetwork, one_step_losses
from polygrad_fast.diffusion.trainer import DenoiserTrainer

S, A, H, K = 3, 2, 6, 8
LOW, HIGH = -0.3, 3.0


def build(s=S, a=A, h=H, **options) -> pg.RolloutDenoiser:
    torch.manual_seed(0)
    denoiser = pg.RolloutDenoiser(s, a, h, **({"hidden_dim": 16, "num_layers": 2} | options))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    denoiser.step.difference_scale.copy_(torch.linspace(0.2, 0.6, s))
    denoiser.flags.copy_(torch.tensor([LOW, HIGH]))
    return denoiser


def inputs(batch, s=S, a=A, h=H, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, h, s + 2, generator=generator),
        torch.randn(batch, h, a, generator=generator),
        torch.randint(K, (batch,), generator=generator),
    )


def windows(batch=64, seed=0):
    """Normalized windows of a linear system whose reward is its first entry; some end."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, S, generator=generator)
    actions = torch.randn(batch, H, A, generator=generator)
    push = torch.tensor([[0.5, 0.0, 0.1], [0.0, -0.4, 0.2]])
    rows, ended = [], torch.zeros(batch, 1)
    for t in range(H):
        ended = ((ended > 0) | (states[:, 1:2] > 1.5)).float()
        rows.append(torch.cat([states, states[:, :1], LOW + (HIGH - LOW) * ended], dim=1))
        moved = 0.9 * states + actions[:, t] @ push
        states = torch.where(ended > 0, states, moved)
    return torch.stack(rows, dim=1), actions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
def test_output_has_the_trajectory_shape(batch, s, a, h):
    prediction = build(s, a, h)(*inputs(batch, s, a, h))
    assert prediction.shape == (batch, h, s + 2)
    assert torch.isfinite(prediction).all()


@pytest.mark.parametrize("bounded", [False, True])
def test_rollout_against_a_naive_float64_loop(bounded):
    denoiser = build()
    if bounded:
        denoiser.step.range.lowest.copy_(torch.tensor([-1.0, -0.8, -1.2, -0.4]))
        denoiser.step.range.highest.copy_(torch.tensor([0.9, 1.1, 1.0, 0.5]))
    trajectory, actions, timesteps = inputs(16)
    w = {name: value.double() for name, value in denoiser.state_dict().items()}

    def step(observation, action):
        x = torch.cat([observation, action])
        for layer in (0, 2):
            x = w[f"step.network.{layer}.weight"] @ x + w[f"step.network.{layer}.bias"]
            x = x / (1 + torch.exp(-x))
        return w["step.network.4.weight"] @ x + w["step.network.4.bias"]

    got = denoiser(trajectory, actions, timesteps).double()
    lengths, cut = set(), 0
    for b in range(16):
        observation, length = trajectory[b, 0, :S].double(), 0
        for t in range(H):
            out = step(observation, actions[b, t].double())
            goes_on = length == t and bool(out[-1] <= 0)
            length += goes_on
            reward = out[-2:-1].clamp(w["step.range.lowest"][-1], w["step.range.highest"][-1])
            wanted = torch.cat([observation, reward, w["flags"][1 - goes_on].reshape(1)])
            assert (got[b, t] - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())
            if goes_on:
                moved = observation + w["step.difference_scale"] * out[:S]
                low, high = w["step.range.lowest"][:-1], w["step.range.highest"][:-1]
                observation = moved.clamp(low, high)
                cut += int((observation != moved).sum())
        lengths.add(length)
    assert len(lengths) > 2  # ends at several steps
    assert (cut > 0) == bounded


def test_nothing_ends_before_windows_have_shown_an_end():
    denoiser = build()
    denoiser.flags.zero_()
    torch.nn.init.constant_(denoiser.step.network[-1].bias[-1:], 100.0)
    moved = denoiser(*inputs(3))[..., :S].diff(dim=1)
    assert (moved.abs().amax(-1) > 1e-4).all()
    denoiser.flags.copy_(torch.tensor([LOW, HIGH]))
    assert not denoiser(*inputs(3))[..., :S].diff(dim=1).any()


@pytest.mark.parametrize("t", range(H))
def test_the_rollout_depends_on_earlier_actions_only(t):
    denoiser = build()
    torch.nn.init.constant_(denoiser.step.network[-1].bias[-1:], -100.0)  # nothing ends
    trajectory, actions, timesteps = inputs(3)
    before = denoiser(trajectory, actions, timesteps)
    actions[:, t] += 1.0
    moved = (denoiser(trajectory, actions, timesteps) - before).abs().amax(0)
    assert not moved[:t].any() and not moved[t, :S].any()
    assert moved[t, S] > 1e-4 and (moved[t + 1 :, :S] > 1e-5).all()
    assert not moved[:, -1].any()


def test_noisy_states_and_the_diffusion_step_are_not_read():
    denoiser = build()
    trajectory, actions, timesteps = inputs(4)
    before = denoiser(trajectory, actions, timesteps)
    trajectory[:, 1:] += 1.0
    trajectory[:, 0, S:] += 1.0
    assert torch.equal(denoiser(trajectory, actions, (timesteps + 1) % K), before)
    alone = torch.cat([denoiser(*(x[i : i + 1] for x in inputs(4))) for i in range(4)])
    torch.testing.assert_close(alone, before, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter():
    denoiser = build()
    sum(denoiser.transition_losses(*windows(K)).values()).backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_its_losses_are_those_of_the_step_on_what_the_flags_stand_for():
    denoiser = build()
    trajectory, actions = windows()
    flags = (trajectory[..., -1] == HIGH).float()
    assert 0 < flags.mean() < 1
    wanted = one_step_losses(denoiser.step, trajectory[..., :S], actions, trajectory[..., S], flags)
    assert denoiser.transition_losses(trajectory, actions) == wanted


def test_flags_are_what_the_windows_show():
    denoiser = pg.RolloutDenoiser(S, A, H, hidden_dim=8)
    trajectory, actions = windows()

    def seen(low, high):
        shown = trajectory.clone()
        shown[..., -1] = torch.where(trajectory[..., -1] > 0, high, low)
        denoiser.transition_losses(shown, actions)
        return denoiser.flags.tolist()

    assert seen(-0.5, -0.5) == [-0.5, 0.0]  # no terminal yet
    assert seen(-0.25, 2.0) == [-0.25, 2.0]
    assert seen(0.0, 0.0) == [0.0, 2.0]  # none among these
    assert seen(4.0, 4.0) == [0.0, 4.0]  # nothing else


def naive_losses(network, observations, actions, rewards, flags):
    sums, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for b in range(len(flags)):
        for t in range(flags.shape[1]):
            if flags[b, :t].any():
                continue
            difference, reward, logit = network(observations[b, t], actions[b, t])
            sums[1] += (reward - rewards[b, t]).square().item()
            sums[2] += F.binary_cross_entropy_with_logits(logit, flags[b, t]).item()
            counts[1] += 1
            counts[2] += 1
            if t + 1 < flags.shape[1] and not flags[b, t]:
                wanted = (observations[b, t + 1] - observations[b, t]) / network.difference_scale
                sums[0] += (difference - wanted).square().mean().item()
                counts[0] += 1
    return [total / count for total, count in zip(sums, counts, strict=True)]


def test_one_step_losses_against_a_naive_loop():
    torch.manual_seed(1)
    network = OneStepNetwork(S, A, 16, 2)
    trajectory, actions = windows(24)
    flags = (trajectory[..., -1] > 0).float()
    states, rewards = trajectory[..., :S], trajectory[..., S]
    got = one_step_losses(network, states, actions, rewards, flags)
    assert list(got) == ["observation_loss", "reward_loss", "terminal_loss"]
    assert [loss.item() for loss in got.values()] == pytest.approx(
        naive_losses(network, states, actions, rewards, flags), rel=1e-5
    )


def test_the_unit_of_differences_is_their_deviation_in_the_first_batch():
    network = OneStepNetwork(S, A, 16, 2)
    assert not network.difference_scale.any()
    trajectory, actions = windows(64)
    states, rewards, flags = trajectory[..., :S], trajectory[..., S], trajectory[..., -1]
    flags = (flags > 0).float()
    one_step_losses(network, states, actions, rewards, flags)
    kept = [
        states[b, t + 1] - states[b, t]
        for b in range(64)
        for t in range(H - 1)
        if not flags[b, t]  # it stays 1 after a terminal
    ]
    wanted = torch.stack(kept).std(0, unbiased=False)
    torch.testing.assert_close(network.difference_scale, wanted, rtol=1e-5, atol=0)
    one_step_losses(network, 5 * states, actions, rewards, flags)
    torch.testing.assert_close(network.difference_scale, wanted, rtol=1e-5, atol=0)


def trained(updates: int) -> tuple[DenoiserTrainer, dict]:
    config = DenoiserConfig(
        kind="rollout", hidden_dim=32, num_layers=2, learning_rate=3e-3, ema_decay=0.9, ema_start=0
    )
    torch.manual_seed(0)
    sampler_config = pg.SamplerConfig.official(scale_actions=False)
    trainer = DenoiserTrainer(
        build_denoiser(config, S, A, H, K), pg.NoiseSchedule.cosine(K), config, sampler_config
    )
    generator = torch.Generator().manual_seed(0)
    for update in range(updates):
        losses = trainer.update(*windows(128, seed=update), generator)
    return trainer, losses


def test_training_learns_the_dynamics():
    trainer, losses = trained(updates=400)
    assert set(losses) == {"loss", "observation_loss", "reward_loss", "terminal_loss"}
    assert losses["loss"] == sum(list(losses.values())[1:])
    trajectory, actions = windows(256, seed=10**6)
    denoiser = trainer.ema_model
    assert torch.equal(denoiser.flags, torch.tensor([LOW, HIGH]))
    with torch.no_grad():
        rollout = denoiser.rollout(trajectory[:, 0, :S], actions)
    alive = trajectory[..., -1] < 0
    error = (rollout - trajectory)[..., :S].square().mean(-1)[alive].mean().sqrt()
    assert error < 0.15 * trajectory[..., :S].std()


@pytest.mark.parametrize("name", ["trajectory", "actions", "timesteps"])
def test_wrong_shapes_name_got_and_wanted(name):
    arguments = dict(zip(("trajectory", "actions", "timesteps"), inputs(4), strict=True))
    tensor = arguments[name].unsqueeze(0)
    with pytest.raises(pg.InputError) as error:
        build()(**(arguments | {name: tensor}))
    assert str(tuple(tensor.shape)) in str(error.value)


@pytest.mark.parametrize(
    "name", ["observation_dim", "action_dim", "horizon", "hidden_dim", "num_layers"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused(name, value):
    sizes = {"observation_dim": S, "action_dim": A, "horizon": H} | {name: value}
    message = f"{name} must be an integer of at least 1, got {value}"
    with pytest.raises(pg.InputError, match=message):
        pg.RolloutDenoiser(**sizes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "sampler.scale_actions must be False for a denoiser of kind 'rollout', got True"),
        (
            {"scale_actions": False, "num_inference_steps": 10},
            "num_inference_steps must be above the horizon, 10, for a denoiser of kind 'rollout'",
        ),
        (
            {"scale_actions": False, "prediction_type": "epsilon"},
            "sampler.prediction_type must be 'sample' for a denoiser of kind 'rollout', got 'eps",
        ),
    ],
)
def test_what_does_not_suit_a_rollout_is_refused(options, message):
    sampler = pg.SamplerConfig.official(**options)
    with pytest.raises(pg.InputError, match=message):
        TrainConfig(sampler=sampler, denoiser=DenoiserConfig(kind="rollout"))
    config = TrainConfig(world_model="autoregressive")
    changed(config, denoiser__kind="rollout", sampler__scale_actions=True)  # plays no part


NOISE = torch.tensor([0.3, 0.1, 0.05])
REWARD_NOISE = 0.2


def noisy_windows(batch, seed):
    """Normalized windows of a linear system with Gaussian noise on states and rewards."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, S, generator=generator)
    actions = torch.randn(batch, H, A, generator=generator)
    push = torch.tensor([[0.5, 0.0, 0.1], [0.0, -0.4, 0.2]])
    rows = []
    for t in range(H):
        reward = states[:, :1] + REWARD_NOISE * torch.randn(batch, 1, generator=generator)
        rows.append(torch.cat([states, reward, torch.full_like(reward, LOW)], dim=1))
        chance = NOISE * torch.randn(states.shape, generator=generator)
        states = 0.9 * states + actions[:, t] @ push + chance
    return torch.stack(rows, dim=1), actions


def test_residuals_are_the_noise_of_the_data():
    torch.manual_seed(0)
    config = DenoiserConfig(
        "rollout", 32, 2, process_noise=True, learning_rate=3e-3, ema_decay=0.9, ema_start=0
    )
    schedule, sampler = pg.NoiseSchedule.cosine(K), pg.SamplerConfig.official(scale_actions=False)
    trainer = DenoiserTrainer(build_denoiser(config, S, A, H, K), schedule, config, sampler)
    assert not trainer.model.step.residual_scale.any()
    for update in range(1500):
        trainer.update(*noisy_windows(128, seed=update))
    step = trainer.ema_model.step
    spread = step.residual_scale * torch.cat([step.difference_scale, torch.ones(1)])
    # what the first updates had not learnt yet fades with a time constant of 1,000
    torch.testing.assert_close(
        spread, torch.cat([NOISE, torch.tensor([REWARD_NOISE])]), rtol=0.2, atol=0.02
    )


def test_each_normal_moves_its_own_observation_or_reward():
    denoiser = build(process_noise=True)
    denoiser.step.residual_squares.copy_(torch.tensor([0.04, 0.09, 0.16, 0.25]))
    denoiser.step.residual_weight.fill_(1.0)
    trajectory, actions, timesteps = inputs(4)
    w = {name: value.double() for name, value in denoiser.state_dict().items()}
    spread, scale = torch.tensor([0.2, 0.3, 0.4, 0.5]).double(), w["step.difference_scale"]
    got, double = denoiser(trajectory, actions, timesteps).double(), denoiser.step.double()
    for b in range(4):
        observation, goes_on = trajectory[b, 0, :S].double(), True
        for t in range(H):
            with torch.no_grad():
                difference, reward, logit = double(observation, actions[b, t].double())
            reward = reward + spread[-1] * trajectory[b, t, S]
            assert (got[b, t, :S] - observation).abs().max() < 1e-4
            assert (got[b, t, S] - reward).abs() < 1e-4
            goes_on = goes_on and logit <= 0
            if t + 1 < H and goes_on:
                chance = spread[:-1] * trajectory[b, t + 1, :S]
                observation = observation + scale * (difference + chance)


def test_process_noise_is_the_rollouts():
    with pytest.raises(pg.InputError, match="process_noise must be False for kind 'transformer'"):
        DenoiserConfig("transformer", process_noise=True)
