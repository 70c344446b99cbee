"""The guided step's kernel against its twin in float64."""

import copy
import math

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import polygrad_fast as pg  # noqa: E402
from cases import refresh_weights  # noqa: E402
from polygrad_fast.kernels import guided_step as kernel  # noqa: E402
from polygrad_fast.kernels.denoiser_input import ActionSpace  # noqa: E402
from polygrad_fast.kernels.initial_state import initial_state  # noqa: E402
from polygrad_fast.kernels.random_normals import four_normals  # noqa: E402
from polygrad_fast.kernels.step_table import schedule_table, step_options  # noqa: E402
from polygrad_fast.reference import guided_step as twin  # noqa: E402
from polygrad_fast.sampling.triton_operands import PolicyWeights  # noqa: E402

NUM_STEPS = 16
LAST, LIMITED, MIDDLE, FIRST = 0, 5, 12, NUM_STEPS - 1
PRECISION = [
    "float32",
    "float16",
    pytest.param("tf32", marks=pytest.mark.gpu),
    pytest.param("bfloat16", marks=pytest.mark.gpu),
]
official, paper = pg.SamplerConfig.official, pg.SamplerConfig.paper
CONFIGS = {
    "official": official(),
    "paper": paper(),
    "epsilon": official(prediction_type="epsilon"),
    "policy sampling": official(action_update="sample"),
    "policy sampling, paper": paper(action_update="sample"),
    "exact": official(action_update="exact"),
    "exact, paper": paper(action_update="exact", denoiser_actions="clipped"),
    "exact, posterior mean": paper(action_update="exact", policy_input="posterior_mean"),
    "random actions": official(action_update="none"),
    "random actions, paper": paper(action_update="none"),
    "no clip": official(clip_std=None),
    "clip after": official(clip_order="after", clip_std=1.0),
    "clip before": official(clip_std=1.0),
    "no final clip": official(clip_final_actions=False),
    "posterior mean": official(policy_input="posterior_mean"),
    "noisy states": paper(policy_input="noisy"),
    "no state limit": official(clip_state_change=None),
    "clipped actions": official(denoiser_actions="clipped"),
    "clipped, unscaled actions": official(denoiser_actions="clipped", scale_actions=False),
    "bounded guidance": official(max_guidance=0.1),
}


@pytest.mark.parametrize("k", [LAST, MIDDLE])
@pytest.mark.parametrize(
    "option", ["action_update", "prediction_type", "clip_order", "policy_input", "variance_type"]
)
def test_an_unknown_name_raises(device, option, k):
    case = Case(device, official())
    options = step_options(case.config)
    object.__setattr__(options, option, "typo")
    with pytest.raises(pg.InputError, match=f"{option} must be one of .*, got 'typo'"):
        case.run_kernel(k, options=options)
    config = official()
    object.__setattr__(config, option, "typo")
    with pytest.raises(pg.InputError, match=f"{option} must be one of .*, got 'typo'"):
        step_options(config)


