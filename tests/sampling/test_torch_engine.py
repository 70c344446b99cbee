"""Engine "torch" computes what the reference computes."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import polygrad_fast as pg
from cases import SAMPLES, recorded_sample, sampler_configs
from polygrad_fast.errors import InputError
from polygrad_fast.reference.guided_step import denoiser_actions, guided_step
from polygrad_fast.sampling import linear, torch_engine, torch_step
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.folded_networks import FoldedRollout
from polygrad_fast.sampling.linear import LinearOps
from polygrad_fast.sampling.noise import LoopNormals
from polygrad_fast.sampling.reference_engine import ReferenceEngine
from polygrad_fast.sampling.torch_engine import TorchEngine

S, A = 5, 2


def rollout_denoiser(horizon: int, process_noise: bool = False) -> pg.RolloutDenoiser:
    """Return one whose differences and flags have units, and residuals are known."""
    denoiser = pg.RolloutDenoiser(S, A, horizon, 32, 2, process_noise)
    if process_noise:
        denoiser.step.residual_squares.copy_(torch.linspace(0.1, 0.6, S + 1))
        denoiser.step.residual_weight.fill_(1.0)
    denoiser.step.difference_scale.copy_(torch.linspace(0.2, 1.0, S))
    denoiser.flags.copy_(torch.tensor([-0.3, 2.0]))
    denoiser.step.range.lowest.copy_(-torch.linspace(1.0, 1.5, S + 1))  # reached by some
    denoiser.step.range.highest.copy_(torch.linspace(1.5, 1.0, S + 1))
    return denoiser


DENOISERS = {
    "rollout": lambda h, k: rollout_denoiser(h),
    "mlp": lambda h, k: pg.ResidualMLPDenoiser(S, A, h, hidden_dim=64, num_layers=2),
    "mlp_layer": lambda h, k: pg.ResidualMLPDenoiser(
        S, A, h, hidden_dim=64, num_layers=2, step_conditioning="layer", num_train_timesteps=k
    ),
    "transformer": lambda h, k: pg.TransformerDenoiser(S, A, h, hidden_dim=32, num_layers=2),
    "transformer_learned": lambda h, k: pg.TransformerDenoiser(
        S, A, h, hidden_dim=32, num_layers=2, step_conditioning="learned", num_train_timesteps=k
    ),
}
KINDS = [*DENOISERS]  # whose steps stand alone
DENOISERS["noisy_rollout"] = lambda h, k: rollout_denoiser(h, process_noise=True)
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Give every parameter, LayerNorms included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def make_components(kind="mlp", horizon=4, num_steps=6, config=None, seed=0, **policy_options):
    torch.manual_seed(seed)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(S), torch.rand(S) + 0.5),
        actions=(0.3 * torch.randn(A), torch.rand(A) + 0.5),
    )
    policy = pg.GaussianPolicy(S, A, hidden_dim=32, normalizer=normalizer, **policy_options)
    return SamplerComponents(
        randomize(DENOISERS[kind](horizon, num_steps), seed),
        randomize(policy, seed + 1),
        pg.NoiseSchedule.cosine(num_steps),
        normalizer,
        config or pg.SamplerConfig.official(),
        torch.device("cpu"),
        (torch.tensor(-0.5), torch.full((A,), 0.5)),
    )


def make_noise(c, batch: int, seed: int = 0) -> pg.SampleNoise:
    generator = torch.Generator().manual_seed(seed)
    k, states = c.schedule.num_train_timesteps, (batch, c.horizon, c.observation_dim + 2)
    actions = (batch, c.horizon, c.action_dim)
    shapes = (states, actions, (k, *states), (k, *actions))
    return pg.SampleNoise(*(torch.randn(shape, generator=generator) for shape in shapes))


def reference(c, s0, noise, guidance_scale=0.05):
    with torch.no_grad():
        return ReferenceEngine(c).sample(s0, guidance_scale, None, noise, True)


def assert_close(got, wanted, tolerance, what=""):
    scale = max(1.0, wanted.abs().max().item())
    assert (got - wanted).abs().max().item() < tolerance * scale, what


def single_step(engine: TorchEngine, step: int, x, u, s0, noise, guidance_scale):
    """Run one step of an engine from given states and actions."""
    engine = copy.copy(engine)
    engine.constants = engine.constants[step : step + 1]
    whole = LoopNormals(engine.components, len(s0), noise=noise)
    normals = SimpleNamespace(
        initial_trajectories=x, initial_actions=u, step=lambda _, k: whole.step(step, k)
    )
    with torch.no_grad():
        engine.denoiser.refresh()
        engine.step.refresh(guidance_scale)
        ws = engine._new_workspace(len(s0))
        engine._loop(ws, s0, normals, 1)
    return ws.trajectory, ws.actions


def assert_steps_agree(engine, c, s0, noise, guidance_scale, tolerance):
    """Compare every step with the reference's, each from the reference's inputs."""
    *_, chain = reference(c, s0, noise, guidance_scale)
    x, u = noise.initial_trajectories.clone(), noise.initial_actions
    x[:, 0, : s0.shape[1]] = s0
    for step, (wanted_x, wanted_u) in enumerate(zip(*chain, strict=True)):
        got_x, got_u = single_step(engine, step, x, u, s0, noise, guidance_scale)
        assert_close(got_x, wanted_x, tolerance, f"states, step {step}")
        assert_close(got_u, wanted_u, tolerance, f"actions, step {step}")
        x, u = wanted_x, wanted_u


@pytest.mark.parametrize("name", SAMPLES)
def test_released_chain(name):
    c, arrays, noise, guidance_scale = recorded_sample(name)
    engine = TorchEngine(c)
    x, u, chain = engine.sample(arrays["s0"], guidance_scale, None, noise, True)
    for k in range(len(chain[0])):
        assert_close(chain[0][k], arrays["x_chain"][k], 1e-4, k)
        assert_close(chain[1][k], arrays["act_chain"][k], 1e-4, k)
    assert torch.equal(x, chain[0][-1]) and torch.equal(u, chain[1][-1])
    assert torch.equal(x[:, 0, : arrays["s0"].shape[1]], arrays["s0"])
    assert_steps_agree(engine, c, arrays["s0"], noise, guidance_scale, 1e-5)


@settings(max_examples=80, deadline=None)
@given(
    config=sampler_configs(),
    kind=st.sampled_from(KINDS),
    horizon=st.sampled_from([1, 3]),
    batch=st.sampled_from([1, 7]),
    num_steps=st.integers(1, 5),
    normed_inputs=st.booleans(),
    num_layers=st.integers(0, 2),
    guidance_scale=st.sampled_from([0.0, 0.005, 0.7]),
    as_tensor=st.booleans(),
)
def test_every_option(
    config,
    kind,
    horizon,
    batch,
    num_steps,
    normed_inputs,
    num_layers,
    guidance_scale,
    as_tensor,
):
    if config.num_inference_steps is not None:
        fewer = min(config.num_inference_steps, num_steps)
        config = replace(config, num_inference_steps=fewer)
    c = make_components(
        kind, horizon, num_steps, config, normed_inputs=normed_inputs, num_layers=num_layers
    )
    delta = torch.tensor(guidance_scale) if as_tensor else guidance_scale
    s0 = torch.randn(batch, S, generator=torch.Generator().manual_seed(1))
    assert_steps_agree(TorchEngine(c), c, s0, make_noise(c, batch), delta, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 7, 257])
def test_whole_chain(kind, batch):
    c = make_components(kind, horizon=10)
    s0, noise = torch.randn(batch, S), make_noise(c, batch)
    got = TorchEngine(c).sample(s0, 0.05, None, noise, True)
    wanted = reference(c, s0, noise)
    for g, w in zip((*got[:2], *got[2]), (*wanted[:2], *wanted[2]), strict=True):
        assert_close(g, w, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_the_batch_changes_nothing(kind, monkeypatch):
    c = make_components(kind)
    s0, noise = torch.randn(29, S), make_noise(c, 29)
    whole, split = TorchEngine(c), TorchEngine(c)
    split.denoiser.rows_per_part = 2
    monkeypatch.setattr(torch_step, "POLICY_ROWS_PER_THREAD", 5)
    got = split.sample(s0, 0.05, None, noise, False)
    monkeypatch.undo()
    wanted = whole.sample(s0, 0.05, None, noise, False)
    assert_close(got[0], wanted[0], 1e-5)
    assert_close(got[1], wanted[1], 1e-5)


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_presets_at_full_length(preset):
    c = make_components(num_steps=128, config=getattr(pg.SamplerConfig, preset)())
    s0, noise = torch.randn(5, S), make_noise(c, 5)
    assert_steps_agree(TorchEngine(c), c, s0, noise, 0.005, 1e-5)


def test_guidance_scale_per_action():
    c = make_components()
    s0, noise = torch.randn(3, S), make_noise(c, 3)
    delta = torch.tensor([0.01, 0.2])
    engine = TorchEngine(c)
    got = engine.sample(s0, delta, None, noise, False)
    assert_close(got[1], reference(c, s0, noise, delta)[1], 1e-4)
    got = engine.sample(s0, 0.05, None, noise, False)
    assert_close(got[1], reference(c, s0, noise)[1], 1e-4)


class HalfPrecision(nn.Module):
    """The denoiser in plain PyTorch at a dtype, between float32 states."""

    def __init__(self, denoiser, dtype):
        super().__init__()
        self.denoiser, self.dtype = copy.deepcopy(denoiser).to(dtype), dtype
        for name in ("observation_dim", "action_dim", "horizon"):
            setattr(self, name, getattr(denoiser, name))

    def forward(self, trajectory, actions, timesteps):
        inputs = trajectory.to(self.dtype), actions.to(self.dtype)
        return self.denoiser(*inputs, timesteps).to(trajectory.dtype)


def with_modules(c, **modules):
    """Return the components with other modules."""
    changed = copy.copy(c)
    for name, module in modules.items():
        object.__setattr__(changed, name, module)
    return changed


def reference_step(c, step, x, u, s0, noise):
    k = c.schedule.num_train_timesteps - 1 - step
    x = x.clone()
    x[:, 0, : s0.shape[1]] = s0
    with torch.no_grad():
        seen = denoiser_actions(u, k, c.schedule, c.normalizer, c.config, c.action_bounds)
        prediction = c.denoiser(x, seen, torch.full((len(x),), k))
        normals = noise.trajectories[step].to(x.dtype), noise.actions[step].to(x.dtype)
        modules = c.policy, c.normalizer, c.schedule, c.config
        return guided_step(prediction, x, u, s0, k, *modules, 0.05, *normals)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_half_precision_error(kind, dtype, prediction_type):
    """At most twice the error of plain PyTorch at that dtype, against float64, every step from the
    same inputs."""
    config = pg.SamplerConfig.official(prediction_type=prediction_type, clip_state_change=None)
    errors = {"engine": [], "plain": []}
    for seed in range(3):
        c = make_components(kind, horizon=6, num_steps=8, config=config, seed=seed)
        if kind == "rollout":  # logits near 0 would be ends in one dtype and not in another
            torch.nn.init.zeros_(c.denoiser.step.network[-1].weight[-1])
            torch.nn.init.constant_(c.denoiser.step.network[-1].bias[-1:], -1.0)
        exact = with_modules(
            c,
            denoiser=copy.deepcopy(c.denoiser).double(),
            policy=copy.deepcopy(c.policy).double(),
            normalizer=copy.deepcopy(c.normalizer).double(),
            schedule=c.schedule.to(torch.float64),
        )
        plain = with_modules(c, denoiser=HalfPrecision(c.denoiser, HALF[dtype]))
        engine = TorchEngine(c, dtype)
        s0, noise = torch.randn(48, S), make_noise(c, 48)
        x, u = noise.initial_trajectories, noise.initial_actions
        *_, chain = reference(c, s0, noise)
        for step in range(8):
            wanted = reference_step(exact, step, *(t.double() for t in (x, u, s0)), noise)
            got = single_step(engine, step, x, u, s0, noise, 0.05)
            errors["engine"].append([(g - w).abs() for g, w in zip(got, wanted, strict=True)])
            got = reference_step(plain, step, x, u, s0, noise)
            errors["plain"].append([(g - w).abs() for g, w in zip(got, wanted, strict=True)])
            x, u = chain[0][step], chain[1][step]
    (states, actions), (plain_states, plain_actions) = (
        [torch.stack(part).flatten() for part in zip(*errors[name], strict=True)]
        for name in ("engine", "plain")
    )
    assert states.square().mean().sqrt() <= 2 * plain_states.square().mean().sqrt()
    assert states.max() <= 2 * plain_states.max()
    # Few actions, where the policy is steep, carry most of the squared error: no use comparing it.
    assert actions.mean() <= 2 * plain_actions.mean()
    assert actions.quantile(0.99) <= 2 * plain_actions.quantile(0.99)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changed_weights_are_seen(kind, dtype):
    c = make_components(kind)
    s0, noise = torch.randn(9, S), make_noise(c, 9)
    engine = TorchEngine(c, dtype)
    modules = nn.ModuleList([c.denoiser, c.policy])
    ema = copy.deepcopy(modules)
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)

    def train():
        for parameter in modules.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()

    def data_copy():
        for parameter in modules.parameters():
            parameter.data.copy_(parameter.data * 0.9)

    def foreach_lerp():
        with torch.no_grad():
            torch._foreach_lerp_(list(modules.parameters()), list(ema.parameters()), 0.3)

    def new_parameters():
        for module in modules.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach() * 1.1))

    def load():
        modules.load_state_dict(ema.state_dict())

    def moments():
        c.normalizer.update(
            {"observations": (torch.randn(S), torch.rand(S) + 1), "actions": (torch.ones(A),) * 2}
        )

    previous = engine.sample(s0, 0.05, None, noise, False)
    for change in (train, data_copy, foreach_lerp, new_parameters, load, moments):
        change()
        got = engine.sample(s0, 0.05, None, noise, False)
        fresh = TorchEngine(c, dtype).sample(s0, 0.05, None, noise, False)
        for g, f, p in zip(got[:2], fresh[:2], previous[:2], strict=True):
            assert torch.equal(g, f), change.__name__
            assert not torch.equal(g, p), change.__name__
        if dtype == "float32":
            assert_close(got[0], reference(c, s0, noise)[0], 1e-4, change.__name__)
        previous = got


def test_results_are_the_callers_own():
    c = make_components()
    engine = TorchEngine(c)
    s0, noise = torch.randn(4, S), make_noise(c, 4)
    kept = (s0.clone(), noise.initial_trajectories.clone(), noise.trajectories.clone())
    first = engine.sample(s0, 0.05, None, noise, True)
    tensors = (*first[:2], *first[2])
    copies = [tensor.clone() for tensor in tensors]
    engine.sample(s0 + 1, 0.3, None, make_noise(c, 4, seed=1), True)
    assert all(torch.equal(t, k) for t, k in zip(tensors, copies, strict=True))
    for tensor in tensors:
        tensor.fill_(float("nan"))
    again = engine.sample(s0, 0.05, None, noise, True)
    assert all(torch.equal(t, k) for t, k in zip((*again[:2], *again[2]), copies, strict=True))
    for t, k in zip((s0, noise.initial_trajectories, noise.trajectories), kept, strict=True):
        assert torch.equal(t, k)


def test_samplers_side_by_side_and_changing_batch_sizes():
    cs = [make_components(kind, seed=i) for i, kind in enumerate(KINDS)]
    engines = [TorchEngine(c) for c in cs]
    for batch in (3, 1, 8, 3, *range(1, 12), 3):  # more sizes than workspaces are kept
        s0 = torch.randn(batch, S)
        for c, engine in zip(cs, engines, strict=True):
            noise = make_noise(c, batch)
            got = engine.sample(s0, 0.05, None, noise, False)
            assert torch.equal(got[0], TorchEngine(c).sample(s0, 0.05, None, noise, False)[0])
            assert len(engine._workspaces) <= torch_engine.MAX_WORKSPACES


@pytest.mark.parametrize("action_update", ["score", "sample", "exact", "none"])
def test_same_seed_same_trajectories_as_the_reference(action_update):
    c = make_components(config=pg.SamplerConfig.official(action_update=action_update))
    s0 = torch.randn(20, S)
    generators = [torch.Generator().manual_seed(5) for _ in range(3)]
    engine = TorchEngine(c)
    for _ in range(2):  # the second sample continues each generator's stream
        first = engine.sample(s0, 0.05, generators[0], None, True)
        second = engine.sample(s0, 0.05, generators[1], None, False)
        with torch.no_grad():
            wanted = ReferenceEngine(c).sample(s0, 0.05, generators[2], None, False)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert_close(first[0], wanted[0], 1e-4)
        assert_close(first[1], wanted[1], 1e-4)
        assert torch.equal(generators[0].get_state(), generators[2].get_state())
    torch.manual_seed(7)
    default = engine.sample(s0, 0.05, None, None, False)
    seeded = engine.sample(s0, 0.05, torch.Generator().manual_seed(7), None, False)
    assert torch.equal(default[0], seeded[0])


def test_non_contiguous_inputs():
    c = make_components()
    s0, noise = torch.randn(7, S), make_noise(c, 7)
    wanted = TorchEngine(c).sample(s0, 0.05, None, noise, False)
    strided = pg.SampleNoise(
        *(
            torch.stack([t, t], dim=-1)[..., 0]
            for t in (
                noise.initial_trajectories,
                noise.initial_actions,
                noise.trajectories,
                noise.actions,
            )
        )
    )
    assert not strided.trajectories.is_contiguous()
    got = TorchEngine(c).sample(s0.t().contiguous().t(), 0.05, None, strided, False)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


class StateDependentPolicy(nn.Module):
    """Some policy of the user's: raw observations -> mean and std."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(S, 2 * A)

    def forward(self, observations):
        mean, log_std = self.linear(observations).chunk(2, dim=-1)
        return mean, torch.exp(0.1 * log_std) + 0.2


