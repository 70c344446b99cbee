"""Engine "triton": whole chains against the released code's records and the reference engine."""

import copy
import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

import polygrad_fast as pg  # noqa: E402
from cases import SAMPLES, recorded_sample, refresh_weights, relative_error
from polygrad_fast.errors import InputError  # noqa: E402
from polygrad_fast.kernels import guided_step, precision  # noqa: E402
from polygrad_fast.sampling.components import SamplerComponents  # noqa: E402
from polygrad_fast.sampling.folding import fold_policy_input, fold_residual_mlp  # noqa: E402
from polygrad_fast.sampling.noise import SampleNoise  # noqa: E402
from polygrad_fast.sampling.reference_engine import ReferenceEngine  # noqa: E402
from polygrad_fast.sampling.triton_engine import TritonEngine  # noqa: E402
from polygrad_fast.sampling.triton_operands import (  # noqa: E402
    DenoiserOperands,
    PolicyWeights,
)

MLP_SAMPLES = [n for n in SAMPLES if n.startswith("sample_mlp") and "state_update" not in n]
S, A, H, K = 3, 2, 4, 8


def build(device, config=None, seed=0, hidden=32, num_layers=2, bounds=False, **denoiser_options):
    """A small random sampler."""
    torch.manual_seed(seed)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(S), torch.rand(S) + 0.5),
        actions=(0.1 * torch.randn(A), torch.rand(A) + 0.3),
    ).to(device)
    denoiser = pg.ResidualMLPDenoiser(
        S, A, H, hidden, num_layers, num_train_timesteps=K, **denoiser_options
    ).to(device)
    policy = pg.GaussianPolicy(S, A, 24, 2, 0.5, 0.1).to(device)
    return SamplerComponents(
        denoiser,
        policy,
        pg.NoiseSchedule.cosine(K).to(device),
        normalizer,
        config or pg.SamplerConfig.official(),
        torch.device(device),
        tuple(torch.tensor(b, device=device) for b in (-1.0, 1.0)) if bounds else None,
    )


def draw_noise(device, batch, seed=1, steps=K):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, H, S + 2), (batch, H, A), (steps, batch, H, S + 2), (steps, batch, H, A))
    return SampleNoise(*(torch.randn(s, generator=generator).to(device) for s in shapes))


def sample(engine, s0, guidance=0.05, generator=None, noise=None, return_chain=False):
    with torch.no_grad():
        return engine.sample(s0, guidance, generator, noise, return_chain)


def assert_same_chain(components, batch=3, guidance=0.05):
    device = components.device
    num_steps = components.num_steps
    s0, noise = torch.randn(batch, S, device=device), draw_noise(device, batch, steps=num_steps)
    got = sample(TritonEngine(components, "float32"), s0, guidance, None, noise, True)
    wanted = sample(ReferenceEngine(components), s0, guidance, None, noise, True)
    for step in range(num_steps):
        for name, mine, theirs in zip(("states", "actions"), got[2], wanted[2], strict=True):
            assert relative_error(mine[step], theirs[step]) < 1e-4, (step, name)
    assert torch.equal(got[0], got[2][0][-1]) and torch.equal(got[1], got[2][1][-1])


@pytest.mark.parametrize("name", MLP_SAMPLES)
def test_released_chain(device, name):
    components, arrays, noise, guidance_scale = recorded_sample(name, device)
    engine = TritonEngine(components, "float32")
    scale = torch.tensor(guidance_scale, device=device)
    trajectory, actions, chain = sample(engine, arrays["s0"], scale, None, noise, True)
    for step in range(components.schedule.num_train_timesteps):
        assert relative_error(chain[0][step], arrays["x_chain"][step]) < 1e-4, step
        assert relative_error(chain[1][step], arrays["act_chain"][step]) < 1e-4, step
    assert torch.equal(trajectory[:, 0, : components.observation_dim], arrays["s0"])
    without_chain = sample(engine, arrays["s0"], scale, None, noise)
    assert torch.equal(without_chain[0], trajectory) and torch.equal(without_chain[1], actions)
    assert without_chain[2] is None