class Case:
    """Modules and tensors of one step, and the kernel's and the twin's results on them."""

    def __init__(
        self, device, config, precision="float32", batch=7, horizon=3, observation_dim=5,
        action_dim=2, hidden=24, num_layers=2, normed_inputs=False, seed=0,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.device, self.config, self.precision = device, config, precision
        S, A, D = observation_dim, action_dim, observation_dim + 2
        self.normalizer = pg.Normalizer.from_moments(
            observations=(torch.randn(S) * 3, torch.rand(S) + 0.5),
            actions=(torch.randn(A) * 0.2, torch.rand(A) + 0.3),
        ).to(device)
        self.policy = pg.GaussianPolicy(
            S, A, hidden, num_layers, 0.5, 0.1, normed_inputs, self.normalizer
        ).to(device)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.schedule = pg.NoiseSchedule.cosine(NUM_STEPS).to(device)
        self.bounds = (-torch.ones(A, device=device), 0.5 * torch.ones(A, device=device))

        def normal(*shape):
            return torch.randn(shape).to(device)

        shape = (batch, horizon)
        self.prediction, self.trajectory = normal(*shape, D), normal(*shape, D)
        self.actions, self.s0 = 2 * normal(*shape, A), normal(batch, S)
        self.noise = normal(*shape, D), normal(*shape, A)
        self.guidance = 0.05

    def run_kernel(self, k, seed=None, in_place=False, blocks=None, options=None):
        """Return trajectory, actions and denoiser input; without `seed` on the given noise."""
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(
            self.precision, torch.float32
        )
        weights = PolicyWeights(self.policy, self.normalizer, self.precision, self.device)
        refresh_weights(weights)
        table = schedule_table(self.schedule, step_options(self.config), self.config)
        batch, horizon, D = self.trajectory.shape
        width = horizon * (D + self.actions.shape[-1])
        trajectory, actions = self.trajectory.clone(), self.actions.clone()
        out = trajectory, actions
        if not in_place:
            out = tuple(torch.full_like(t, torch.nan) for t in out)
        denoiser_input = torch.full((batch, width + 5), torch.nan, dtype=dtype, device=self.device)
        kernel.guided_step(
            self.prediction,
            trajectory,
            actions,
            self.s0,
            k,
            weights.operands,
            table,
            ActionSpace(self.normalizer.actions_mean, self.normalizer.actions_scale, *self.bounds),
            options or step_options(self.config),
            torch.tensor([self.guidance], device=self.device),
            torch.tensor(seed or (0, 0), device=self.device),
            self.noise if seed is None else None,
            *out,
            denoiser_input,
            blocks=blocks,
        )
        assert denoiser_input[:, width:].isnan().all(), "written beyond the row"
        return *out, denoiser_input[:, :width]

    def run_twin(self, k, dtype=torch.float64):
        """Return trajectory, actions and denoiser input (None in the last step) in that dtype."""
        policy, normalizer = (copy.deepcopy(m).to(dtype) for m in (self.policy, self.normalizer))
        object.__setattr__(policy, "normalizer", normalizer)
        schedule = self.schedule.to(dtype)
        noise = tuple(n.to(dtype) for n in self.noise)
        trajectory, actions = twin.guided_step(
            self.prediction.to(dtype), self.trajectory.to(dtype), self.actions.to(dtype),
            self.s0.to(dtype), k, policy, normalizer, schedule, self.config, self.guidance, *noise,
        )  # fmt: skip
        if k == 0:
            return trajectory, actions, None
        bounds = tuple(b.to(dtype) for b in self.bounds)
        seen = twin.denoiser_actions(actions, k - 1, schedule, normalizer, self.config, bounds)
        return trajectory, actions, torch.cat([trajectory, seen], dim=-1).flatten(1)

    @torch.no_grad()
    def check(self, k, **options):
        """Assert that the kernel's errors are at most twice those of plain PyTorch."""
        got, exact = self.run_kernel(k, **options), self.run_twin(k)
        half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(self.precision)
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        try:
            with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
                plain = self.run_twin(k, torch.float32)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        for name, g, e, p in zip(
            ("trajectory", "actions", "denoiser input"), got, exact, plain, strict=True
        ):
            if e is None:
                continue
            scale = max(1.0, e.abs().max().item())
            error = (g.double() - e).abs().max().item()
            p = p.to(g.dtype)  # the denoiser input is rounded once by both
            allowed = 2 * (p.double() - e).abs().max().item() + 2e-6 * scale
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        assert torch.equal(got[0][:, 0, : self.s0.shape[1]], self.s0)


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("k", [LAST, LIMITED, MIDDLE])
def test_every_option(device, name, precision, k):
    Case(device, CONFIGS[name], precision).check(k)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("batch, horizon", [(1, 1), (7, 10), (33, 1), (257, 1)])
def test_odd_sizes(device, precision, batch, horizon):
    case = Case(device, official(), precision, batch=batch, horizon=horizon)
    case.check(MIDDLE)
    case.check(LAST)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "hidden, num_layers, observation_dim, action_dim",
    [(16, 1, 3, 1), (200, 1, 17, 6), (64, 2, 1, 1), (200, 2, 17, 6), (256, 2, 30, 17)],
)
def test_policy_shapes(device, precision, hidden, num_layers, observation_dim, action_dim):
    case = Case(
        device, official(), precision, batch=2, horizon=9, hidden=hidden, num_layers=num_layers,
        observation_dim=observation_dim, action_dim=action_dim,
    )  # fmt: skip
    case.check(MIDDLE)


@pytest.mark.parametrize("observation_dim", [61, 105, 200, 348])
def test_wide_states(device, observation_dim):
    case = Case(device, official(), batch=2, horizon=9, observation_dim=observation_dim, hidden=40)
    case.check(LIMITED)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_normed_inputs(device, precision):
    Case(device, official(), precision, normed_inputs=True).check(MIDDLE)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("rows", ["few", "many"])