class Scaled(pg.GaussianPolicy):
    """A subclass may compute something else."""

    def forward(self, observations):
        mean, std = super().forward(observations)
        return 0.5 * mean, std


@pytest.mark.parametrize(
    "options", [{}, {"update_states": True}, {"action_update": "exact", "num_inference_steps": 4}]
)
@pytest.mark.parametrize("make", [StateDependentPolicy, lambda: Scaled(S, A, hidden_dim=16)])
def test_foreign_policy(make, options):
    config = pg.SamplerConfig.official(max_guidance=0.4, **options)
    c = make_components(config=config)
    c = with_modules(c, policy=make())
    s0, noise = torch.randn(7, S), make_noise(c, 7)
    assert_steps_agree(TorchEngine(c), c, s0, noise, 0.05, 1e-5)


class ForeignDenoiser(nn.Module):
    """Returns the same buffer each time, which the engine must not write to."""

    observation_dim, action_dim, horizon = S, A, 4

    def __init__(self):
        super().__init__()
        self.register_buffer("prediction", torch.full((3, 4, S + 2), 0.3))

    def forward(self, trajectory, actions, timesteps):
        return self.prediction


def test_foreign_denoiser():
    c = make_components(config=pg.SamplerConfig.paper())
    c = with_modules(c, denoiser=ForeignDenoiser())
    noise = make_noise(c, 3)
    assert_steps_agree(TorchEngine(c), c, torch.randn(3, S), noise, 0.05, 1e-5)
    with pytest.raises(InputError, match="ForeignDenoiser.*'bfloat16'"):
        TorchEngine(c, "bfloat16")


