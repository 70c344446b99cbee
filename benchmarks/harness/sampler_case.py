"""A sampler of the paper's sizes, its work, and how its engines are checked.

- Steps: a chain with given noise; its first, its middle and its last 11 steps, each from the
  engine's own states against the float64 reference. float32: at most 1e-4; others: states at most
  twice the error of the plain formula under autocast (tf32: with tf32 matrix products), actions at
  most twice its actions' error. Errors are |got - wanted| / max(1, |wanted|), normalized. Checked
  is the engine that is timed, unless the noise of all its steps is too large; then one with fewer.
- Its own noise, in what was timed: on a CPU, where the same seed gives the same noise in the
  reference's order, the last timed result is the end of that chain; on a GPU it is finite, and then
  mean and variance of every entry are held against the reference's over whole chains.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import polygrad_fast as pg
from harness.work import Work, parameter_bytes
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.denoisers.build import build_denoiser
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.engine import Engine
from polygrad_fast.sampling.graphs import GraphCache
from polygrad_fast.sampling.noise import SampleNoise
from polygrad_fast.sampling.reference_engine import ReferenceEngine, diffusion_step
from polygrad_fast.sampling.torch_engine import TorchEngine
from polygrad_fast.sampling.triton_engine import TritonEngine

OBSERVATION_DIM, ACTION_DIM = 17, 6  # Walker2d
GUIDANCE_SCALE = 0.005
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = ("float16", "bfloat16", "tf32", "float32")  # most important first
ENGINES = {"triton": DTYPES, "torch": DTYPES, "reference": ("float32",), "compile": DTYPES}
MAX_MOMENT_SCORE = 7.0  # standard errors, over up to 10,000 numbers per case
MOMENT_BIAS = 0.02  # of a standard deviation; 2 % of a variance: half precision may shift that
CHAIN_AGREEMENT = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Largest difference between the ends of one chain with given and with drawn noise, on a CPU."""
SEED = 1
TOLERANCE_FACTOR, FLOOR = 2.0, 1e-5
MAX_NOISE_BYTES = 4e9  # kept up to four times: as drawn, given to a graph, and the chain twice


@dataclass(frozen=True)
class Sizes:
    """Sizes of a sampler and of its checks."""

    num_steps: int = 128
    short_steps: int = 13  # of the chain that is checked where the noise is too large
    moment_rows: int = 4096
    hidden_dim: int | None = None  # the paper's
    policy_dim: int = 256


SMALL = Sizes(num_steps=13, short_steps=13, moment_rows=64, hidden_dim=32, policy_dim=16)


def build(
    sizes: Sizes, horizon: int, device: torch.device, denoiser: str = "residual_mlp"
) -> SamplerComponents:
    """Return a sampler's parts with random weights, the same at every call."""
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(OBSERVATION_DIM), torch.rand(OBSERVATION_DIM) + 0.5),
        actions=(0.1 * torch.randn(ACTION_DIM), torch.rand(ACTION_DIM) + 0.5),
    )
    config = DenoiserConfig(kind=denoiser, hidden_dim=sizes.hidden_dim)
    network = build_denoiser(config, OBSERVATION_DIM, ACTION_DIM, horizon, sizes.num_steps)
    return SamplerComponents(
        network.to(device),
        pg.GaussianPolicy(OBSERVATION_DIM, ACTION_DIM, sizes.policy_dim).to(device),
        pg.NoiseSchedule.cosine(sizes.num_steps).to(device),
        normalizer.to(device),
        pg.SamplerConfig.official(),
        device,
        None,
    )


def denoiser_flops(denoiser) -> int:
    """Return the FLOPs of one trajectory in one call, the two input Linears of the residual MLP
    folded into one.

    Residual MLP of L layers of width W: 2 (H (D + A) W + L W^2 + W H D), D = S + 2. Transformer of
    L blocks of width E: 2 H ((D + A) E + 12 L E^2 + E D) for the Linears and 2 H (H + 1) L E for
    causal attention. Rollout: H times the Linears of its one-step network.
    """
    if isinstance(denoiser, pg.RolloutDenoiser):
        return denoiser.horizon * linear_flops(denoiser.step)
    d, width = denoiser, denoiser.hidden_dim
    ends = d.horizon * (2 * d.state_dim + d.action_dim) * width
    if isinstance(d, pg.TransformerDenoiser):
        attention = d.horizon * (d.horizon + 1) * d.num_layers * width
        return 2 * (ends + 12 * d.horizon * d.num_layers * width**2 + attention)
    return 2 * (ends + d.num_layers * width**2)