def test_every_shipped_tile(device, precision, rows):
    for state_dim, pair in kernel.STEP_BLOCKS[precision].items():
        if state_dim <= 64:
            case = Case(
                device, official(), precision, batch=9, horizon=8, observation_dim=state_dim - 3
            )
            case.check(MIDDLE, blocks=pair[rows == "many"])


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    options=st.fixed_dictionaries(
        dict(
            prediction_type=st.sampled_from(["sample", "epsilon"]),
            action_update=st.sampled_from(["score", "sample", "exact", "none"]),
            clip_std=st.sampled_from([None, 0.5, 3.0]),
            clip_order=st.sampled_from(["before", "after"]),
            clip_final_actions=st.booleans(),
            policy_input=st.sampled_from(["denoised", "posterior_mean", "noisy"]),
            clip_state_change=st.sampled_from([None, 0.25]),
            variance_type=st.sampled_from(["posterior", "beta"]),
            scale_actions=st.booleans(),
            denoiser_actions=st.sampled_from(["raw", "clipped"]),
            max_guidance=st.sampled_from([None, 0.1]),
        )
    ),
    sizes=st.fixed_dictionaries(
        dict(
            batch=st.integers(1, 9),
            horizon=st.integers(1, 6),
            observation_dim=st.integers(1, 20),
            action_dim=st.integers(1, 18),
            hidden=st.integers(2, 80),
            num_layers=st.integers(1, 2),
        )
    ),
    k=st.integers(0, NUM_STEPS - 1),
)
def test_any_options_and_sizes(device, options, sizes, k):
    Case(device, official(**options), **sizes).check(k)


def test_in_place(device):
    case = Case(device, official())
    separate, in_place = case.run_kernel(MIDDLE), case.run_kernel(MIDDLE, in_place=True)
    assert all(map(torch.equal, separate, in_place))


def test_observations_far_from_zero(device):
    """Raw observations whose mean dwarfs their spread lose nothing: the moments are folded into the
    policy's first layer."""
    case = Case(device, official(), "float16")
    case.normalizer.observations_mean += 1000.0
    case.check(MIDDLE)


def test_large_estimates_do_not_overflow(device):
    """The first steps' estimates may be huge; float16 operands saturate, nothing becomes NaN."""
    case = Case(device, official(prediction_type="epsilon"), "float16")
    case.prediction *= 1e6
    trajectory, actions, denoiser_input = case.run_kernel(FIRST)
    for tensor in (trajectory, actions, denoiser_input):
        assert torch.isfinite(tensor).all()


def test_nan_stays_in_its_row(device):
    case = Case(device, official())
    case.prediction[2, 1, 0] = torch.nan
    trajectory, actions, _ = case.run_kernel(MIDDLE)
    assert trajectory[2, 1, 0].isnan() and actions[2, 1].isnan().all()
    trajectory[2, 1], actions[2, 1] = 0, 0
    assert torch.isfinite(trajectory).all() and torch.isfinite(actions).all()


# In-kernel noise


LARGE_TILE = kernel.StepBlocks(128, 32, 8, 2)  # few programs: the interpreter runs them in turn


def drawn(device, batch=64, horizon=10, k=MIDDLE, seed=(3, 5), blocks=LARGE_TILE, **sizes):
    """Return the normals behind one step: states [B, H, D] and actions [B, H, A]."""
    config = paper(action_update="sample", policy_input="noisy", clip_std=None)
    case = Case(device, config, batch=batch, horizon=horizon, **sizes)
    zero = tuple(torch.zeros_like(n) for n in case.noise)
    case.noise = zero
    still = case.run_kernel(k, blocks=blocks)
    moved = case.run_kernel(k, seed=seed, blocks=blocks)
    std = case.schedule.betas[k].sqrt()
    states = (moved[0] - still[0]) / std
    raw = (moved[1] - still[1]) * case.normalizer.actions_scale
    observation_dim = case.s0.shape[1]
    return states, raw / case.policy.std, states[:, :1, :observation_dim]


def initial_draws(device, case, seed, noise=None):
    """Return x_K, u_K and the first denoiser input."""
    options = step_options(case.config)
    trajectory = torch.full_like(case.trajectory, torch.nan)
    actions = torch.full_like(case.actions, torch.nan)
    width = trajectory[0].numel() + actions[0].numel()
    seen = torch.full((len(trajectory), width + 3), torch.nan, device=device)
    initial_state(
        case.s0,
        schedule_table(case.schedule, options, case.config),
        ActionSpace(case.normalizer.actions_mean, case.normalizer.actions_scale, *case.bounds),
        options,
        torch.tensor(seed, device=device),
        noise,
        trajectory,
        actions,
        seen,
    )
    assert seen[:, width:].isnan().all()
    return trajectory, actions, seen[:, :width]