class FarPolicy(nn.Module):
    """Its means are far from all actions, as on a coarse normalizer."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, observations):
        mean = self.size * (1.0 + 0.1 * observations[..., :A].sin())
        return mean, torch.full_like(mean, 0.7)


@pytest.mark.parametrize("clip_order", ["before", "after"])
@pytest.mark.parametrize("clip_std", [None, 3.0])
@pytest.mark.parametrize("size", [1e4, 1e7])
def test_huge_means_cost_no_digits(size, clip_std, clip_order):
    """m + (u - m) (1 - pull) would: its error is that of m, here compared in float64."""
    config = pg.SamplerConfig.official(clip_std=clip_std, clip_order=clip_order)
    c = make_components(config=config)
    c = with_modules(c, policy=FarPolicy(size), normalizer=pg.Normalizer(S, A))
    exact = with_modules(
        c,
        denoiser=copy.deepcopy(c.denoiser).double(),
        normalizer=pg.Normalizer(S, A).double(),
        schedule=c.schedule.to(torch.float64),
    )
    s0, noise = torch.randn(7, S), make_noise(c, 7)
    x, u = noise.initial_trajectories, noise.initial_actions
    delta = 0.05 / size  # moves the actions by the order of one
    for step in (0, 3, 5):
        k = c.schedule.num_train_timesteps - 1 - step
        with torch.no_grad():
            wide = [t.double() for t in (x, u, s0)]
            wide[0][:, 0, :S] = wide[2]
            seen = denoiser_actions(
                wide[1], k, exact.schedule, exact.normalizer, config, c.action_bounds
            )
            prediction = exact.denoiser(wide[0], seen, torch.full((7,), k))
            normals = noise.trajectories[step].double(), noise.actions[step].double()
            _, wanted = guided_step(
                prediction,
                *wide,
                k,
                *(exact.policy, exact.normalizer, exact.schedule, config, delta),
                *normals,
            )
        _, got = single_step(TorchEngine(c), step, x, u, s0, noise, delta)
        error = ((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max()
        assert error < 1e-6, (step, error)


def test_an_action_within_the_clip_stays_exactly_as_it_is():
    config = pg.SamplerConfig.official(clip_std=1e3, clip_final_actions=True)
    c = make_components(num_steps=1, config=config)
    noise = make_noise(c, 7)
    _, u, _ = TorchEngine(c).sample(torch.randn(7, S), 0.05, None, noise, False)
    assert torch.equal(u, noise.initial_actions)


def test_dtypes_that_cannot_be():
    with pytest.raises(InputError, match="'int8'"):
        TorchEngine(make_components(), "int8")
    with pytest.raises(InputError, match="CUDA GPU with dtype 'tf32'.*'cpu'"):
        TorchEngine(make_components(), "tf32")


@pytest.mark.parametrize("path", ["mkl", "onednn", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_path_of_the_linears(kind, path, monkeypatch):
    """oneDNN for none and for all of them, packed or not, though it pays for large ones only;
    changed weights are packed again."""
    onednn = path != "mkl"
    if onednn and not LinearOps.choose(torch.device("cpu"), torch.float32).onednn:
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(LinearOps, "choose", classmethod(lambda cls, *_: cls(onednn)))
    if path == "packed":
        monkeypatch.setattr(linear, "PACKING_USES", 1)
        monkeypatch.setattr(linear, "PACKING_SIZE", 1)
    c = make_components(kind)
    engine, s0, noise = TorchEngine(c), torch.randn(7, S), make_noise(c, 7)
    assert_steps_agree(engine, c, s0, noise, 0.05, 1e-5)
    assert (engine.denoiser.output_weight.packed is not None) == (path == "packed")
    with torch.no_grad():
        for weight in (*c.denoiser.parameters(), *c.policy.parameters()):
            weight.mul_(1.1)
    assert_steps_agree(engine, c, s0, noise, 0.05, 1e-5)


def test_paper_sized_network():
    c = make_components()
    denoiser = pg.ResidualMLPDenoiser(S, A, horizon=4, hidden_dim=1024, num_layers=3)
    c = with_modules(c, denoiser=randomize(denoiser, 3))
    s0, noise = torch.randn(33, S), make_noise(c, 33)
    assert_steps_agree(TorchEngine(c), c, s0, noise, 0.05, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind, dtype):
    c = make_components(kind)
    first = c.denoiser.step.network[0] if kind == "rollout" else c.denoiser.input
    with torch.no_grad():
        first.weight[3, 0] = -float("nan")
    x, *_ = TorchEngine(c, dtype).sample(torch.randn(2, S), 0.05, None, make_noise(c, 2), False)
    assert x[:, 1].isnan().all()


class TracedGraphs:
    """Stands in for `GraphCache` without a GPU: a trace keeps numbers and addresses as a captured
    graph does, and reads nothing else when replayed."""

    def __init__(self):
        self.traces = {}

    def __call__(self, key, function, inputs, generator):
        key = (key, tuple(tensor.shape for tensor in inputs))
        if key not in self.traces:
            self.traces[key] = make_fx(function)(*inputs)
        return tuple(output.clone() for output in self.traces[key](*inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", ["score", "states", "exact"])
def test_what_a_graph_would_capture(kind, update):
    update_states = update == "states"
    config = pg.SamplerConfig.official(
        update_states=update_states,
        denoiser_actions="clipped",
        action_update="exact" if update == "exact" else "score",
        num_inference_steps=2,
    )
    c = make_components(kind, num_steps=4, config=config)
    engine = TorchEngine(c)
    engine._captures = engine.step.captures = engine._held.fixed_addresses = True
    engine._graphs, engine._generator = TracedGraphs(), torch.Generator()
    engine.step.policy.exp2 = False  # as on a GPU
    optimizer = torch.optim.SGD([*c.denoiser.parameters(), *c.policy.parameters()], lr=0.1)
    deltas = [0.05, torch.tensor(0.3), 0.1, 0.2]
    if not update_states:  # which needs one guidance scale for all
        deltas.insert(1, torch.tensor([0.1, 0.2]))
    for i, delta in enumerate(deltas):
        for return_chain in (False, True):
            batch = 3 + (i == 1)
            s0, noise = torch.randn(batch, S), make_noise(c, batch, seed=i)
            x, u, chain = engine.sample(s0, delta, torch.Generator(), noise, return_chain)
            wanted = reference(c, s0, noise, delta)
            assert_close(x, wanted[0], 1e-4, i)
            assert_close(u, wanted[1], 1e-4, i)
            assert (chain is not None) == return_chain
            if return_chain:
                assert_close(chain[1], wanted[2][1], 1e-4, i)
            for parameter in (*c.denoiser.parameters(), *c.policy.parameters()):
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
            c.normalizer.update({"actions": (torch.randn(A), torch.rand(A) + 0.5)})


def ks_statistic(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest distance between two samples' empirical distribution functions."""
    grid = torch.cat([a, b]).sort().values
    shares = [torch.searchsorted(t.sort().values, grid, right=True) / len(t) for t in (a, b)]
    return (shares[0] - shares[1]).abs().max().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distribution_of_standardized_actions(dtype):
    c, arrays, _, guidance_scale = recorded_sample("sample_mlp_x0_official")
    n = 6000
    s0 = arrays["s0"][torch.arange(n) % len(arrays["s0"])]

    def standardized(engine, seed):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            x, u, _ = engine.sample(s0, guidance_scale, generator, None, False)
            observations = c.normalizer.unnormalize(x[..., : c.observation_dim], "observations")
            mean, std = c.policy(observations)
            z = (c.normalizer.unnormalize(u, "actions") - mean) / std
        return z[:, -1]  # one step per trajectory: independent rows

    ours, theirs = standardized(TorchEngine(c, dtype), 0), standardized(ReferenceEngine(c), 1)
    critical = 1.63 * (2 / n) ** 0.5  # 1 % level of the two-sample statistic
    for action in range(c.action_dim):
        assert ks_statistic(ours[:, action], theirs[:, action]) < critical
        shifted = theirs[:, action] + 0.1  # the check sees a tenth of a standard deviation
        assert ks_statistic(ours[:, action], shifted) > critical


