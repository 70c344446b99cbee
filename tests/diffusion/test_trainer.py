import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polygrad_fast as pg
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.denoisers.build import build_denoiser
from polygrad_fast.diffusion.ddpm import denoising_loss, warn_of_amplified_errors
from polygrad_fast.diffusion.trainer import DenoiserTrainer

S, A, H, K = 3, 2, 4, 8
D = S + 2


class SpyDenoiser(nn.Module):
    """Returns a fixed prediction and records what it is shown."""

    def __init__(self, prediction=None):
        super().__init__()
        self.prediction, self.calls, self.horizon = prediction, [], 10
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, trajectory, actions, timesteps):
        self.calls.append((trajectory.clone(), actions.clone(), timesteps.clone()))
        prediction = torch.zeros_like(trajectory) if self.prediction is None else self.prediction
        return prediction + self.weight


def make_inputs(seed=0, batch=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    trajectory, noise, prediction = torch.randn(3, batch, H, D, generator=g, dtype=dtype)
    actions = torch.randn(batch, H, A, generator=g, dtype=dtype)
    return trajectory, actions, torch.randint(K, (batch,), generator=g), noise, prediction


def make_trainer(seed=0, sampler_config=None, **options) -> DenoiserTrainer:
    torch.manual_seed(seed)
    config = DenoiserConfig(**({"hidden_dim": 16, "num_layers": 2} | options))
    return DenoiserTrainer(
        build_denoiser(config, S, A, H, K),
        pg.NoiseSchedule.cosine(K),
        config,
        sampler_config if sampler_config is not None else pg.SamplerConfig.official(),
    )


def windows(seed: int, batch: int = 64):
    """Normalized windows of a noiseless linear system that starts from random states."""
    g = torch.Generator().manual_seed(seed)
    states, actions = torch.randn(batch, S, generator=g), torch.randn(batch, H, A, generator=g)
    mix = torch.tensor([[0.8, 0.3, 0.0], [-0.3, 0.8, 0.0], [0.0, 0.2, 0.9]])
    push = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]])
    rows = []
    for t in range(H):
        reward = states.sum(-1, keepdim=True) / 2 - actions[:, t, :1]
        rows.append(torch.cat([states, reward, torch.zeros(batch, 1)], -1))
        states = states @ mix + actions[:, t] @ push
    return torch.stack(rows, 1), actions


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@settings(max_examples=20, deadline=None)
@given(
    prediction_type=st.sampled_from(["sample", "epsilon"]),
    scale_actions=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_loss_against_a_naive_loop(prediction_type, scale_actions, seed):
    schedule = pg.NoiseSchedule.from_betas(pg.NoiseSchedule.cosine(K).betas.double())
    config = pg.SamplerConfig.official(prediction_type=prediction_type, scale_actions=scale_actions)
    x, actions, timesteps, noise, prediction = make_inputs(seed, dtype=torch.float64)
    spy = SpyDenoiser(prediction)
    loss, parts = denoising_loss(spy, x, actions, timesteps, noise, schedule, config)
    ((seen_x, seen_actions, seen_timesteps),) = spy.calls
    assert torch.equal(seen_timesteps, timesteps)
    total = {"observation_loss": [], "reward_loss": [], "terminal_loss": []}
    for b, k in enumerate(timesteps.tolist()):
        alphabar = math.prod(1 - beta for beta in schedule.betas[: k + 1].tolist())
        factor = math.sqrt(alphabar) if scale_actions else 1.0
        torch.testing.assert_close(seen_actions[b], factor * actions[b], rtol=1e-12, atol=0)
        for t in range(H):
            for d in range(D):
                clean, eps = x[b, t, d].item(), noise[b, t, d].item()
                given_observation = t == 0 and d < S
                noisy = math.sqrt(alphabar) * clean + math.sqrt(1 - alphabar) * eps
                shown = clean if given_observation else noisy
                assert seen_x[b, t, d].item() == pytest.approx(shown, rel=1e-9, abs=1e-12)
                answer = clean if given_observation else prediction[b, t, d].item()
                target = eps if prediction_type == "epsilon" else clean
                part = "observation_loss" if d < S else ["reward_loss", "terminal_loss"][d - S]
                total[part].append((answer - target) ** 2)
    everything = sum(total.values(), [])
    assert loss.item() == pytest.approx(sum(everything) / len(everything), rel=1e-12)
    assert parts.keys() == total.keys()
    for name, errors in total.items():
        assert parts[name].item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)
        assert not parts[name].requires_grad


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_no_gradient_through_the_given_observation_and_inputs_stay(prediction_type):
    x, actions, timesteps, noise, prediction = make_inputs()
    prediction.requires_grad_(True)
    kept = [tensor.detach().clone() for tensor in (x, actions, noise, prediction)]
    config = pg.SamplerConfig.official(prediction_type=prediction_type)
    schedule = pg.NoiseSchedule.cosine(K)
    loss, _ = denoising_loss(
        SpyDenoiser(prediction), x, actions, timesteps, noise, schedule, config
    )
    loss.backward()
    assert (prediction.grad[:, 0, :S] == 0).all()
    assert (prediction.grad[:, 0, S:] != 0).all() and (prediction.grad[:, 1:] != 0).all()
    assert_same((x, actions, noise, prediction), kept)


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    schedule, config = pg.NoiseSchedule.cosine(K), pg.SamplerConfig.official()
    trainer = DenoiserTrainer(SpyDenoiser(), schedule, DenoiserConfig(), config)
    trajectory = torch.zeros(4000, H, D)
    trainer.update(trajectory, torch.zeros(4000, H, A), torch.Generator().manual_seed(0))
    ((noisy, _, timesteps),) = trainer.model.calls
    counts = torch.bincount(timesteps, minlength=K)
    assert counts.shape == (K,)
    assert ((counts - 500).abs() < 5 * math.sqrt(500)).all()
    scale = (1 - schedule.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1)
    noise = (noisy / scale)[:, 1:]
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))