CONFIGS = {
    "paper": pg.SamplerConfig.paper(prediction_type="sample"),
    "paper, epsilon": pg.SamplerConfig.paper(),
    "noisy states": pg.SamplerConfig.official(policy_input="noisy"),
    "policy sampling, beta": pg.SamplerConfig.paper(action_update="sample"),
    "exact": pg.SamplerConfig.official(action_update="exact"),
    "exact, few steps, clipped": pg.SamplerConfig.paper(
        action_update="exact",
        prediction_type="sample",
        denoiser_actions="clipped",
        num_inference_steps=5,
    ),
    "few steps": pg.SamplerConfig.official(num_inference_steps=3),
    "one step": pg.SamplerConfig.official(num_inference_steps=1),
    "clipped, bounded guidance": pg.SamplerConfig.official(
        clip_state_change=None, denoiser_actions="clipped", max_guidance=0.5
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_chain_equals_the_reference(device, name):
    bounds = CONFIGS[name].denoiser_actions == "clipped"
    assert_same_chain(build(device, CONFIGS[name], bounds=bounds))


@pytest.mark.parametrize("num_inference_steps", [None, 3])
def test_chain_of_the_papers_network(device, num_inference_steps):
    """Whose layers have an embedding of their own for every step of training."""
    config = pg.SamplerConfig.official(num_inference_steps=num_inference_steps)
    assert_same_chain(build(device, config, step_conditioning="layer"))


def test_chain_of_odd_widths(device):
    assert_same_chain(build(device, hidden=50, num_layers=1), batch=1)
    assert_same_chain(build(device, hidden=200, num_layers=1), batch=5)


@pytest.mark.parametrize("conditioning", ["input", "layer"])
@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", *(pytest.param(d, marks=pytest.mark.gpu) for d in ("tf32", "bfloat16"))],
)
@torch.no_grad()
def test_denoiser_error(device, conditioning, dtype):
    """The fused network's error is at most twice that of the plain one in the same dtype."""
    c = build(device, hidden=160, num_layers=3, step_conditioning=conditioning)
    operands = DenoiserOperands(c.denoiser, dtype, range(K), torch.device(device))
    refresh_weights(operands)
    workspace = operands.workspace(9)
    x, u = torch.randn(9, H, S + 2, device=device), torch.randn(9, H, A, device=device)
    z = torch.cat([x, u], -1).flatten(1)
    workspace.input[:, : z.shape[1]].copy_(z)
    for name in ("streams", "operands", "moments", "prediction"):
        getattr(workspace, name).fill_(torch.nan)
    steps = torch.full((9,), 5, device=device)
    got = operands.predict(workspace, 5).view(x.shape).double()
    exact = copy.deepcopy(c.denoiser).double()(x.double(), u.double(), steps)
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    with torch.autocast(torch.device(device).type, dtype=half, enabled=half is not None):
        plain = c.denoiser(x, u, steps).double()
    torch.backends.cuda.matmul.allow_tf32 = False
    error, allowed = (got - exact).abs().max(), 2 * (plain - exact).abs().max() + 1e-6
    assert error <= allowed


@pytest.mark.parametrize("conditioning", ["input", "layer"])
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_residual_stream_is_float32(device, conditioning, dtype):
    """Only GEMM operands are rounded: the error of the stream, large against what the layers add to
    it, is at most twice that of the plain formula which rounds operands alone."""
    c = build(device, hidden=160, num_layers=3, step_conditioning=conditioning)
    net = c.denoiser
    net.input.bias.copy_(100 * torch.randn(160))
    for block in net.blocks:
        block.linear.weight.mul_(1.0 if conditioning == "input" else 0.01)
    operands = DenoiserOperands(net, dtype, range(K), torch.device(device))
    refresh_weights(operands)
    workspace = operands.workspace(9)
    z = torch.randn(9, H * (S + 2 + A), device=device)
    workspace.input[:, : z.shape[1]].copy_(z)
    operands.predict(workspace, 5)

    def stream(dtype, rounded):
        """The residual stream after the last layer, in `dtype`."""
        folded = fold_residual_mlp(copy.deepcopy(net).double(), torch.arange(K, device=device))
        weight, rows = folded.input_weight, folded.input_rows
        h = rounded(z.to(dtype)) @ rounded(weight.to(dtype)).T + rows[5].to(dtype)
        for block in net.blocks:
            a, bias = h, block.linear.bias
            if conditioning == "input":
                norm = block.norm
                gamma, beta = norm.weight.to(dtype), norm.bias.to(dtype)
                a = torch.nn.functional.layer_norm(a, a.shape[-1:], gamma, beta, norm.eps)
            else:
                bias = bias + block.step_embedding(torch.tensor(5, device=device))
            weight = rounded(block.linear.weight.to(dtype))
            h = h + rounded(torch.relu(a)) @ weight.T + bias.to(dtype)
        return h.double()

    half = getattr(torch, dtype)
    exact = stream(torch.float64, lambda t: t)
    plain = stream(torch.float32, lambda t: t.to(half).float())
    got = workspace.streams[net.num_layers % 2].double()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("conditioning", ["input", "layer"])
@pytest.mark.parametrize("timesteps", [range(K), (1, 4, 7), (5,)])
@torch.no_grad()
def test_operands_are_the_folded_weights(device, conditioning, timesteps):
    """As folded in float64, to the error of one float32 product."""
    c = build(device, hidden=40, step_conditioning=conditioning)
    operands = DenoiserOperands(c.denoiser, "float32", timesteps, torch.device(device))
    for tensor in (operands.input_bias, operands.norms, *operands.weights, *operands.biases):
        tensor.fill_(torch.nan)
    refresh_weights(operands)
    steps = torch.tensor(timesteps, device=device)
    folded = fold_residual_mlp(copy.deepcopy(c.denoiser).double(), steps)
    pairs = [
        (operands.input_weight[:, : operands.in_dim], folded.input_weight),
        (operands.input_bias, folded.input_rows),
        (operands.weights[-1], folded.output.weight),
        (operands.biases[-1], folded.output.bias[None]),
        *zip(operands.weights, (layer.weight for layer in folded.layers), strict=False),
        *zip(operands.biases, (layer.rows for layer in folded.layers), strict=False),
    ]
    if conditioning == "input":
        norms = [*(layer.norm for layer in folded.layers), folded.norm]
        for (gamma, beta), norm in zip(operands.norms, norms, strict=True):
            pairs += [(gamma, norm.weight), (beta, norm.bias)]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=2e-6)
    assert operands.input_weight[:, operands.in_dim :].count_nonzero() == 0