def ks_p_value(samples):
    """Kolmogorov-Smirnov p-value against N(0, 1) (Kolmogorov's series)."""
    x = samples.double().flatten().sort().values
    n = len(x)
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    steps = torch.arange(n + 1, dtype=torch.float64, device=x.device) / n
    d = torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()).item()
    t = d * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * t * t) for j in range(1, 40)))


@torch.no_grad()
def test_noise_is_standard_normal(device):
    states, actions, _ = drawn(device, batch=256)
    for name, normals in (("states", states[:, 1:]), ("actions", actions)):
        n = normals.numel()
        assert abs(normals.mean().item()) < 4 / math.sqrt(n), name
        assert abs(normals.var().item() - 1) < 4 * math.sqrt(2 / n), name
        assert abs(normals.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / n), name
        assert ks_p_value(normals) > 1e-3, name
        columns = normals.flatten(0, 1).T.double()
        correlation = torch.corrcoef(columns) - torch.eye(len(columns), device=device)
        assert correlation.abs().max() < 5 / math.sqrt(columns.shape[1]), name


@torch.no_grad()
def test_noise_is_independent(device):
    """Across trajectories, trajectory steps, diffusion steps, seeds, calls, states and actions."""
    base, base_actions, first = drawn(device)
    assert first.abs().max() == 0, "the first observation is s0, without noise"
    base = base[:, 1:]
    others = {
        "trajectories": base.roll(1, 0),
        "trajectory steps": base.roll(1, 1),
        "elements": base.roll(1, 2),
        "diffusion steps": drawn(device, k=MIDDLE - 1)[0][:, 1:],
        "seeds": drawn(device, seed=(4, 5))[0][:, 1:],
        "high halves of the seed": drawn(device, seed=(3 + 2**40, 5))[0][:, 1:],
        "calls": drawn(device, seed=(3, 6))[0][:, 1:],
    }
    limit = 4.5 / math.sqrt(base.numel())
    for name, other in others.items():
        assert abs((base * other).mean().item()) < limit, name
        assert not torch.equal(base, other), name
    pairs = base[..., :2] * base_actions[:, 1:]
    assert abs(pairs.mean().item()) < 4.5 / math.sqrt(pairs.numel())


@pytest.mark.parametrize("observation_dim, action_dim", [(5, 2), (2, 5)])
@torch.no_grad()
def test_no_two_numbers_of_a_trajectory_correlate(device, observation_dim, action_dim):
    """All columns of a trajectory's x_K, u_K and its draws of the first two diffusion steps, both
    of states and actions, against one another."""
    seed, sizes = (3, 5), dict(observation_dim=observation_dim, action_dim=action_dim)
    case = Case(device, official(), batch=512, horizon=3, **sizes)
    draws = [initial_draws(device, case, seed)[:2]]
    for k in (FIRST, FIRST - 1):
        draws.append(drawn(device, 512, 3, k, seed, **sizes)[:2])
    columns = []
    for states, actions in draws:
        columns += [states.flatten(1)[:, observation_dim:], actions.flatten(1)]  # s0 is no draw
    columns = torch.cat(columns, dim=1).T.double()
    correlation = torch.corrcoef(columns) - torch.eye(len(columns), device=device)
    assert correlation.abs().max() < 5.5 / math.sqrt(columns.shape[1])


@triton.jit
def _normals_at_kernel(
    seed_ptr, call, trajectory, step, first_index, out_ptr, size, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    normals = four_normals(tl.load(seed_ptr), call, trajectory, step, first_index + at)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * size + at, normals[i])