def policy_flops(policy) -> int:
    """Return the FLOPs of one observation in the policy's Linears."""
    return linear_flops(policy)


def linear_flops(module) -> int:
    """Return the FLOPs of one row in the Linears of a module's `network`."""
    linears = (m for m in module.network if isinstance(m, torch.nn.Linear))
    return 2 * sum(linear.weight.numel() for linear in linears)


def sample_work(c: SamplerComponents, batch: int, dtype: str) -> Work:
    """Return the work of one sample: the FLOPs of K steps, or of one where each step of a rollout
    is needed once; weights, s0 and the result once."""
    once = isinstance(c.denoiser, pg.RolloutDenoiser) and c.config.action_update == "exact"
    steps = 1 if once else c.schedule.num_train_timesteps
    flops = denoiser_flops(c.denoiser) + c.horizon * policy_flops(c.policy)
    weights = parameter_bytes(c.denoiser) * (0.5 if dtype in HALF else 1.0)
    numbers = c.observation_dim + c.horizon * (c.observation_dim + 2 + c.action_dim)
    moved = weights + parameter_bytes(c.policy) + 4 * batch * numbers
    return Work(flops=steps * batch * flops, bytes=moved)


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Multiply float32 matrices on tensor cores ("tf32") or not (anything else)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class CompiledReference:
    """The control: `diffusion_step` compiled, all K steps in one CUDA graph.

    Half-precision weights are cast once, here. The policy stays in float32, on tensor cores in
    every dtype but float32.
    """

    def __init__(self, components: SamplerComponents, dtype: str):
        if components.device.type != "cuda":
            raise InputError(
                f"the compiled control needs a CUDA GPU, got device {str(components.device)!r}"
            )
        self.dtype = dtype
        if dtype in HALF:
            denoiser = copy.deepcopy(components.denoiser).to(HALF[dtype])
            components = dataclasses.replace(components, denoiser=denoiser)
        self.components = components
        torch._dynamo.reset()  # else the compilations of earlier cases count towards its limit
        self._step = torch.compile(diffusion_step, mode="max-autotune-no-cudagraphs")
        self._guidance_scale = torch.zeros((), device=components.device)
        self._graphs = GraphCache()

    def sample(self, initial_observations, guidance_scale, generator, noise, return_chain):
        """The arguments and the result of the other engines' `sample`; `generator` is torch's."""
        c = self.components
        num_steps = c.schedule.num_train_timesteps
        states = (len(initial_observations), c.horizon, c.observation_dim + 2)
        actions = (*states[:2], c.action_dim)

        def run(s0, *given):
            def normals(index, step, shape):
                if not given:
                    return torch.randn(shape, device=c.device)
                return given[index] if step is None else given[index][step]

            x, u = normals(0, None, states).clone(), normals(1, None, actions)
            x[:, 0, : c.observation_dim] = s0
            chain = []
            for step, k in enumerate(reversed(range(num_steps))):
                noises = normals(2, step, states), normals(3, step, actions)
                x, u = self._step(c, x, u, s0, k, self._guidance_scale, *noises)
                if return_chain:
                    chain.append((x, u))
            return x, u, *map(torch.stack, zip(*chain, strict=True))

        self._guidance_scale.fill_(guidance_scale)
        given = tuple(vars(noise).values()) if noise else ()
        with matmul_precision("float32" if self.dtype == "float32" else "tf32"):
            x, u, *chain = self._graphs(return_chain, run, (initial_observations, *given))
        return x, u, tuple(chain) or None


def make_engine(name: str, components: SamplerComponents, dtype: str) -> Engine:
    """Return the engine of that name."""
    if name == "reference":
        return ReferenceEngine(components)
    classes = {"torch": TorchEngine, "triton": TritonEngine, "compile": CompiledReference}
    return classes[name](components, dtype)


def noise_bytes(c: SamplerComponents, batch: int) -> int:
    """Return the bytes of all normals of one sample."""
    numbers = c.horizon * (c.observation_dim + 2 + c.action_dim)
    return 4 * batch * numbers * (c.schedule.num_train_timesteps + 1)