@pytest.mark.parametrize("num_layers, normed_inputs", [(1, False), (2, False), (2, True)])
@torch.no_grad()
def test_operands_are_the_policys_weights(device, num_layers, normed_inputs):
    c = build(device)
    policy = pg.GaussianPolicy(S, A, 24, num_layers, 0.5, 0.1, normed_inputs, c.normalizer)
    policy.to(device).log_std.add_(0.3 * torch.randn(A, device=device))
    weights = PolicyWeights(policy, c.normalizer, "float32", torch.device(device))
    refresh_weights(weights)
    to, (*hidden, last) = weights.operands, weights.linears[1:]
    weight, bias = fold_policy_input(policy, c.normalizer)
    pairs = [
        (to.first_weight[:, :S], weight),
        (to.vectors[:, 0], torch.stack([bias.float(), *(linear.bias for linear in hidden)])),
        (to.vectors[:, 1], torch.stack([norm.weight for norm in weights.norms])),
        (to.vectors[:, 2], torch.stack([norm.bias for norm in weights.norms])),
        (to.last_weight, last.weight),
        (to.last_bias, last.bias),
        (to.std, policy.std),
    ]
    pairs += [(to.hidden_weight[:, :24], linear.weight) for linear in hidden]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=1e-7)


def test_weights_that_the_refresh_does_not_read(device):
    """Of another dtype, or laid out otherwise at the same address: refused in one line."""
    c = build(device)
    engine = TritonEngine(c, "float32")
    engine.refresh.follow()
    s0, linear = torch.randn(4, S, device=device), c.denoiser.blocks[0].linear
    for changed in (linear.weight.double(), linear.weight.t()):
        linear.weight.data = changed
        with pytest.raises(InputError, match="wants weights in torch.float32, contiguous, got"):
            sample(engine, s0)