def normals_at(device, size, seed, call, trajectory, step, first_index):
    """Return the kernel's normals at `size` consecutive counters, [4, size]."""
    out, block = (
        torch.empty(4, size, device=device),
        min(size, 4096 if device.type == "cuda" else size),
    )
    _normals_at_kernel[(size // block,)](
        torch.tensor([seed], device=device), call, trajectory, step, first_index, out, size, block
    )
    return out.cpu()


def philox(seed, counter):
    """Philox 4x32-10 of Salmon et al. (2011): [4, n] words from counters of four words."""
    counter = [np.broadcast_to(np.asarray(c, dtype=np.uint64), counter[0].shape) for c in counter]
    word = 0xFFFFFFFF
    key = [seed & word, seed >> 32]
    for _ in range(10):
        high, low = zip(
            *((p >> np.uint64(32), p & np.uint64(word)) for p in (
                np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
            )),
            strict=True,
        )  # fmt: skip
        counter = [
            high[1] ^ counter[1] ^ np.uint64(key[0]), low[1],
            high[0] ^ counter[3] ^ np.uint64(key[1]), low[0],
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return np.stack(counter)


def test_philox_known_answer():
    """Random123's kat_vectors."""
    words = philox(
        0x299F31D0A4093822,
        [np.array([w]) for w in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)],
    )
    assert [hex(w) for w in words[:, 0]] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


def test_normals_equal_box_muller(device):
    """Against NumPy's Philox 4x32-10 and an exact Box-Muller transform of the same uniforms."""
    size, seed, call, trajectory, step, first = 2**16, 2**61 + 12345678901, 2**30 + 7, 901, 77, 4321
    got = normals_at(device, size, seed, call, trajectory, step, first).double().numpy()
    words = philox(seed, [first + np.arange(size), trajectory, step, call]).astype(np.uint32)
    signed = words.view(np.int32)
    folded = np.where(signed < 0, -signed - 1, signed)  # triton's uint_to_uniform_float
    uniform = (folded.astype(np.float32) * np.float32(4.6566127342e-10)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(np.maximum(uniform[::2], 1e-7)))
    angle = 2 * np.pi * uniform[1::2]
    wanted = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(4, size)
    assert np.abs(got - wanted).max() < 2e-6


def test_tails_of_the_noise(device):
    """The numbers beyond 4 and 4.5 sigma among eight million."""
    normals = torch.cat([normals_at(device, 2**20, seed, 0, 0, 0, 0) for seed in (1, 2)])
    for bound in (4.0, 4.5):
        expected = normals.numel() * math.erfc(bound / math.sqrt(2))
        assert abs((normals.abs() > bound).sum() - expected) < 4 * math.sqrt(expected), bound


@torch.no_grad()
def test_noise_does_not_depend_on_the_tiling(device):
    """A trajectory's noise is the same in any batch and at any tile size."""
    case = Case(device, official(), batch=33, horizon=4)
    small = Case(device, official(), batch=7, horizon=4)
    for name in ("prediction", "trajectory", "actions", "s0"):
        setattr(small, name, getattr(case, name)[:7])
    wanted = case.run_kernel(MIDDLE, seed=(1, 2))
    for blocks in (None, *kernel.STEP_BLOCKS["float32"][32], kernel.StepBlocks(64, 16, 4, 2)):
        got = case.run_kernel(MIDDLE, seed=(1, 2), blocks=blocks)
        assert torch.allclose(got[0], wanted[0], atol=1e-6)
        assert torch.allclose(got[1], wanted[1], atol=1e-5)
    got = small.run_kernel(MIDDLE, seed=(1, 2))
    assert torch.allclose(got[0], wanted[0][:7], atol=1e-6)
    assert torch.allclose(got[1], wanted[1][:7], atol=1e-5)


@pytest.mark.parametrize("k", [FIRST, MIDDLE, LAST])
@torch.no_grad()
def test_exact_draws_the_initial_actions_again(device, k):
    """Step after step the actions are mean + std xi, xi the normals behind u_K; in the last the
    mean is that at the states written."""
    case = Case(device, paper(action_update="exact", prediction_type="sample"), batch=65, horizon=4)
    seed = (2**40 + 7, 3)
    _, xi, _ = initial_draws(device, case, seed)
    states, actions, _ = case.run_kernel(k, seed=seed)
    read = states if k == LAST else case.prediction.clone()
    read = read[..., :5].clone()
    read[:, 0] = case.s0
    mean, std = case.policy(case.normalizer.unnormalize(read, "observations"))
    wanted = case.normalizer.normalize(mean + std * xi, "actions")
    torch.testing.assert_close(actions, wanted, rtol=1e-5, atol=1e-5)
    others = case.run_kernel(k, seed=(seed[0], 4))[1]
    assert not torch.isclose(others, actions).any(), "another call, other normals"
    without = case.run_kernel(k, seed=seed, blocks=kernel.StepBlocks(64, 16, 4, 2))[1]
    torch.testing.assert_close(without, actions, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_initial_state(device):
    case = Case(device, official(denoiser_actions="clipped"), batch=65, horizon=10)
    for noise in (case.noise, None):
        trajectory, actions, seen = initial_draws(device, case, (1, 2), noise)
        assert torch.equal(trajectory[:, 0, :5], case.s0)
        if noise is not None:
            assert torch.equal(trajectory[:, 1:], noise[0][:, 1:])
            assert torch.equal(actions, noise[1])
        else:
            assert ks_p_value(trajectory[:, 1:]) > 1e-3 and ks_p_value(actions) > 1e-3
        u = twin.denoiser_actions(
            actions, FIRST, case.schedule, case.normalizer, case.config, case.bounds
        )
        wanted = torch.cat([trajectory, u], dim=-1).flatten(1)
        assert torch.allclose(seen, wanted, atol=1e-6)