def draw_noise(c: SamplerComponents, batch: int) -> SampleNoise:
    """Return all normals of one sample, drawn from `SEED`."""
    states, actions = (batch, c.horizon, c.observation_dim + 2), (batch, c.horizon, c.action_dim)
    generator = torch.Generator(c.device).manual_seed(SEED)
    return SampleNoise.draw(states, actions, c.schedule.num_train_timesteps, c.device, generator)


def largest_error(got, wanted) -> float:
    """Return max |got - wanted| / max(1, |wanted|) over pairs of tensors; NaN where one is NaN."""
    return _errors(got, wanted).max().item()


def _errors(got, wanted) -> Tensor:
    """Return the error of each pair, [n]."""
    errors = [
        ((g.double() - w.double()).abs() / w.double().abs().clamp(min=1.0)).max()
        for g, w in zip(got, wanted, strict=True)
    ]
    return torch.stack(errors)  # torch's max keeps a NaN, Python's may lose it


def in_float64(c: SamplerComponents) -> SamplerComponents:
    """Return a copy of the parts in float64."""
    return dataclasses.replace(
        c,
        denoiser=copy.deepcopy(c.denoiser).double(),
        policy=copy.deepcopy(c.policy).double(),
        normalizer=copy.deepcopy(c.normalizer).double(),
        schedule=c.schedule.to(dtype=torch.float64),
    )


def shortened(c: SamplerComponents, num_steps: int) -> SamplerComponents:
    """Return the parts with a schedule of fewer steps."""
    return dataclasses.replace(c, schedule=pg.NoiseSchedule.cosine(num_steps).to(c.device))