@torch.no_grad()
def test_tf32_weights_are_rounded(device):
    """To the nearest ten-bit mantissa, at every refresh; a NaN stays one."""
    c = build(device, hidden=64)
    c.denoiser.output.weight[0, 0] = torch.nan
    # the NaN that CUDA produces, whose bits would overflow
    c.denoiser.output.weight.view(torch.int32)[0, 1] = 0x7FFFFFFF
    exact, tf32 = (
        DenoiserOperands(c.denoiser, d, range(K), torch.device(device)) for d in ("float32", "tf32")
    )
    policies = [
        PolicyWeights(c.policy, c.normalizer, d, c.device) for d in ("float32", "tf32", "float16")
    ]
    refresh_weights(exact, tf32, *policies)
    pairs = [
        (exact.input_weight, tf32.input_weight),
        *zip(exact.weights, tf32.weights, strict=True),
    ]
    for policy in policies[1:]:
        pairs.append((policies[0].operands.first_weight, policy.operands.first_weight))
    pairs.append((policies[0].operands.hidden_weight, policies[1].operands.hidden_weight))
    for wanted, got in pairs:
        assert torch.equal(got.isnan(), wanted.isnan())
        wanted, got = wanted.nan_to_num(), got.nan_to_num()
        assert (got.view(torch.int32) & 0x1FFF == 0).all()
        assert ((got - wanted).abs() <= wanted.abs() * 2**-11).all() and not torch.equal(
            got, wanted
        )
    assert exact.weights[-1].isnan().sum() == 2


def test_weights_and_moments_changed_in_place(device):
    c = build(device)
    engine = TritonEngine(c, "float32")
    s0, noise = torch.randn(4, S, device=device), draw_noise(device, 4)
    before = sample(engine, s0, noise=noise)
    optimizer = torch.optim.Adam([*c.denoiser.parameters(), *c.policy.parameters()], lr=1e-2)
    for _ in range(3):
        steps = torch.randint(K, (4,), device=device)
        prediction = c.denoiser(noise.initial_trajectories, noise.initial_actions, steps)
        loss = prediction.square().mean() + (c.policy(s0)[0] - 1).square().mean()
        optimizer.zero_grad()
        (loss + c.policy.std.sum()).backward()
        optimizer.step()
    c.normalizer.update({"observations": (torch.ones(S), torch.full((S,), 2.0)),
                         "actions": (torch.ones(A), torch.full((A,), 0.5))})  # fmt: skip
    got = sample(engine, s0, noise=noise)
    wanted = sample(ReferenceEngine(c), s0, noise=noise)
    assert relative_error(got[0], wanted[0]) < 1e-4 and relative_error(got[1], wanted[1]) < 1e-4
    assert relative_error(got[0], before[0]) > 1e-2


def test_weights_replaced(device):
    """A tensor put in a weight's place is seen too."""
    c = build(device)
    engine = TritonEngine(c, "float32")
    s0, noise = torch.randn(4, S, device=device), draw_noise(device, 4)
    sample(engine, s0, noise=noise)
    c.denoiser.output.weight.data = torch.randn_like(c.denoiser.output.weight)
    got, wanted = sample(engine, s0, noise=noise), sample(ReferenceEngine(c), s0, noise=noise)
    assert relative_error(got[0], wanted[0]) < 1e-4