EXACT = pg.SamplerConfig.official(
    action_update="exact", clip_state_change=None, scale_actions=False, denoiser_actions="clipped"
)


def rollout_sample(monkeypatch, c, batch, stepwise: bool, dtype="float32"):
    """Return states, actions and how many transitions were computed."""
    computed = []
    extend = FoldedRollout.extend

    def counted(self, rollout, buffer, stop):
        computed.append(len(buffer) * (stop - rollout.num_steps))
        return extend(self, rollout, buffer, stop)

    monkeypatch.setattr(FoldedRollout, "extend", counted)
    s0 = torch.randn(batch, S, generator=torch.Generator().manual_seed(3))
    engine, noise = TorchEngine(c, dtype), make_noise(c, batch)
    states, actions, _ = engine.sample(s0, 0.05, None, noise, not stepwise)
    monkeypatch.undo()
    return states, actions, sum(computed)


@pytest.mark.parametrize("batch", [1, 7, 257])
@pytest.mark.parametrize("horizon, num_steps", [(1, 2), (4, 5), (4, 9)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["rollout", "noisy_rollout"])
def test_rollouts_compute_each_step_of_the_horizon_once(
    monkeypatch, batch, horizon, num_steps, dtype, kind
):
    c = make_components(kind, horizon, num_steps, EXACT, normed_inputs=True)
    states, actions, computed = rollout_sample(monkeypatch, c, batch, True, dtype)
    all_states, all_actions, whole = rollout_sample(monkeypatch, c, batch, False, dtype)
    assert computed == batch * horizon and whole == num_steps * computed
    tolerance = 1e-5 if dtype == "float32" else 0.1  # products of other numbers of rows
    assert_close(states, all_states, tolerance)
    assert_close(actions, all_actions, tolerance)
    assert states.std() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"policy_input": "posterior_mean"},
        {"policy_input": "noisy"},
        {"clip_state_change": 0.25},
        {"num_inference_steps": 4},
        {"action_update": "sample"},
        {"variance_type": "beta"},
    ],
)
def test_what_needs_all_of_every_rollout_gets_it(options):
    c = make_components("rollout", 4, 8, replace(EXACT, **options), normed_inputs=True)
    engine = TorchEngine(c)
    assert not engine.settles
    s0, noise = torch.randn(5, S), make_noise(c, 5)
    states, actions, _ = engine.sample(s0, 0.05, None, noise, False)
    wanted_states, wanted_actions, _ = reference(c, s0, noise)
    assert_close(states, wanted_states, 1e-4)
    assert_close(actions, wanted_actions, 1e-4)


@pytest.mark.parametrize(
    "num_steps, config", [(5, EXACT), (3, EXACT), (6, replace(EXACT, action_update="sample"))]
)
def test_process_noise_is_the_initial_noise_in_every_step(num_steps, config):
    c = make_components("noisy_rollout", 4, num_steps, config, normed_inputs=True)
    s0, noise = torch.randn(6, S), make_noise(c, 6)
    wanted_states, wanted_actions, wanted_chain = reference(c, s0, noise)
    for return_chain in (False, True):
        states, actions, chain = TorchEngine(c).sample(s0, 0.05, None, noise, return_chain)
        assert_close(states, wanted_states, 1e-4)
        assert_close(actions, wanted_actions, 1e-4)
    for got, wanted in zip(chain, wanted_chain, strict=True):
        assert_close(got, wanted, 1e-4)
    c.denoiser.step.residual_squares.zero_()
    assert (reference(c, s0, noise)[0] - wanted_states).abs().max() > 0.1