def compared_steps(num_steps: int) -> list[int]:
    """Return the first, the middle and the last 11 steps, in which the state change is clipped."""
    return sorted({0, num_steps // 2, *range(max(0, num_steps - 11), num_steps)})


@torch.no_grad()
def step_errors(engine, c: SamplerComponents, dtype: str, s0: Tensor) -> tuple[float, float]:
    """Return the largest error of the engine's `compared_steps` and the allowed one, of states;
    errors of actions are scaled by the ratio of the two tolerances.

    Each step starts at the engine's own states after the step before; wanted is the reference in
    float64.

    Args:
        engine: whose components are `c`. dtype: its arithmetic.
        s0: initial observations, normalized [B, S].
    """
    error, allowed, _ = _step_errors(engine, c, dtype, s0)
    return error, allowed


def _step_errors(engine, c, dtype, s0) -> tuple[float, float, tuple[Tensor, Tensor]]:
    """Return what `step_errors` does, and the chain's end."""
    exact = in_float64(c)
    noise = draw_noise(c, len(s0))
    end, chain = _split(engine.sample(s0, GUIDANCE_SCALE, None, noise, True))
    keeps = c.config.action_update == "exact"  # one normal per action for all steps
    if keeps:  # and without its chain a sample may take another way
        end, _ = _split(engine.sample(s0, GUIDANCE_SCALE, None, noise, False))
    num_steps = c.schedule.num_train_timesteps
    errors, plain_errors = [], []  # per step, of states and actions
    for step in compared_steps(num_steps):
        if step == 0:
            previous = noise.initial_trajectories.clone(), noise.initial_actions
            previous[0][:, 0, : s0.shape[1]] = s0
        else:
            previous = chain[0][step - 1], chain[1][step - 1]
        k = num_steps - 1 - step
        actions_noise = noise.initial_actions if keeps else noise.actions[step]
        normals = noise.trajectories[step], actions_noise
        inputs = (*previous, s0, k, GUIDANCE_SCALE, *normals)
        wanted = diffusion_step(exact, *(x.double() if torch.is_tensor(x) else x for x in inputs))
        errors.append(_errors((chain[0][step], chain[1][step]), wanted))
        if dtype == "float32":
            continue
        half = HALF.get(dtype)
        autocast = torch.autocast(c.device.type, dtype=half, enabled=half is not None)
        with matmul_precision(dtype), autocast:
            plain_errors.append(_errors(diffusion_step(c, *inputs), wanted))
    errors.append(_errors(end, (chain[0][-1], chain[1][-1])))  # the result is the chain's end
    states_error, actions_error = torch.stack(errors).amax(0).tolist()
    allowed = actions_allowed = 1e-4
    if dtype != "float32":
        plain = torch.stack(plain_errors).amax(0)
        allowed = TOLERANCE_FACTOR * plain.max().item() + FLOOR
        actions_allowed = TOLERANCE_FACTOR * plain[1].item() + FLOOR
    shares = states_error / allowed, actions_error / actions_allowed
    worst = math.nan if any(map(math.isnan, shares)) else max(shares)
    return worst * allowed, allowed, end


def _split(sampled):
    states, actions, chain = sampled
    return (states, actions), chain


@dataclass(frozen=True)
class Moments:
    """Mean, variance and their squared standard errors of every entry of a final trajectory."""

    mean: Tensor
    mean_error: Tensor
    variance: Tensor
    variance_error: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, engine, s0: Tensor, rows: int) -> Moments:
        """Sample at least that many trajectories, from torch's generator."""
        samples = []
        for _ in range(math.ceil(rows / len(s0))):
            parts = engine.sample(s0, GUIDANCE_SCALE, None, None, False)[:2]
            samples.append(torch.cat([part.flatten(1) for part in parts], dim=1))
        x = torch.cat(samples)
        mean, count = x.mean(0), len(x)
        squares = (x - mean).square()
        return cls(mean, x.var(0) / count, squares.mean(0), squares.var(0) / count)

    def score(self, other: Moments) -> float:
        """Return the largest difference beyond `MOMENT_BIAS`, in standard errors."""
        scores = []
        for name, unit in (("mean", other.variance.sqrt()), ("variance", other.variance)):
            difference = (getattr(self, name) - getattr(other, name)).abs()
            squared_error = getattr(self, f"{name}_error") + getattr(other, f"{name}_error")
            excess = (difference - MOMENT_BIAS * unit).clamp(min=0)
            scores.append((excess / (squared_error.sqrt() + 1e-12)).max())
        return torch.stack(scores).max().item()


_moments: dict[tuple, Moments] = {}


class TimedSampler:
    """What is timed, a whole sample by one engine, and its checks.

    Args:
        name, c, dtype: see `make_engine`.
        s0: initial observations, normalized [B, S].
        sizes: those that `c` was built of.
    """

    def __init__(self, name: str, c: SamplerComponents, dtype: str, s0: Tensor, sizes: Sizes):
        self.engine = make_engine(name, c, dtype)
        self._name, self._c, self._dtype, self._s0, self._sizes = name, c, dtype, s0, sizes

    def __call__(self) -> None:
        on_cpu = self._c.device.type == "cpu"
        generator = torch.Generator().manual_seed(SEED) if on_cpu else None
        sampled = self.engine.sample(self._s0, GUIDANCE_SCALE, generator, None, False)
        self._result, _ = _split(sampled)

    def check(self, case) -> None:
        """Check single steps."""
        engine, c, s0 = self.engine, self._c, self._s0
        if c.device.type == "cuda" and noise_bytes(c, len(s0)) > MAX_NOISE_BYTES:
            c = shortened(c, self._sizes.short_steps)
            engine = make_engine(self._name, c, self._dtype)
        error, allowed, self._end = _step_errors(engine, c, self._dtype, s0)
        case.check("one step", error, allowed)

    @torch.no_grad()
    def check_result(self, case) -> None:
        """Check what the last call sampled."""
        c, sizes = self._c, self._sizes
        if c.device.type == "cpu":
            difference = largest_error(self._result, self._end)
            case.check("timed result", difference, CHAIN_AGREEMENT[self._dtype])
            return
        not_finite = sum((~torch.isfinite(part)).sum() for part in self._result)
        case.check("numbers not finite in the timed result", not_finite, 0)
        key = len(self._s0), c.horizon, type(c.denoiser), sizes
        if key not in _moments:
            torch.manual_seed(2)
            reference = make_engine("reference", c, "float32")
            _moments[key] = Moments.of(reference, self._s0, sizes.moment_rows)
        torch.manual_seed(3)
        score = Moments.of(self.engine, self._s0, sizes.moment_rows).score(_moments[key])
        case.check("moments", score, MAX_MOMENT_SCORE)