def test_generator(device):
    engine = TritonEngine(build(device), "float32")
    s0 = torch.randn(5, S, device=device)

    def seeded(seed, s0=s0):
        return sample(engine, s0, generator=torch.Generator(device).manual_seed(seed))

    first, again, other = seeded(0), seeded(0), seeded(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.isclose(first[1], other[1]).any()
    generator = torch.Generator(device).manual_seed(0)
    sample(engine, s0, generator=generator)
    second = sample(engine, s0, generator=generator)
    assert not torch.isclose(first[1], second[1]).any()
    fewer = seeded(0, s0[:2])
    assert torch.allclose(fewer[0], first[0][:2], atol=1e-5)
    assert torch.allclose(fewer[1], first[1][:2], atol=1e-5)
    torch.manual_seed(7)
    default = sample(engine, s0)
    torch.manual_seed(7)
    assert torch.equal(sample(engine, s0)[0], default[0])


def test_results_are_the_callers(device):
    engine = TritonEngine(build(device), "float32")
    s0, noise = torch.randn(3, S, device=device), draw_noise(device, 3)
    first = sample(engine, s0, noise=noise, return_chain=True)
    kept = [t.clone() for t in (first[0], first[1], *first[2])]
    second = sample(engine, s0 + 1, noise=draw_noise(device, 3, seed=2), return_chain=True)
    for tensor in (*second[:2], *second[2]):
        tensor.fill_(torch.nan)
    assert all(map(torch.equal, kept, (first[0], first[1], *first[2])))
    first[0].zero_()
    assert torch.equal(first[2][0], kept[2])


def test_the_last_steps_of_the_chain(device):
    engine = TritonEngine(build(device), "float32")
    s0, noise = torch.randn(3, S, device=device), draw_noise(device, 3)
    x, u, whole = sample(engine, s0, noise=noise, return_chain=True)
    for length in (1, 2):
        out = sample(engine, s0, noise=noise, return_chain=length)
        assert torch.equal(out[0], x) and torch.equal(out[1], u)
        for got, wanted in zip(out[2], whole, strict=True):
            assert torch.equal(got, wanted[-length:])


def test_inputs_are_not_changed(device):
    engine = TritonEngine(build(device), "float32")
    wide, noise = torch.randn(6, 2 * S, device=device), draw_noise(device, 3)
    s0 = wide[::2, ::2]  # not contiguous
    kept = [t.clone() for t in (s0, *vars(noise).values())]
    got = sample(engine, s0, noise=noise)
    assert all(map(torch.equal, kept, (s0, *vars(noise).values())))
    assert torch.equal(got[0], sample(engine, s0.contiguous(), noise=noise)[0])


def two_sample_ks(x, y):
    """p-value that two samples have one distribution."""
    x, y = (v.double().flatten().sort().values for v in (x, y))
    points = torch.cat([x, y])
    d = (torch.searchsorted(x, points, right=True) / len(x)
         - torch.searchsorted(y, points, right=True) / len(y)).abs().max().item()  # fmt: skip
    n = len(x) * len(y) / (len(x) + len(y))
    t = d * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * t * t) for j in range(1, 40)))


def test_distribution_equals_the_reference(device, dtype="float16"):
    """Standardized actions and final states, on in-kernel noise, against torch's generator.

    One column at a time: the numbers of one trajectory are dependent.
    """
    c = build(device, pg.SamplerConfig.paper(prediction_type="sample"))
    s0 = torch.zeros(250, S, device=device)

    def standardized(engine, seed):
        x, u, _ = sample(engine, s0, generator=torch.Generator(device).manual_seed(seed))
        with torch.no_grad():
            mean, std = c.policy(c.normalizer.unnormalize(x[..., :S], "observations"))
        return x, (c.normalizer.unnormalize(u, "actions") - mean) / std

    x, z = standardized(TritonEngine(c, dtype), 1)
    wanted_x, wanted_z = standardized(ReferenceEngine(c), 2)
    for t in (1, H - 1):
        for i in range(A):
            assert two_sample_ks(z[:, t, i], wanted_z[:, t, i]) > 1e-3
        for i in range(S + 2):
            assert two_sample_ks(x[:, t, i], wanted_x[:, t, i]) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("num_inference_steps", [None, 3])