def test_draws_come_from_the_generator_alone():
    trajectory, actions = windows(0)
    results = []
    for seed in (1, 1, 2):
        trainer = make_trainer()
        before = torch.get_rng_state()
        losses = trainer.update(trajectory, actions, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(losses["loss"].item())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("interval, start, decay", [(1, 0, 0.5), (3, 4, 0.75), (2, 100, 0.9)])
def test_ema_interval_start_and_decay(interval, start, decay):
    trainer = make_trainer(ema_interval=interval, ema_start=start, ema_decay=decay)
    initial = weights(trainer.model)
    assert_same(weights(trainer.ema_model), initial)
    wanted = initial
    for update in range(10):
        trainer.update(*windows(update), torch.Generator().manual_seed(update))
        current = weights(trainer.model)
        if update % interval == 0:
            keep = decay if update >= start else 0.0
            wanted = [keep * w + (1 - keep) * c for w, c in zip(wanted, current, strict=True)]
        for got, average in zip(trainer.ema_model.parameters(), wanted, strict=True):
            torch.testing.assert_close(got, average, rtol=1e-6, atol=1e-7)
        if update % interval == 0 and update < start:
            assert_same(weights(trainer.ema_model), current)
    assert trainer.num_updates == 10


def test_the_averaged_copy_shares_fixed_features_but_no_weights():
    trainer = make_trainer()
    trainer.update(*windows(0))
    for (name, buffer), other in zip(
        trainer.model.named_buffers(), trainer.ema_model.buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name
    assert not any(p.requires_grad for p in trainer.ema_model.parameters())
    pointers = {p.data_ptr() for p in trainer.model.parameters()}
    assert not pointers & {p.data_ptr() for p in trainer.ema_model.parameters()}


def test_the_averaged_copy_is_changed_in_place():
    trainer = make_trainer(ema_interval=1)
    pointers = [p.data_ptr() for p in trainer.ema_model.parameters()]
    trainer.update(*windows(0))
    assert [p.data_ptr() for p in trainer.ema_model.parameters()] == pointers


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden_dim": 48},
        {"hidden_dim": 48, "step_conditioning": "layer"},
        {"hidden_dim": 32, "kind": "transformer", "num_heads": 2},
        {
            "hidden_dim": 32,
            "kind": "transformer",
            "num_heads": 2,
            "step_conditioning": "learned",
        },
        {"hidden_dim": 48, "train_dtype": "bfloat16"},
        {"hidden_dim": 32, "kind": "transformer", "num_heads": 2, "train_dtype": "bfloat16"},
    ],
    ids=[
        "mlp",
        "mlp-layer",
        "transformer",
        "transformer-learned",
        "mlp-bfloat16",
        "transformer-bfloat16",
    ],
)
def test_a_linear_system_is_learnt(options, prediction_type):
    config = pg.SamplerConfig.official(prediction_type=prediction_type)
    trainer = make_trainer(0, config, learning_rate=3e-3, ema_start=0, ema_decay=0.8, **options)
    trajectory, actions = windows(999, batch=1000)
    g = torch.Generator().manual_seed(99)
    timesteps, noise = torch.randint(K, (1000,), generator=g), torch.randn(1000, H, D, generator=g)
    target = noise if prediction_type == "epsilon" else trajectory
    # the given first observation is put into the prediction, whatever the target
    unavoidable = (trajectory - target)[:, 0, :S].square().sum() / trajectory.numel()

    @torch.no_grad()
    def held_out_loss():
        arguments = (trajectory, actions, timesteps, noise, trainer.schedule, config)
        return (denoising_loss(trainer.ema_model, *arguments)[0] - unavoidable).item()

    before = held_out_loss()
    for update in range(300):
        trainer.update(*windows(update), torch.Generator().manual_seed(update))
    assert 0 <= held_out_loss() < 0.2 * before


