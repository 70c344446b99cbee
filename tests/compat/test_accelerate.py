"""`accelerate` and `install` on doubles of the released code's objects; numbers come from results
recorded from it."""

import copy
import functools
import io
import pickle
import threading
import time
import warnings
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polygrad_fast as pg
import polygrad_fast.compat.accelerate
import polygrad_fast.denoisers.transformer
from cases import INDEX, SAMPLES, part, recorded_arrays, recorded_moments, relative_error
from polygrad_fast.compat import official
from polygrad_fast.compat.live import moments

OFFICIAL = "sample_mlp_x0_official"
S, A = 5, 2


class FourierFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, t):
        angles = t[:, None] * self.weights * 2 * torch.pi
        return torch.cat([t[:, None], angles.sin(), angles.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.ln = nn.Linear(width, width), nn.LayerNorm(width)
        self.activation = F.relu

    def forward(self, x):
        return x + self.linear(self.activation(self.ln(x)))


class Trunk(nn.Module):
    def __init__(self, in_dim, width, depth, out_dim, dropout):
        super().__init__()
        blocks = [part for _ in range(depth) for part in (Block(width), nn.Dropout(dropout))]
        self.network = nn.Sequential(nn.Linear(in_dim, width), *blocks, nn.LayerNorm(width))
        self.activation, self.final_linear = F.relu, nn.Linear(width, out_dim)

    def forward(self, x):
        return self.final_linear(self.activation(self.network(x)))


class MLPDenoiser(nn.Module):
    """A residual MLP under the released names."""

    def __init__(self, horizon=4, width=32, depth=3, dims=(S, A), dropout=0.0):
        super().__init__()
        in_dim, out_dim = horizon * (sum(dims) + 2), horizon * (dims[0] + 2)
        embed_dim = in_dim
        self.proj = nn.Linear(in_dim, embed_dim)
        self.time_mlp = nn.Sequential(
            FourierFeatures(), nn.Linear(17, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        self.residual_mlp = Trunk(embed_dim, width, depth, out_dim, dropout)

    def forward(self, trajectory, actions, timesteps):
        x = torch.cat([trajectory, actions], dim=-1).flatten(1)
        x = self.proj(x) + self.time_mlp(timesteps)
        return self.residual_mlp(x).view(trajectory.shape)


class Renamed(nn.Module):
    """One of our denoisers, its `state_dict` under the released names."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.n_head = denoiser, denoiser.num_heads
        self.activation = F.gelu

    def state_dict(self, *args, **kwargs):
        return official.export_denoiser(self.denoiser.state_dict(), self.denoiser)

    def forward(self, *inputs):
        with patch.object(polygrad_fast.denoisers.transformer.F, "gelu", self.activation):
            return self.denoiser(*inputs)


class Diffusion(nn.Module):
    """What the library reads of a `GaussianDiffusion`; its own sampler only says that it ran."""

    def __init__(
        self, model, horizon=4, n_timesteps=16, tau=1.0, predict_epsilon=False, dims=(S, A)
    ):
        super().__init__()
        self.model, self.horizon, self.n_timesteps = model, horizon, n_timesteps
        self.observation_dim, self.action_dim = dims
        self.predict_epsilon, self.clip_denoised = predict_epsilon, False
        self.action_condition_noise_scale = 0.0
        for name, table in vars(pg.NoiseSchedule.cosine(n_timesteps, tau)).items():
            self.register_buffer(name, table)

    def forward(self, cond, *args, **kwargs):
        return "released", cond, args, kwargs


class ActorNetwork(nn.Module):
    def __init__(self, in_dim, out_dim, hidden_dim=16):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim, eps=1e-3), nn.ELU()]
            in_dim = hidden_dim
        self.model = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))

    def forward(self, x):
        return self.model(x)


class Bias(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self._bias = nn.Parameter(bias)


class ActorCritic(nn.Module):
    """What the library reads of a released actor-ac."""

    def __init__(self, normalizer, min_std=0.1, dims=(S, A)):
        super().__init__()
        self.actor, self.logstd = ActorNetwork(*dims), Bias(torch.full((dims[1],), -0.3))
        self.normalizer, self.min_std = normalizer, min_std
        self.use_normed_inputs, self.learned_std, self.init_std = False, True, 0.3

    def forward_actor(self, features, normed_input=True):
        if normed_input and not self.use_normed_inputs:
            features = self.normalizer.unnormalize(features, "observations")
        mean = torch.tanh(self.actor(features).float())
        std = self.logstd._bias.exp() + self.min_std if self.learned_std else self.init_std
        std = std * torch.ones_like(mean)
        return torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)


class GaussianNormalizer:
    def __init__(self, mean, std):
        self.means_torch, self.stds_torch = mean, std


class DatasetNormalizer:
    def __init__(self, pairs):
        self.normalizers = {field: GaussianNormalizer(*pair) for field, pair in pairs.items()}

    def normalize(self, x, key):
        part = self.normalizers[key]
        return (x - part.means_torch) / (part.stds_torch + 1e-6)

    def unnormalize(self, x, key):
        part = self.normalizers[key]
        return x * (part.stds_torch + 1e-6) + part.means_torch


class Agent(nn.Module):
    """What the library reads of a `DiffusionWMAgent`, and how that calls its diffusion model."""

    def __init__(self, diffusion_model, ac):
        super().__init__()
        self.diffusion_model, self.ac = diffusion_model, ac
        self.log_guidance = torch.log(torch.tensor(0.05)).requires_grad_(True)

    def imagine(self, conditions):
        self.diffusion_model.eval()
        result = self.diffusion_model(
            conditions,
            policy=self.ac.forward_actor,
            verbose=False,
            normalizer=self.ac.normalizer,
            guidance_scale=torch.exp(self.log_guidance),
            clip_std=3.0,
            clip_state_change=0.25,
        )
        self.diffusion_model.train()
        return result


def released(name: str = OFFICIAL):
    """Return doubles with the recorded weights and moments: diffusion model, actor-ac, s0."""
    arrays, info = recorded_arrays(name), INDEX[name]
    weights = part(arrays, "model.")
    dims = info["observation_dim"], info["action_dim"]
    if info["kind"] == "mlp":
        model = MLPDenoiser(info["horizon"], info["hidden"], info["layers"], dims)
        model.load_state_dict(weights)
    else:
        model = Renamed(official.load_denoiser(weights, *dims, info["horizon"]))
    diffusion = Diffusion(
        model,
        info["horizon"],
        info["n_timesteps"],
        info["noise_sched_tau"],
        info["predict_epsilon"],
        dims,
    )
    pairs = recorded_moments(arrays)
    ac = ActorCritic(DatasetNormalizer(pairs), info["min_std"], dims)
    ac.actor.load_state_dict(part(arrays, "actor."))
    ac.logstd._bias.data = arrays["logstd"].reshape(-1)
    return diffusion, ac, arrays["s0"]


def sample(diffusion, ac, s0, seed=0, **options):
    options = {"guidance_scale": 0.05, "clip_std": 3.0, "clip_state_change": 0.25, **options}
    torch.manual_seed(seed)
    return diffusion({0: s0}, policy=ac.forward_actor, normalizer=ac.normalizer, **options)


@pytest.mark.parametrize("name", SAMPLES)
def test_recorded_results(name, monkeypatch):
    diffusion, ac, s0 = released(name)
    arrays, info = recorded_arrays(name), INDEX[name]
    options = {
        "guidance_scale": info["guidance_scale"],
        "clip_state_change": info["clip_state_change"],
        **info["variant"],
    }
    num_steps, kind = info["n_timesteps"], options["guidance_type"]
    draws = [arrays["x_init"], arrays["act_init"]]
    for step in range(num_steps):
        draws.append(arrays["state_noise"][step])
        if kind != "none" and step < num_steps - 1:
            draws.append(arrays["action_noise"][step])
    fast = official.accelerate(diffusion, engine="reference")
    sample(fast, ac, s0, **options)

    def recorded(shape, **_):
        draw = draws.pop(0)
        assert tuple(draw.shape) == tuple(shape)
        return draw

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", recorded)
        x, actions, seq, metrics = sample(fast, ac, s0, return_sequence=True, **options)
    assert draws == []
    # A step turns the rounding of a predicted noise, which processors differ in, into 31.6 times as
    # much in the first step; tests/parity compares step by step.
    amplification = diffusion.posterior_mean_coef1 * diffusion.sqrt_recipm1_alphas_cumprod
    tolerance = 2e-6 * (amplification.max().item() if info["predict_epsilon"] else 1.0)
    assert relative_error(x, arrays["x_chain"][-1]) < tolerance
    assert relative_error(actions, arrays["act_chain"][-1]) < tolerance
    assert isinstance(seq, list) and len(seq) == num_steps
    for got, wanted in zip(seq, arrays["x_chain"], strict=True):
        assert isinstance(got, np.ndarray)
        assert relative_error(torch.from_numpy(got), wanted) < tolerance
    change = (arrays["x_chain"][-1] - arrays["x_chain"][-2]).abs()
    rounding = diffusion.posterior_mean_coef1[0] + diffusion.posterior_mean_coef2[0] - 1.0
    change[:, 0, : s0.shape[1]] = (rounding * s0).abs()
    assert metrics.keys() == {"avg_change", "max_change", "min_change", "std_change"}
    for key, wanted in (
        ("avg_change", change.mean()),
        ("max_change", change.max()),
        ("std_change", change.std()),
    ):
        assert isinstance(metrics[key], float)
        assert metrics[key] == pytest.approx(wanted.item(), rel=1e-3), key
    assert metrics["min_change"] < 1e-4


def our_sampler(diffusion, ac, config):
    pairs = {
        field: (part.means_torch, part.stds_torch)
        for field, part in ac.normalizer.normalizers.items()
    }
    return pg.PolicyGuidedSampler(
        official.load_denoiser(diffusion.model.state_dict(), S, A, 4),
        official.load_policy(ac.actor.state_dict(), ac.logstd._bias.detach(), 0.1),
        pg.NoiseSchedule.cosine(16),
        pg.Normalizer.from_moments(**pairs),
        config,
        engine="reference",
    )


@pytest.mark.parametrize("limit", [float("inf"), 0.1])
def test_metrics_are_of_the_mean_before_s0_is_put_back(limit):
    diffusion, ac, s0 = released()
    diffusion.posterior_mean_coef1[0] = 1.5  # rounding of the float32 tables, exaggerated
    fast = official.accelerate(diffusion, engine="reference")
    options = {"clip_state_change": limit, "return_sequence": True}
    _, _, (*_, before, after), metrics = sample(fast, ac, s0, **options)
    change = np.abs(after - before)
    change[:, 0, :S] = np.minimum(np.abs(0.5 * s0.numpy()), limit)
    assert metrics["min_change"] == pytest.approx(change.min(), abs=1e-6)
    assert metrics["avg_change"] == pytest.approx(change.mean(), rel=1e-4)
    assert metrics["std_change"] == pytest.approx(change.std(ddof=1), rel=1e-4)


VARIANTS = [
    {},
    {"guidance_type": "sample"},
    {"guidance_type": "none"},
    {"clip_std": None},
    {"clip_std": float("inf"), "clip_state_change": float("inf")},
    {"states_for_guidance": "posterior_mean"},
    {"update_states": True},
    {"guidance_type": "sample", "update_states": True},
    {"guidance_scale": torch.tensor([0.05], requires_grad=True)},
    {"verbose": False, "return_chain": True},
]


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_same_seed_as_our_sampler(engine, options):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine=engine)
    x, actions, seq, _ = sample(fast, ac, s0, seed=3, **options)
    kind = options.get("guidance_type", "grad")
    config = pg.SamplerConfig.official(
        action_update={"grad": "score"}.get(kind, kind),
        clip_std=None if options.get("clip_std", 3.0) in (None, float("inf")) else 3.0,
        clip_state_change=None if "clip_state_change" in options else 0.25,
        policy_input=options.get("states_for_guidance", "denoised"),
        update_states=options.get("update_states", False) and kind == "grad",
    )
    sampler = our_sampler(diffusion, ac, config)
    torch.manual_seed(3)
    batch = sampler.sample(s0, 0.05, normalized=True)
    assert relative_error(x[..., :S], batch.observations) < 1e-5
    assert relative_error(x[..., S], batch.rewards) < 1e-5
    assert relative_error(actions, batch.actions) < 1e-5
    assert seq == [] and not x.requires_grad
    assert actions.requires_grad == (config.clip_std is not None)


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("states", ["recon", "posterior_mean"])
@pytest.mark.parametrize("predict_epsilon", [False, True])
def test_clipped_actions_move_with_the_policy(engine, states, predict_epsilon):
    diffusion, ac, s0 = released()
    diffusion.predict_epsilon = predict_epsilon
    fast = official.accelerate(diffusion, engine=engine)
    options = {"clip_std": 1e-6, "states_for_guidance": states}  # clips all actions to the mean
    actions = sample(fast, ac, s0, **options)[1]
    raw = ac.normalizer.unnormalize(actions, "actions")
    (gradient,) = torch.autograd.grad(raw.sum(), ac.actor.model[-1].bias)
    wanted = (1.0 - raw.detach().square()).sum((0, 1))  # of tanh
    torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-2)
    seen = []

    def watched(observations, normed_input):
        seen.append(observations.detach())
        return ac.forward_actor(observations)

    sample(fast, SimpleNamespace(forward_actor=watched, normalizer=ac.normalizer), s0, **options)
    torch.testing.assert_close(seen[-1], seen[-2], rtol=1e-5, atol=1e-5)  # the last clip's states
    with torch.no_grad():
        constants = sample(fast, ac, s0, **options)[1]
    assert not constants.requires_grad and torch.equal(constants, actions)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_action_noise_scale(engine):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine=engine)
    states, actions = (len(s0), 4, S + 2), (len(s0), 4, A)
    torch.manual_seed(0)
    initial = torch.randn(states), torch.randn(actions)
    drawn = [(torch.randn(states), torch.randn(actions)) for _ in range(15)]
    drawn.append((torch.randn(states), torch.zeros(actions)))
    trajectories, action_noise = map(torch.stack, zip(*drawn, strict=True))
    sampler = our_sampler(diffusion, ac, pg.SamplerConfig.official())
    for scale in (0.0, 0.5, 1.0, 2.0):
        noise = pg.SampleNoise(*initial, trajectories, scale * action_noise)
        wanted = sampler.sample(s0, 0.05, noise=noise, normalized=True)
        x, got, _, _ = sample(fast, ac, s0, action_noise_scale=scale)
        assert relative_error(got, wanted.actions) < 1e-5
        assert relative_error(x[..., :S], wanted.observations) < 1e-5
    policy_samples = [
        sample(fast, ac, s0, action_noise_scale=scale, guidance_type="sample")[1]
        for scale in (0.5, 1.0)  # read by the score's update only
    ]
    assert torch.equal(*policy_samples)


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("predict_epsilon", [False, True])
def test_world_model_without_policy(engine, predict_epsilon):
    diffusion, _, s0 = released()
    diffusion.predict_epsilon = predict_epsilon
    act = torch.randn(len(s0), 4, A)
    torch.manual_seed(1)
    x = torch.randn(len(s0), 4, S + 2)
    x[:, 0, :S] = s0
    wanted = []
    for k in reversed(range(16)):
        torch.randn_like(act)  # the released code draws it and multiplies it by 0
        steps = torch.full((len(s0),), k)
        seen = diffusion.alphas_cumprod[k].sqrt() * act
        denoised = diffusion.model(x, seen, steps).detach()
        if predict_epsilon:
            denoised = diffusion.sqrt_recip_alphas_cumprod[k] * x - (
                diffusion.sqrt_recipm1_alphas_cumprod[k] * denoised
            )
        mean = diffusion.posterior_mean_coef1[k] * denoised + diffusion.posterior_mean_coef2[k] * x
        noise = torch.randn_like(x) * (k > 0)
        x = mean + (0.5 * diffusion.posterior_log_variance_clipped[k]).exp() * noise
        x[:, 0, :S] = s0
        wanted.append(x)
    fast = official.accelerate(diffusion, engine=engine)
    torch.manual_seed(1)
    got, actions, seq, metrics = fast({0: s0}, act, policy=None, return_sequence=True)
    assert actions is None and metrics == 0.0
    assert relative_error(got, wanted[-1]) < 1e-4
    for a, b in zip(seq, wanted, strict=True):
        assert relative_error(torch.from_numpy(a), b) < 1e-4
    torch.manual_seed(1)
    assert torch.equal(fast({0: s0}, act)[0], got)


def step_in_place(diffusion, ac):
    parameters = [*diffusion.model.residual_mlp.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def reassign_data(diffusion, ac):
    for parameter in diffusion.parameters():
        parameter.data = 0.5 * parameter.data


def replace_parameter(diffusion, ac):
    bias = diffusion.model.residual_mlp.final_linear.bias
    diffusion.model.residual_mlp.final_linear.bias = nn.Parameter(bias.detach() + 1.0)


def load_weights(diffusion, ac):
    diffusion.load_state_dict(Diffusion(MLPDenoiser(), tau=0.2).state_dict())


def train_actor(diffusion, ac):
    ac.actor.model[-1].bias.data = ac.actor.model[-1].bias.data + 1.0


def train_std(diffusion, ac):
    with torch.no_grad():
        ac.logstd._bias -= 2.0


def refresh_moments(diffusion, ac):
    for field in ac.normalizer.normalizers.values():
        field.means_torch = field.means_torch + 0.5
        field.stds_torch = field.stds_torch * 2.0


def predict_noise(diffusion, ac):
    diffusion.predict_epsilon = True


def raise_min_std(diffusion, ac):
    ac.min_std = 0.7


def read_normed_inputs(diffusion, ac):
    ac.use_normed_inputs = True


def replace_network(diffusion, ac):
    diffusion.model = MLPDenoiser(width=16, depth=2)


IN_PLACE = [step_in_place, reassign_data, replace_parameter, train_actor, train_std]
IN_PLACE += [refresh_moments]
STRUCTURAL = [load_weights, predict_noise, raise_min_std, read_normed_inputs, replace_network]


@pytest.mark.parametrize("change", IN_PLACE + STRUCTURAL)
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_live_changes_are_seen_at_the_next_call(change, engine, monkeypatch):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine=engine)
    before = sample(fast, ac, s0)
    assert torch.equal(sample(fast, ac, s0)[1], before[1])
    change(diffusion, ac)
    wanted = sample(official.accelerate(diffusion, engine=engine), ac, s0)
    if change in IN_PLACE:  # no new sampler, hence no new graph

        def refuse(*args, **kwargs):
            raise AssertionError("a sampler was built")

        monkeypatch.setattr(pg.compat.accelerate, "PolicyGuidedSampler", refuse)
    after = sample(fast, ac, s0)
    assert torch.equal(after[0], wanted[0]) and torch.equal(after[1], wanted[1])
    assert after[3] == wanted[3]
    assert (after[1] - before[1]).abs().max() > 1e-4


def test_the_guidance_scale_is_read_at_every_call():
    diffusion, ac, s0 = released()
    agent = Agent(diffusion, ac)
    official.install(agent, engine="torch")
    torch.manual_seed(0)
    before = agent.imagine({0: s0})
    with torch.no_grad():
        agent.log_guidance += 1.0
    torch.manual_seed(0)
    after = agent.imagine({0: s0})
    wanted = sample(diffusion, ac, s0, guidance_scale=0.05 * np.e)
    assert relative_error(after[1], wanted[1]) < 1e-5
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_changing_options_keep_few_samplers():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    first = sample(fast, ac, s0, clip_std=0.5)[1]
    for i in range(2 * polygrad_fast.compat.accelerate.MAX_SAMPLERS):
        sample(fast, ac, s0, clip_std=1.0 + i)
    assert len(fast._samplers) == polygrad_fast.compat.accelerate.MAX_SAMPLERS
    assert torch.equal(sample(fast, ac, s0, clip_std=0.5)[1], first)


def test_a_compiled_network_is_looked_into():
    diffusion, ac, s0 = released()
    wanted = sample(official.accelerate(diffusion, engine="torch"), ac, s0)[1]
    wrapper = nn.Module()  # as torch.compile makes one
    wrapper._orig_mod = diffusion.model
    diffusion.model = wrapper
    assert torch.equal(sample(official.accelerate(diffusion, engine="torch"), ac, s0)[1], wanted)


def test_defaults_are_the_released_ones():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="reference")
    defaults = dict(
        guidance_scale=1.0,
        action_noise_scale=1.0,
        clip_std=None,
        states_for_guidance="recon",
        update_states=False,
        guidance_type="grad",
        clip_state_change=1.0,
    )
    torch.manual_seed(0)
    got = fast({0: s0}, policy=ac.forward_actor, normalizer=ac.normalizer)
    wanted = sample(fast, ac, s0, **defaults)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_building_draws_no_random_numbers():
    diffusion, ac, s0 = released()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    fast = official.accelerate(diffusion, engine="reference")
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(sample(fast, ac, s0)[0], sample(fast, ac, s0)[0])


@pytest.mark.parametrize("engine", ["reference", "torch"])
@pytest.mark.parametrize("update_states", [False, True])
def test_other_policies_are_called_as_they_are(engine, update_states):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine=engine)
    wanted = sample(fast, ac, s0, update_states=update_states)

    class Shifted(ActorCritic):
        def forward_actor(self, features, normed_input=True):
            inner = super().forward_actor(features, normed_input).base_dist
            return torch.distributions.Normal(inner.mean + 0.5, inner.stddev)

    plain = SimpleNamespace(forward_actor=lambda o, normed_input: ac.forward_actor(o))
    plain.normalizer = ac.normalizer
    got = sample(fast, plain, s0, update_states=update_states)
    assert max(map(relative_error, got[:2], wanted[:2])) < 1e-5
    shifted = Shifted(ac.normalizer)
    shifted.load_state_dict(ac.state_dict())
    other = sample(fast, shifted, s0, update_states=update_states)
    assert (other[1] - wanted[1]).abs().max() > 0.1


def test_other_affine_normalizers():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="reference")
    wanted = sample(fast, ac, s0)
    inner = ac.normalizer
    ac.normalizer = SimpleNamespace(normalize=inner.normalize, unnormalize=inner.unnormalize)
    got = sample(fast, ac, s0)
    assert max(map(relative_error, got[:2], wanted[:2])) < 1e-4
    cubic = SimpleNamespace(
        normalize=lambda x, key: x.sign() * x.abs() ** (1 / 3), unnormalize=lambda x, key: x**3
    )
    ac.normalizer = cubic
    with pytest.raises(pg.InputError, match="normalizer.*'actions'.*must be an affine map"):
        sample(fast, ac, s0)
    mean, std = moments(SimpleNamespace(normalize=same, unnormalize=same), "actions", A, "cpu")
    assert torch.equal(mean, torch.zeros(A)) and torch.equal(std + 1e-6, torch.ones(A))


def same(x, key):
    return x


def test_rare_calls_run_in_the_released_code():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="reference")
    act = torch.zeros(len(s0), 4, A)

    def falls_through(reason, cond, *args, **kwargs):
        with pytest.warns(UserWarning, match=reason):
            result = fast(cond, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fast(cond, *args, **kwargs)[0] == "released"  # told once
        assert result[0] == "released" and result[1] is cond
        return result[2:]

    guided = dict(policy=ac.forward_actor, normalizer=ac.normalizer, clip_std=2.0)
    args, kwargs = falls_through("other times than 0", {0: s0, 3: s0}, act, **guided)
    assert args == (act, ac.normalizer, ac.forward_actor, None)
    assert kwargs == {"return_sequence": False, "clip_std": 2.0}
    assert fast({0: s0}, horizon=4, **guided)[0] != "released"
    args, _ = falls_through("horizon 3", {0: s0}, horizon=3, **guided)
    assert args[-1] == 3
    diffusion.clip_denoised = True
    falls_through("clip_denoised", {0: s0}, act)
    assert fast({0: s0}, **guided)[0] != "released"  # not read by the guided sampler
    diffusion.clip_denoised, diffusion.action_condition_noise_scale = False, 1.0
    falls_through("action_condition_noise_scale 1.0", {0: s0}, act)
    assert fast({0: s0}, **guided)[0] != "released"

    diffusion = Diffusion(MLPDenoiser(dropout=0.5))
    fast = official.accelerate(diffusion, engine="reference")
    falls_through("dropout", {0: s0}, **guided)
    fast.eval()
    assert fast({0: s0}, **guided)[0] != "released"


def test_install_leaves_the_agent_as_it_was():
    diffusion, ac, s0 = released()
    agent = Agent(diffusion, ac)
    names = list(agent.state_dict())
    parameters, modules = list(agent.parameters()), list(agent.modules())
    fast = official.install(agent, engine="reference")
    official.install(agent, engine="reference")
    assert agent.diffusion_model is diffusion
    assert list(agent.state_dict()) == names and list(agent.modules()) == modules
    assert all(a is b for a, b in zip(agent.parameters(), parameters, strict=True))
    torch.manual_seed(0)
    x, actions, seq, metrics = agent.imagine({0: s0})
    assert relative_error(x, sample(fast, ac, s0)[0]) < 1e-6
    assert all(parameter.grad is None for parameter in agent.parameters())

    average = copy.deepcopy(diffusion)
    assert average.forward.__self__ is average and average({0: s0})[0] == "released"
    buffer = io.BytesIO()
    torch.save(diffusion, buffer)
    assert b"polygrad_fast" not in buffer.getvalue()
    official.uninstall(agent)
    official.uninstall(agent)
    assert diffusion({0: s0})[0] == "released"


def test_an_accelerated_model_looks_like_the_model():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    assert fast.horizon == 4 and fast.n_timesteps == 16
    assert list(fast.parameters()) == list(diffusion.parameters())
    assert fast.eval() is fast and not diffusion.training
    assert fast.to("cpu").train() is fast and diffusion.training
    assert fast.state_dict().keys() == diffusion.state_dict().keys()
    assert official.accelerate(fast).diffusion_model is diffusion
    with pytest.raises(AttributeError, match="Diffusion.*horizont"):
        fast.horizont  # noqa: B018
    with torch.inference_mode():
        fresh = official.accelerate(diffusion, engine="torch")
        first = sample(fresh, ac, s0)
    for model in (fast, fresh):
        assert torch.equal(first[1], sample(model, ac, s0)[1])


def activation_changed():
    diffusion = released()[0]
    diffusion.model.residual_mlp.forward = lambda x: torch.zeros(len(x), 28)
    return diffusion


def forward_broken():
    diffusion = released()[0]

    def fail(*inputs):
        raise RuntimeError("first line\nsecond line")

    diffusion.model.forward = fail
    return diffusion


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: nn.Linear(2, 2), "must be a GaussianDiffusion.*got a Linear.*'model'"),
        (lambda: None, "must be a GaussianDiffusion.*got a NoneType"),
        (lambda: Diffusion(nn.Linear(2, 2)), "residual MLP.*transformer.*got names"),
        (lambda: Diffusion(MLPDenoiser(horizon=3)), "horizon 4.*size mismatch"),
        (forward_broken, "diffusion_model.model cannot be called: first line$"),
        (activation_changed, "got a MLPDenoiser that computes something else"),
    ],
)
def test_wrong_objects_are_told_in_one_sentence(build, message):
    with pytest.raises(pg.InputError, match=message) as error:
        official.accelerate(build())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"engine": "fast"}, {"dtype": "int8"}, {"engine": "triton"}])
def test_wrong_engines_are_told_at_once(options):
    diffusion = released("sample_transformer_x0_official")[0]  # which triton does not offer
    with pytest.raises(pg.InputError, match=next(iter(options))):
        official.accelerate(diffusion, **{"engine": "torch", **options})


def test_wrong_agents_are_told():
    with pytest.raises(pg.InputError, match="agent must be a DiffusionWMAgent.*got a Linear"):
        official.install(nn.Linear(2, 2))
    agent = Agent(Diffusion(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(pg.InputError):
        official.install(agent)
    assert "forward" not in vars(agent.diffusion_model)


def laplace(observations, normed_input):
    return torch.distributions.Laplace(observations[..., :A], 1.0)


def three_actions(observations, normed_input):
    return torch.distributions.Normal(observations[..., :3], 1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(guidance="grad"), "options must be among .*, got 'guidance'$"),
        (dict(guidance_type="score"), "guidance_type must be one of.*got 'score'"),
        (dict(states_for_guidance="noisy"), "states_for_guidance must be.*got 'noisy'"),
        (dict(clip_std=-1.0), "clip_std must be.*got -1.0"),
        (dict(clip_std="3"), "clip_std must be.*got '3'"),
        (dict(clip_state_change=0), "clip_state_change must be.*got 0"),
        (dict(guidance_scale=-0.1), "guidance_scale must be.*got -0.1"),
        (
            dict(guidance_scale=torch.ones(2)),
            r"guidance_scale must be one number, got shape \(2,\)",
        ),
        (
            dict(guidance_scale=torch.ones(1, 1, 1, 1)),
            r"guidance_scale must .*, got shape \(1, 1, 1, 1\)",
        ),
        (dict(guidance_scale=torch.tensor(torch.nan)), r"guidance_scale must be.*tensor\(nan\)"),
        (dict(guidance_scale=torch.tensor(-0.1)), r"guidance_scale must be.*tensor\(-0.1"),
        (dict(action_noise_scale=None), "action_noise_scale must be.*got None"),
        (dict(normalizer=None), "normalizer must be given .*, got None"),
        (dict(normalizer=3), "normalizer.*int.*'actions'"),
        (dict(policy=3), "policy.*'int' object is not callable"),
        (dict(policy=laplace), "must return a Gaussian .*, got a Laplace"),
        (dict(policy=three_actions), r"must return actions of shape \(3, 2\).*got \(3, 3\)"),
        (dict(policy=None), "policy must be given .*guidance_scale.*, got None"),
        (dict(cond=[1]), "cond must be a dictionary.*got list"),
        (dict(cond={1: 2}), r"cond must be a dictionary.*got \[1\]"),
        (dict(cond={0: [1.0]}), r"cond\[0\] must be a tensor.*got list"),
        (dict(cond={0: torch.zeros(2, 3)}), r"shape \[B, 5\] .* got shape \(2, 3\)"),
        (dict(cond={0: torch.full((2, S), torch.nan)}), r"\[0, 0\] must be .* got nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_calls_are_told_in_one_sentence(options, message):
    diffusion, ac, s0 = released()
    call = dict(
        cond={0: s0},
        policy=ac.forward_actor,
        normalizer=ac.normalizer,
        guidance_scale=0.05,
    )
    with pytest.raises(pg.InputError, match=message) as error:
        official.accelerate(diffusion, engine="torch")(**call | options)
    assert "\n" not in str(error.value)


def test_calls_without_policy_need_actions():
    diffusion, _, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    with pytest.raises(pg.InputError, match=r"act must be a tensor of shape \(\d+, 4, 2\).*None"):
        fast({0: s0})
    with pytest.raises(pg.InputError, match=r"act must be.*got shape \(2,\)"):
        fast({0: s0}, torch.zeros(2))


TRANSFORMER = "sample_transformer_x0_official"


def another_activation(diffusion):
    diffusion.model.residual_mlp.activation = F.gelu


def an_activation_behind_zeros(diffusion):
    for parameter in diffusion.model.residual_mlp.final_linear.parameters():
        nn.init.zeros_(parameter)
    diffusion.model.residual_mlp.network[1].activation = F.relu6


def an_activation_behind_nan(diffusion):
    another_activation(diffusion)
    nn.init.constant_(diffusion.model.residual_mlp.final_linear.bias, torch.nan)


def almost_the_activation(diffusion):
    diffusion.model.activation = functools.partial(F.gelu, approximate="tanh")


def a_hook(diffusion):
    diffusion.model.residual_mlp.register_forward_hook(lambda module, inputs, output: 2.0 * output)


OTHER_NETWORKS = [another_activation, an_activation_behind_zeros, an_activation_behind_nan]
OTHER_NETWORKS += [almost_the_activation, a_hook]


@pytest.mark.parametrize("change", OTHER_NETWORKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_networks_that_compute_something_else_are_refused(change, when):
    name = TRANSFORMER if change is almost_the_activation else OFFICIAL
    diffusion, ac, s0 = released(name)
    message = "computes something else"
    if when == "before":
        change(diffusion)
        with pytest.raises(pg.InputError, match=message):
            official.accelerate(diffusion, engine="torch")
        return
    fast = official.accelerate(diffusion, engine="torch")
    sample(fast, ac, s0)
    change(diffusion)
    for _ in range(2):
        with pytest.raises(pg.InputError, match=message):
            sample(fast, ac, s0)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_comparison_leaves_the_network_as_it_was(name):
    diffusion, _, _ = released(name)
    before = copy.deepcopy(diffusion.state_dict())
    diffusion.train()
    official.accelerate(diffusion)
    assert all(torch.equal(before[key], value) for key, value in diffusion.state_dict().items())
    assert all(module.training for module in diffusion.modules())


def test_the_number_of_heads_is_seen():
    diffusion, ac, s0 = released(TRANSFORMER)
    fast = official.accelerate(diffusion, engine="torch")
    sample(fast, ac, s0)
    diffusion.model.n_head = 2
    for block in diffusion.model.denoiser.blocks:
        block.num_heads = 2
    sample(fast, ac, s0)
    assert {block.num_heads for block in fast._denoiser.module.blocks} == {2}


def dropout_network(diffusion):
    diffusion.model = MLPDenoiser(dropout=0.5)


def dropout_switched_on(diffusion):
    diffusion.model.residual_mlp.network[2].p = 0.5


def dropout_in_attention(diffusion):
    diffusion.model.residual_mlp.dropout = 0.5


def fewer_steps(diffusion):
    diffusion.n_timesteps = 8


def shorter_horizon(diffusion):
    diffusion.horizon = 3


@pytest.mark.parametrize(
    "change, reason",
    [
        (dropout_network, "dropout is active"),
        (dropout_switched_on, "dropout is active"),
        (dropout_in_attention, "dropout is active"),
        (fewer_steps, "n_timesteps 8, the schedule's tables have 16 rows"),
        (shorter_horizon, "horizon 3, the network's is 4"),
    ],
)
def test_changes_that_the_engines_lack_run_in_the_released_code(change, reason):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    sample(fast, ac, s0)
    change(diffusion)
    with pytest.warns(UserWarning, match=reason):
        assert sample(fast, ac, s0)[0] == "released"


def fixed_std(ac):
    ac.learned_std = False


def actor_activation(ac):
    ac.actor.model[2] = nn.ReLU()


def actor_hook(ac):
    ac.actor.register_forward_hook(lambda module, inputs, output: 2.0 * output)


@pytest.mark.parametrize("change", [fixed_std, actor_activation, actor_hook])
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_actors_that_compute_something_else_are_called(change, engine):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine=engine)
    before = sample(fast, ac, s0)
    assert fast._policy.is_copy
    change(ac)
    got = sample(fast, ac, s0)
    assert not fast._policy.is_copy
    called = SimpleNamespace(
        forward_actor=lambda *args, **kwargs: ac.forward_actor(*args, **kwargs)
    )
    called.normalizer = ac.normalizer
    wanted = sample(fast, called, s0)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert (got[1] - before[1]).abs().max() > 1e-3


def test_an_actor_behind_zeros_is_told_from_a_copy():
    diffusion, ac, s0 = released()
    nn.init.zeros_(ac.actor.model[-1].weight)
    ac.actor.model[2] = nn.ReLU()
    fast = official.accelerate(diffusion, engine="torch")
    sample(fast, ac, s0)
    assert not fast._policy.is_copy


class ClippedInputs(ActorCritic):
    def forward_actor(self, features, normed_input=True):
        return super().forward_actor(features.clamp(-1e6, 1e6), normed_input)


class ClippedOutputs(nn.Module):
    """An actor-critic of its own, which differs far from the data only."""

    __init__ = ActorCritic.__init__

    def forward_actor(self, features, normed_input=True):
        return ActorCritic.forward_actor(self, features.clamp(-50.0, 50.0), normed_input)


@pytest.mark.parametrize("kind", ["subclass", "other class", "object"])
def test_overridden_policies_are_called(kind):
    diffusion, ac, s0 = released()
    build = {"subclass": ClippedInputs, "other class": ClippedOutputs, "object": ActorCritic}[kind]
    if build is ClippedOutputs:
        other = ClippedOutputs.__new__(ClippedOutputs)
        nn.Module.__init__(other)
        other.__dict__.update(copy.copy(vars(ac)))
    else:
        other = build(ac.normalizer)
        other.load_state_dict(ac.state_dict())
    if kind == "object":

        def forward_actor(self, features, normed_input=True):
            return ActorCritic.forward_actor(self, features.clamp(-1e6, 1e6), normed_input)

        other.forward_actor = MethodType(forward_actor, other)
    fast = official.accelerate(diffusion, engine="torch")
    got = sample(fast, other, s0)
    assert not fast._policy.is_copy
    assert relative_error(got[1], sample(fast, ac, s0)[1]) < 1e-5 and fast._policy.is_copy


@pytest.mark.parametrize("in_place", [True, False])
def test_tables_changed_through_data_are_seen(in_place):
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    before = sample(fast, ac, s0)
    for name, table in vars(pg.NoiseSchedule.cosine(16, 0.2)).items():
        if in_place:
            getattr(diffusion, name).data.copy_(table)
        else:
            getattr(diffusion, name).data = table
    got = sample(fast, ac, s0)
    wanted = sample(official.accelerate(diffusion, engine="torch"), ac, s0)
    assert torch.equal(got[1], wanted[1])
    assert (got[1] - before[1]).abs().max() > 1e-3


def test_tables_of_several_lengths_are_told():
    diffusion = released()[0]
    diffusion.posterior_variance = diffusion.posterior_variance[:5]
    with pytest.raises(
        pg.InputError, match=r"posterior_variance must have as many rows .*, got \(5,\)"
    ):
        official.accelerate(diffusion)


def test_models_built_in_inference_mode_are_sampled():
    with torch.inference_mode():
        diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    with torch.no_grad():
        got = sample(fast, ac, s0)
    diffusion, ac, s0 = released()
    wanted = sample(official.accelerate(diffusion, engine="torch"), ac, s0)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("name", [OFFICIAL, TRANSFORMER])
@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_autocast_of_the_caller_has_no_effect(engine, name):
    diffusion, ac, s0 = released(name)
    wanted = sample(official.accelerate(diffusion, engine=engine), ac, s0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = official.accelerate(diffusion, engine=engine)
        got = sample(fast, ac, s0)
    assert fast._policy.is_copy
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_threads_share_an_accelerated_model(engine, monkeypatch):
    diffusion = Diffusion(MLPDenoiser(width=64))
    fast = official.accelerate(diffusion, engine=engine)
    generator = torch.Generator().manual_seed(0)
    act, states = torch.randn(64, 4, A, generator=generator), (64, 4, S + 2)
    noise = pg.SampleNoise(
        torch.randn(states, generator=generator),
        act,
        torch.randn(16, *states, generator=generator),
        torch.zeros(16, *act.shape),
    )
    monkeypatch.setattr(fast, "_draw_world_model_noise", lambda act: noise)
    starts = torch.randn(3, 64, S, generator=generator)
    wanted = [fast({0: s0}, act)[0] for s0 in starts]
    running, most = [], []
    refresh = fast._refresh

    def watched():
        running.append(1)
        most.append(len(running))
        time.sleep(0.002)  # another thread's turn
        refresh()
        running.pop()

    monkeypatch.setattr(fast, "_refresh", watched)
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(fast({0: starts[i]}, act)[0], wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(most) == 15 and max(most) == 1


def scaled(scale, offset=0.0, **attributes):
    scale = torch.as_tensor(scale)
    return SimpleNamespace(
        normalize=lambda x, key: (x - offset) / scale,
        unnormalize=lambda x, key: x * scale + offset,
        **attributes,
    )


@pytest.mark.parametrize(
    "normalizer, message",
    [
        (scaled([1.0, -1.0]), r"slopes of at least 1e-06 .*, got \[1.0, -1.0\]"),
        (scaled([1e-7, 1.0]), "slopes of at least 1e-06"),
        (scaled([0.0, 1.0]), "slopes.*constant in the data"),
        (
            SimpleNamespace(normalize=lambda x, key: x, unnormalize=lambda x, key: x.clamp(-9, 9)),
            "'actions'.*slopes|must be an affine map",
        ),
        (
            SimpleNamespace(normalize=lambda x, key: 1.01 * x, unnormalize=lambda x, key: x),
            "normalize must be the inverse of unnormalize and map .* to 1, got",
        ),
    ],
)
def test_normalizers_that_ours_cannot_represent_are_told(normalizer, message):
    with pytest.raises(pg.InputError, match=message) as error:
        moments(normalizer, "actions", A, "cpu")
    assert "\n" not in str(error.value)


def test_affine_maps_are_read_exactly():
    for normalizer in (scaled([0.1, 3.0], 1000.0), scaled([0.1, 3.0], 1000.0, normalizers=None)):
        mean, std = moments(normalizer, "actions", A, "cpu")
        assert torch.equal(mean, torch.full((A,), 1000.0))
        torch.testing.assert_close(std + 1e-6, torch.tensor([0.1, 3.0]), rtol=1e-5, atol=0)


def test_observations_that_ours_cannot_represent_go_to_the_live_policy():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    sample(fast, ac, s0)
    assert fast._policy.is_copy
    gaussian = ac.normalizer
    scale = torch.tensor([-1.0, 0.0, 1.0, 1.0, 1.0])
    ac.normalizer = SimpleNamespace(
        normalize=lambda x, key: gaussian.normalize(x, key),
        unnormalize=lambda x, key: (
            x * scale if key == "observations" else gaussian.unnormalize(x, key)
        ),
    )
    got = sample(fast, ac, s0)
    assert not fast._policy.is_copy
    wanted = sample(official.accelerate(diffusion, engine="reference"), ac, s0)
    assert max(map(relative_error, got[:2], wanted[:2])) < 1e-5


def test_attributes_are_set_on_the_model():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    before = sample(fast, ac, s0)
    fast.predict_epsilon = True
    assert diffusion.predict_epsilon is fast.predict_epsilon is True
    assert "predict_epsilon" not in vars(fast)
    assert (sample(fast, ac, s0)[1] - before[1]).abs().max() > 1e-3
    fast.engine = "reference"
    assert "engine" not in vars(diffusion)
    wanted = sample(official.accelerate(diffusion, engine="reference"), ac, s0)
    assert torch.equal(sample(fast, ac, s0)[1], wanted[1])


def test_forward_is_the_accelerated_call():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    assert torch.equal(sample(fast.forward, ac, s0)[1], sample(fast, ac, s0)[1])


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_of_an_installed_model_are_plain(duplicate):
    diffusion, ac, s0 = released()
    agent = Agent(diffusion, ac)
    official.install(agent, engine="torch")
    other = duplicate(diffusion)
    assert type(other) is Diffusion and not {"forward", "__getstate__"} & vars(other).keys()
    assert other({0: s0})[0] == "released"
    assert agent.imagine({0: s0})[0] != "released"
    accelerated = duplicate(diffusion.forward)
    assert (accelerated.diffusion_model is diffusion) == (duplicate is copy.copy)
    assert torch.equal(sample(accelerated, ac, s0)[1], sample(diffusion, ac, s0)[1])


def test_uninstall_restores_the_users_forward():
    diffusion, ac, s0 = released()
    agent = Agent(diffusion, ac)

    def mine(cond, *args, **kwargs):
        return ("mine", *Diffusion.forward(diffusion, cond, *args, **kwargs))

    diffusion.forward = mine
    official.install(agent, engine="torch")
    official.install(agent, engine="reference")
    assert agent.imagine({0: s0})[0] != "mine"
    with pytest.warns(UserWarning, match="other times"):
        result = diffusion({0: s0, 3: s0}, policy=ac.forward_actor, normalizer=ac.normalizer)
    assert result[:2] == ("mine", "released")
    assert copy.copy(diffusion)({0: s0})[0] == "mine"
    official.uninstall(agent)
    assert diffusion.forward is mine and "__getstate__" not in vars(diffusion)


def test_a_failed_link_changes_nothing():
    diffusion, ac, s0 = released()
    fast = official.accelerate(diffusion, engine="torch")
    before = sample(fast, ac, s0)
    network, betas = diffusion.model, diffusion.betas
    diffusion.model, diffusion.betas = nn.Linear(2, 2), betas.to("meta")
    for _ in range(2):
        with pytest.raises(pg.InputError, match="got names"):
            sample(fast, ac, s0)
        diffusion.model = nn.Linear(3, 3)
    assert fast._device == betas.device
    diffusion.model, diffusion.betas = network, betas
    assert torch.equal(sample(fast, ac, s0)[1], before[1])