def test_exact_actions_on_noise_of_the_kernels(device, dtype, num_inference_steps):
    """z = (a - mean) / std at the states returned is xi: the same for any weights, standard normal;
    in float16 off by the policy's rounding alone."""
    config = pg.SamplerConfig.official(
        action_update="exact", num_inference_steps=num_inference_steps
    )
    s0, z = torch.randn(200, S, device=device), []
    for seed in (0, 1):
        c = build(device, config, seed=seed)
        parts = c.denoiser, c.policy, pg.NoiseSchedule.cosine(K), c.normalizer, config
        sampler = pg.PolicyGuidedSampler(*parts, engine="triton", dtype=dtype)
        batch = sampler.sample(s0, generator=torch.Generator(device).manual_seed(5))
        with torch.no_grad():
            mean, std = c.policy(batch.observations)
        z.append((batch.actions - mean) / std)
        assert batch.mean_change.shape == () and 0 < batch.mean_change < 10
        again = sampler.sample(
            s0, generator=torch.Generator(device).manual_seed(5), return_chain=True
        )
        before, after = c.normalizer.unnormalize(again.chain_actions[-2:], "actions")
        wanted = ((after - before) / std).square().mean().sqrt()
        torch.testing.assert_close(batch.mean_change, wanted, rtol=1e-3, atol=1e-4)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    assert (z[0] - z[1]).abs().max() < tolerance
    normal = torch.distributions.Normal(0.0, 1.0)
    wanted = normal.sample((200_000,))
    for t in (0, H - 1):
        for i in range(A):
            assert two_sample_ks(z[0][:, t, i].cpu(), wanted) > 1e-3


def test_public_sampler(device):
    c = build(device)
    s0, noise = torch.randn(5, S, device=device), draw_noise(device, 5)
    got, wanted = (
        pg.PolicyGuidedSampler(
            c.denoiser, c.policy, c.schedule, c.normalizer, engine=engine, dtype="float32"
        ).sample(s0, 0.05, noise=noise)
        for engine in ("triton", "reference")
    )
    for name in ("observations", "actions", "rewards", "terminals"):
        assert relative_error(getattr(got, name), getattr(wanted, name)) < 1e-4, name


def test_refusals(device):
    c = build(device)

    def refuses(components, match, dtype="float32"):
        with pytest.raises(InputError, match=match):
            TritonEngine(components, dtype)

    def changed(**fields):
        return dataclasses.replace(c, **fields)

    refuses(changed(config=pg.SamplerConfig.official(update_states=True)), "'torch' and 'ref")
    refuses(changed(denoiser=pg.TransformerDenoiser(S, A, H, 16, 1, 2)), "TransformerDenoiser")
    refuses(changed(policy=torch.nn.Linear(S, A)), "a policy that is a Linear")
    for base, name in ((pg.ResidualMLPDenoiser, "denoiser"), (pg.GaussianPolicy, "policy")):
        derived = copy.deepcopy(getattr(c, name))
        derived.__class__ = type("Derived", (base,), {})
        refuses(changed(**{name: derived}), f"a {name} that is a Derived")
        hooked = copy.deepcopy(getattr(c, name))
        hooked.register_forward_hook(lambda module, inputs, output: output)
        refuses(changed(**{name: hooked}), f"a {name} that has a forward hook")
    wide = changed(
        denoiser=pg.ResidualMLPDenoiser(63, A, H, 32, 1, num_train_timesteps=K),
        policy=pg.GaussianPolicy(63, A, 16, 1),
    )
    refuses(wide, "num_layers 1 with observation_dim 63.*at most 62.*'torch' and 'reference'")
    refuses(changed(policy=pg.GaussianPolicy(S, A, 257)), "hidden_dim 257")
    refuses(changed(policy=pg.GaussianPolicy(S, A, 16, 3)), "num_layers 3")
    refuses(c, "dtype", "float64")
    if not torch.cuda.is_available():
        refuses(c, "bfloat16", "bfloat16")