def test_state_dict_round_trip_continues_identically():
    options = {"ema_interval": 3, "ema_start": 2, "ema_decay": 0.5}
    original, restored = make_trainer(0, **options), make_trainer(1, **options)
    for update in range(5):
        original.update(*windows(update), torch.Generator().manual_seed(update))
    restored.model.load_state_dict(original.model.state_dict())
    restored.ema_model.load_state_dict(original.ema_model.state_dict())
    restored.load_state_dict(copy.deepcopy(original.state_dict()))
    for update in range(5, 12):
        losses = [
            trainer.update(*windows(update), torch.Generator().manual_seed(update))
            for trainer in (original, restored)
        ]
        assert losses[0] == losses[1]
    assert_same(weights(original.model), weights(restored.model))
    assert_same(weights(original.ema_model), weights(restored.ema_model))
    assert original.num_updates == restored.num_updates == 12


KINDS = {
    "mlp": {},
    "mlp-layer": {"step_conditioning": "layer"},
    "transformer": {"kind": "transformer", "num_heads": 2},
    "rollout": {"kind": "rollout"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_updates_are_those_of_adam_on_autograds_gradients(options):
    trainer = make_trainer(learning_rate=0.01, **options)
    twin = copy.deepcopy(trainer.model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    for update in range(5):
        x, actions = windows(update)
        trainer.update(x, actions, torch.Generator().manual_seed(update))
        g = torch.Generator().manual_seed(update)
        if "rollout" in options.values():
            loss = sum(twin.transition_losses(x, actions).values())
        else:
            steps = torch.randint(K, (len(x),), generator=g)
            noise = torch.randn(x.shape, generator=g)
            loss, _ = denoising_loss(
                twin, x, actions, steps, noise, trainer.schedule, trainer.sampler_config
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for got, wanted in zip(trainer.model.parameters(), twin.parameters(), strict=True):
            # Adam divides by the gradient's size, which rounding alone may be
            assert (got - wanted).abs().mean() < 1e-5


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_watched_network_learns_the_same_by_autograd(options):
    plain, watched = make_trainer(**options), make_trainer(**options)
    seen = []
    *_, part = (m for m in watched.model.modules() if isinstance(m, nn.Linear))
    part.register_full_backward_hook(lambda *_: seen.append(1))
    for update in range(3):
        for trainer in (plain, watched):
            trainer.update(*windows(update), torch.Generator().manual_seed(update))
    assert len(seen) == 3
    for got, wanted in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert (got - wanted).abs().mean() < 1e-5


def test_frozen_weights_stay_and_are_copied_into_the_average():
    torch.manual_seed(0)
    denoiser = build_denoiser(DenoiserConfig(hidden_dim=16, num_layers=2), S, A, H, K)
    denoiser.output.weight.requires_grad_(False)
    trainer = DenoiserTrainer(
        denoiser, pg.NoiseSchedule.cosine(K), DenoiserConfig(), pg.SamplerConfig.official()
    )
    before = weights(trainer.model)
    denoiser.output.weight.add_(1.0)
    trainer.update(*windows(0))
    assert torch.equal(trainer.ema_model.output.weight, denoiser.output.weight)
    changes = [
        not torch.equal(old, new) for old, new in zip(before, weights(denoiser), strict=True)
    ]
    frozen = [name == "output.weight" for name, _ in denoiser.named_parameters()]
    assert torch.equal(denoiser.output.weight, before[frozen.index(True)] + 1)
    assert all(changes)


@pytest.mark.parametrize("options", [{}, {"kind": "transformer", "num_heads": 2}])
def test_the_optimizers_state_is_that_of_adam_on_single_parameters(options):
    """Checkpoints of before the weights lay in one buffer are read, too."""
    trainer = make_trainer(learning_rate=0.01, **options)
    for update in range(3):
        trainer.update(*windows(update), torch.Generator().manual_seed(update))
    saved = copy.deepcopy(trainer.state_dict())
    twin = copy.deepcopy(trainer.model)
    plain = torch.optim.Adam(twin.parameters(), lr=0.01)
    options_of_plain = plain.state_dict()["param_groups"]
    plain.load_state_dict(saved["optimizer"] | {"param_groups": options_of_plain})
    gradients = [torch.randn_like(p) for p in twin.parameters()]

    resumed = make_trainer(1, learning_rate=0.01, **options)
    resumed.model.load_state_dict(trainer.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(saved) | {"optimizer": copy.deepcopy(plain.state_dict())})
    for p, gradient in zip(twin.parameters(), gradients, strict=True):
        p.grad = gradient
    plain.step()
    for one in (trainer, resumed):
        one.minimize(
            sum((p * g).sum() for p, g in zip(one.model.parameters(), gradients, strict=True))
        )
        for got, wanted in zip(one.model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert_same(weights(trainer.model), weights(resumed.model))


def test_weights_keep_float32_where_products_round():
    trainer = make_trainer(train_dtype="bfloat16")
    exact = make_trainer()
    for update in range(20):
        losses = [
            one.update(*windows(update), torch.Generator().manual_seed(update))["loss"].item()
            for one in (trainer, exact)
        ]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "options, kind, conditioning",
    [
        ({}, pg.ResidualMLPDenoiser, "input"),
        ({"step_conditioning": "layer"}, pg.ResidualMLPDenoiser, "layer"),
        ({"kind": "transformer"}, pg.TransformerDenoiser, "input"),
        (
            {"kind": "transformer", "step_conditioning": "learned"},
            pg.TransformerDenoiser,
            "learned",
        ),
        ({"step_conditioning": None}, pg.ResidualMLPDenoiser, "layer"),
        (
            {"kind": "transformer", "step_conditioning": None},
            pg.TransformerDenoiser,
            "learned",
        ),
    ],
)
def test_build_denoiser_follows_its_configuration(options, kind, conditioning):
    config = DenoiserConfig(hidden_dim=24, num_layers=3, num_heads=2, **options)
    denoiser = build_denoiser(config, S, A, H, K)
    assert type(denoiser) is kind and denoiser.step_conditioning == conditioning
    assert (denoiser.observation_dim, denoiser.action_dim, denoiser.horizon) == (S, A, H)
    assert (denoiser.hidden_dim, denoiser.num_layers) == (24, 3)
    last_step = torch.full((1,), K - 1)
    assert denoiser(torch.zeros(1, H, D), torch.zeros(1, H, A), last_step).shape == (1, H, D)


@pytest.mark.parametrize("num_steps, tau", [(12, 1.0), (128, 1.0), (128, 0.1)])
@pytest.mark.parametrize("preset", [pg.SamplerConfig.official, pg.SamplerConfig.paper])
def test_predicted_noise_of_a_cosine_schedule_gets_a_warning(num_steps, tau, preset):
    schedule = pg.NoiseSchedule.cosine(num_steps, tau)
    message = "multiplies the denoiser's error by 32 in one .*: prediction_type 'sample'"
    with pytest.warns(UserWarning, match=message) as caught:
        warn_of_amplified_errors(schedule, preset(prediction_type="epsilon"), stacklevel=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        warn_of_amplified_errors(schedule, preset(prediction_type="sample"))


@pytest.mark.parametrize("largest_beta, warned", [(0.5, False), (0.85, False), (0.95, True)])
def test_the_schedule_decides_about_the_warning(largest_beta, warned):
    """beta = 0.9 has a gain of 3 where nearly no signal is left: 0.9 / sqrt(0.1)."""
    betas = pg.NoiseSchedule.cosine(128).betas.clamp(max=largest_beta)
    schedule = pg.NoiseSchedule.from_betas(betas)
    with warnings.catch_warnings(record=True, action="always") as caught:
        warn_of_amplified_errors(schedule, pg.SamplerConfig.paper())
    assert bool(caught) is warned


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_an_error_of_predicted_noise_leaves_the_range_of_the_data(prediction_type):
    """What the warning says: a denoiser that errs by 0.2 and no more, of states of unit variance
    that cannot be predicted."""

    class Erring(nn.Module):
        observation_dim, action_dim, horizon = S, A, H

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, trajectory, actions, timesteps):
            alphabar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1)
            # the best predictions for standard normal data
            best = (1 - alphabar).sqrt() if prediction_type == "epsilon" else alphabar.sqrt()
            # what it was trained on has unit variance: beyond, it does not follow
            return best * trajectory.clamp(-3, 3) + 0.2

    schedule = pg.NoiseSchedule.cosine(128)
    moments = [(torch.zeros(size), torch.ones(size)) for size in (S, A)]
    sampler = pg.PolicyGuidedSampler(
        Erring(),
        pg.GaussianPolicy(S, A, hidden_dim=8),
        schedule,
        pg.Normalizer.from_moments(*moments),
        pg.SamplerConfig.paper(prediction_type=prediction_type),
        engine="reference",
    )
    generator = torch.Generator().manual_seed(0)
    batch = sampler.sample(torch.zeros(256, S), 0.005, generator)
    if prediction_type == "epsilon":
        assert batch.rewards.mean().abs() > 50
    else:
        assert batch.rewards.abs().max() < 10