def test_modules_changed_after_construction(device):
    """Are refused while they are foreign, and read where they can be folded."""
    c = build(device)
    s0, noise = torch.randn(5, S, device=device), draw_noise(device, 5)

    def make(engine):
        modules = c.denoiser, c.policy, c.schedule, c.normalizer
        return pg.PolicyGuidedSampler(*modules, engine=engine, dtype="float32")

    fused = make("triton")

    def assert_agrees():
        got, wanted = (s.sample(s0, 0.05, noise=noise) for s in (fused, make("reference")))
        assert relative_error(got.actions, wanted.actions) < 1e-4
        return got.actions

    before = assert_agrees()
    engine = fused._engine
    for part in (c.denoiser.blocks[1], c.policy.network[1]):
        hook = part.register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(
            InputError, match="that has a forward hook in .*'torch' and 'reference'"
        ):
            fused.sample(s0, 0.05, noise=noise)
        hook.remove()
        assert torch.equal(assert_agrees(), before) and fused._engine is engine
    c.policy.network[3] = torch.nn.Linear(24, 24).to(device)
    replaced = assert_agrees()
    assert relative_error(replaced, before) > 1e-3
    c.policy.min_std = 1.0  # a number in a captured graph
    assert relative_error(assert_agrees(), replaced) > 1e-3


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(precision, "is_interpreted", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA GPU .*got device 'cpu'"):
        TritonEngine(build("cpu"))


def test_refuses_the_interpreter_on_a_gpu(monkeypatch):
    monkeypatch.setattr(precision, "is_interpreted", lambda: True)
    components = build("cpu")
    object.__setattr__(components, "device", torch.device("cuda"))
    with pytest.raises(
        InputError, match="TRITON_INTERPRET=1, which wants device 'cpu', got 'cuda'"
    ):
        TritonEngine(components)


def fail_to_launch(*args, **kwargs):
    raise RuntimeError("no C compiler")


def test_failing_first_launch(device, monkeypatch):
    engine = TritonEngine(build(device), "float32")
    state = torch.get_rng_state()
    monkeypatch.setattr(guided_step, "MANY_ROWS", 1)  # the interpreter is slow
    engine._check_launch()
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(guided_step, "guided_step", fail_to_launch)
    with pytest.raises(InputError, match="triton cannot run here: no C compiler"):
        engine._check_launch()


@pytest.mark.gpu
def test_auto_falls_back_where_triton_cannot_run(device, monkeypatch):
    monkeypatch.setattr(guided_step, "guided_step", fail_to_launch)
    c = build(device)
    with pytest.raises(InputError, match="triton cannot run here: no C compiler"):
        TritonEngine(c)
    with pytest.warns(UserWarning, match="no C compiler"):
        sampler = pg.PolicyGuidedSampler(c.denoiser, c.policy, c.schedule, c.normalizer)
    assert sampler.engine == "torch"


# On a GPU: the captured graph against eager launches.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 257, 4096])
def test_graph_equals_eager(device, dtype, batch):
    c = build(device, hidden=256)
    captured, eager = TritonEngine(c, dtype), TritonEngine(c, dtype)
    eager._graphs = None
    s0 = torch.randn(batch, S, device=device)
    for seed in range(2):
        results = [
            sample(engine, s0, generator=torch.Generator(device).manual_seed(seed))
            for engine in (captured, eager)
        ]
        for got, wanted in zip(results[0][:2], results[1][:2], strict=True):
            assert torch.equal(got, wanted)
        with torch.no_grad():
            for parameter in (*c.denoiser.parameters(), *c.policy.parameters()):
                parameter.mul_(1.01)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 257, 4096])
def test_dependent_launches_compute_the_same(device, batch):
    """Kernels that are launched before those before them have ended wait for them."""
    c = build(device, hidden=256)
    engines = TritonEngine(c, "float16"), TritonEngine(c, "float16", dependent_launch=True)
    s0 = torch.randn(batch, S, device=device)
    for seed in range(5):
        results = [
            sample(engine, s0, generator=torch.Generator(device).manual_seed(seed))
            for engine in engines
        ]
        for got, wanted in zip(results[0][:2], results[1][:2], strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_replays_do_not_synchronize(device):
    engine = TritonEngine(build(device))
    s0, delta = torch.randn(64, S, device=device), torch.tensor(0.05, device=device)
    generator = torch.Generator(device).manual_seed(0)
    first = sample(engine, s0, delta, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = sample(engine, s0, delta, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_several_shapes_and_samplers(device):
    engines = [TritonEngine(build(device, seed=seed), "float32") for seed in range(3)]
    for batch in (1, 7, 64, 7, 1):
        for engine in engines:
            s0, noise = torch.randn(batch, S, device=device), draw_noise(device, batch)
            got = sample(engine, s0, noise=noise)
            wanted = sample(ReferenceEngine(engine.components), s0, noise=noise)
            assert relative_error(got[0], wanted[0]) < 1e-4
