"""Time every engine of the sampler at the paper's sizes; one row per case, checked first.

    python benchmarks/bench_engines.py OUT_DIR --time-budget 300
    python benchmarks/bench_engines.py OUT_DIR --smoke            # tiny sizes, on a CPU too

A case is an engine, a dtype, a batch size B and a horizon H; the network is the paper's residual
MLP on Walker2d (S = 17, A = 6), K = 128 steps. Most important cases first; OUT_DIR/engines.jsonl is
rewritten whole after each, so that a run cut short keeps what it measured. "compile" is a control:
the reference's denoiser and guided step under torch.compile(max-autotune), K steps in one CUDA
graph.

A row holds a time only if the case passed both checks:

- one step: a shorter chain with given noise; each step from the engine's own states against the
  float64 reference. float32: at most 1e-4; others: at most twice the error of the plain
  formula under autocast (tf32: with tf32 matrix products). Errors are |got - wanted| /
  max(1, |wanted|) on normalized states and actions.
- whole chain: mean and variance of every entry against the reference's, on each engine's own noise.

Times are CUDA events around whole calls, weights read anew and results copied out: medians. Floor:
FLOPs after folding the two input Linears,

    2 B K ((H (D + A) W + L W^2 + W H D) + H (S P + (N - 1) P^2 + P A)),    D = S + 2,

with L layers of width W in the denoiser and N of width P in the policy, at `PEAK_TFLOPS`. Peak
memory is what torch allocated (and reserved) while the engine was built, captured and run twice,
weights included.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import polygrad_fast as pg
from polygrad_fast.config import DenoiserConfig
from polygrad_fast.errors import InputError
from polygrad_fast.sampling.components import SampleNoise, SamplerComponents
from polygrad_fast.sampling.graphs import GraphCache
from polygrad_fast.sampling.reference_engine import ReferenceEngine, diffusion_step
from polygrad_fast.sampling.torch_engine import TorchEngine
from polygrad_fast.sampling.triton_engine import TritonEngine
from polygrad_fast.training.run_log import versions, write_bytes_atomic

OBSERVATION_DIM, ACTION_DIM = 17, 6  # Walker2d
GUIDANCE_SCALE = 0.005
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = ("float16", "bfloat16", "tf32", "float32")  # most important first
ENGINES = {"triton": DTYPES, "torch": DTYPES, "reference": ("float32",), "compile": DTYPES}
PEAK_TFLOPS = {"H200": {"float16": 790, "bfloat16": 790, "tf32": 384, "float32": 67}}
"""Dense rates that count as the ceiling. float16, bfloat16: what a product of random 8192 x 8192
matrices reaches; tf32: estimated from it; float32: the datasheet's, without tensor cores."""
MAX_MOMENT_SCORE = 7.0  # standard errors, over up to 10,000 numbers per case
MOMENT_BIAS = 0.02  # of a standard deviation; 2 % of a variance: half precision may shift that
MEASURE_SECONDS, MIN_CALLS, MAX_CALLS = 1.0, 3, 50


@dataclass(frozen=True)
class Sizes:
    """What the cases range over, most important first."""

    batches: tuple[int, ...] = (1024, 4096, 256, 16384)
    horizons: tuple[int, ...] = (10, 50, 200)
    num_steps: int = 128
    check_steps: int = 16  # more than the 11 in which the state change is clipped
    moment_rows: int = 4096
    hidden_dim: int | None = None  # the paper's: 1024 for H = 10, else 2048
    policy_dim: int = 256


SMOKE = Sizes(
    (5,), (3,), num_steps=13, check_steps=13, moment_rows=64, hidden_dim=32, policy_dim=16
)


@dataclass(frozen=True)
class Case:
    """One row."""

    engine: str
    dtype: str
    batch: int
    horizon: int

    def __str__(self) -> str:
        return f"{self.engine} {self.dtype} B={self.batch} H={self.horizon}"


def list_cases(sizes: Sizes, engines: list[str], dtypes: list[str]) -> list[Case]:
    """Return every case, most important first.

    Each place down the lists of batches and dtypes costs one, of horizons two. The control, which
    compiles for a minute or more, costs two in the first place and eight elsewhere.
    """
    grid = itertools.product(enumerate(sizes.horizons), enumerate(sizes.batches), engines)
    scored = []
    for (h, horizon), (b, batch), engine in grid:
        for dtype in (d for d in ENGINES[engine] if d in dtypes):
            rank = 0 if engine == "reference" else DTYPES.index(dtype)
            score = 2 * h + b + rank
            if engine == "compile":
                score += 8 if score else 2
            scored.append((score, Case(engine, dtype, batch, horizon)))
    return [case for _, case in sorted(scored, key=lambda pair: pair[0])]


def build(sizes: Sizes, horizon: int, device: torch.device) -> SamplerComponents:
    """Return a sampler's parts with random weights, the same at every call."""
    torch.manual_seed(0)
    normalizer = pg.Normalizer.from_moments(
        observations=(torch.randn(OBSERVATION_DIM), torch.rand(OBSERVATION_DIM) + 0.5),
        actions=(0.1 * torch.randn(ACTION_DIM), torch.rand(ACTION_DIM) + 0.5),
    )
    width = sizes.hidden_dim or DenoiserConfig().resolved(horizon).hidden_dim
    denoiser = pg.ResidualMLPDenoiser(OBSERVATION_DIM, ACTION_DIM, horizon, hidden_dim=width)
    return SamplerComponents(
        denoiser.to(device),
        pg.GaussianPolicy(OBSERVATION_DIM, ACTION_DIM, sizes.policy_dim).to(device),
        pg.NoiseSchedule.cosine(sizes.num_steps).to(device),
        normalizer.to(device),
        pg.SamplerConfig.official(),
        device,
        None,
    )


def flops(c: SamplerComponents, batch: int) -> int:
    """Return the FLOPs of one sample, input Linears folded (formula above)."""
    d, linears = c.denoiser, list(c.policy.network)[0::3]
    in_dim = c.horizon * (d.state_dim + c.action_dim)
    out_dim = c.horizon * d.state_dim
    denoiser = (in_dim + d.num_layers * d.hidden_dim + out_dim) * d.hidden_dim
    policy = c.horizon * sum(linear.weight.numel() for linear in linears)
    return 2 * batch * c.schedule.num_train_timesteps * (denoiser + policy)


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


def make_engine(case: Case, components: SamplerComponents):
    """Return the case's engine."""
    if case.engine == "reference":
        return ReferenceEngine(components)
    classes = {"torch": TorchEngine, "triton": TritonEngine, "compile": CompiledReference}
    return classes[case.engine](components, case.dtype)


def draw_noise(c: SamplerComponents, batch: int) -> SampleNoise:
    """Return all normals of one sample."""
    num_steps = c.schedule.num_train_timesteps
    states, actions = (batch, c.horizon, c.observation_dim + 2), (batch, c.horizon, c.action_dim)
    shapes = (states, actions, (num_steps, *states), (num_steps, *actions))
    return SampleNoise(*(torch.randn(shape, device=c.device) for shape in shapes))


def _largest_error(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """Return max |got - wanted| / max(1, |wanted|); NaN where one is NaN."""
    return max(
        ((g.double() - w.double()).abs() / w.double().abs().clamp(min=1.0)).max().item()
        for g, w in zip(got, wanted, strict=True)
    )


@torch.no_grad()
def step_errors(engine, c: SamplerComponents, dtype: str, s0: Tensor) -> tuple[float, float]:
    """Return the engine's largest one-step error and the allowed one.

    Each step starts at the engine's own states after the step before; wanted is the reference in
    float64.

    Args:
        engine: whose components are `c`. dtype: its arithmetic.
        s0: initial observations, normalized [B, S].
    """
    exact = dataclasses.replace(
        c,
        denoiser=copy.deepcopy(c.denoiser).double(),
        policy=copy.deepcopy(c.policy).double(),
        normalizer=copy.deepcopy(c.normalizer).double(),
        schedule=c.schedule.to(dtype=torch.float64),
    )
    noise = draw_noise(c, len(s0))
    states, actions, chain = engine.sample(s0, GUIDANCE_SCALE, None, noise, True)
    previous = noise.initial_trajectories.clone(), noise.initial_actions
    previous[0][:, 0, : s0.shape[1]] = s0
    errors, plain_errors = [], []
    for step, k in enumerate(reversed(range(c.schedule.num_train_timesteps))):
        normals = noise.trajectories[step], noise.actions[step]
        inputs = (*previous, s0, k, GUIDANCE_SCALE, *normals)
        wanted = diffusion_step(exact, *(x.double() if torch.is_tensor(x) else x for x in inputs))
        got = chain[0][step], chain[1][step]
        errors.append(_largest_error(got, wanted))
        if dtype != "float32":
            half = HALF.get(dtype)
            autocast = torch.autocast(c.device.type, dtype=half, enabled=half is not None)
            with matmul_precision(dtype), autocast:
                plain_errors.append(_largest_error(diffusion_step(c, *inputs), wanted))
        previous = got
    errors.append(_largest_error((states, actions), previous))  # the result is the chain's end
    allowed = 1e-4 if dtype == "float32" else 2 * max(plain_errors) + 1e-5
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return error, allowed


@dataclass(frozen=True)
class Moments:
    """Mean, variance and their squared standard errors of every entry of a final trajectory."""

    mean: Tensor
    mean_error: Tensor
    variance: Tensor
    variance_error: Tensor

    @classmethod
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


def time_calls(call: Callable[[], object], device: torch.device) -> list[float]:
    """Return milliseconds of each call; run it before to warm up."""
    times: list[float] = []
    wanted = MIN_CALLS
    while len(times) < wanted:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        wanted = min(max(MIN_CALLS, int(1e3 * MEASURE_SECONDS / times[0])), MAX_CALLS)
    return times


class Bench:
    """Measures cases on one device; parts and reference moments are made once per shape."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self.sizes, self.device = sizes, device
        self._components: tuple[int, SamplerComponents] | None = None
        self._moments: dict[tuple[int, int], Moments] = {}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_tflops = next((p for gpu, p in PEAK_TFLOPS.items() if gpu in name), {})

    def components(self, horizon: int) -> SamplerComponents:
        """Return the parts for that horizon."""
        if self._components is None or self._components[0] != horizon:
            self._components = horizon, build(self.sizes, horizon, self.device)
        return self._components[1]

    def row(self, case: Case) -> dict:
        """Check and time one case; a failure is a row too, without a time.

        `status`: "ok"; "wrong", a check failed; "not offered", by this engine; "out of memory";
        "error", with a traceback.
        """
        row = {**dataclasses.asdict(case), "num_steps": self.sizes.num_steps, "status": "ok"}
        start = time.monotonic()
        try:
            with matmul_precision("float32"):
                row.update(self._measure(case))
        except InputError as error:
            row.update(status="not offered", error=str(error))
        except torch.cuda.OutOfMemoryError as error:
            row.update(status="out of memory", error=str(error).splitlines()[0])
        except Exception:  # any failure of one case: the next ones are still worth measuring
            row.update(status="error", error=traceback.format_exc()[-4000:])
        for name in ("step_error", "moment_score"):
            if not math.isfinite(row.get(name, 0.0)):
                row[name] = None  # JSON has no NaN
        row["seconds_spent"] = round(time.monotonic() - start, 1)
        return row

    def check_step(self, case: Case, s0: Tensor) -> dict:
        """Compare single steps of the case's engine, on a shorter chain, with the reference."""
        schedule = pg.NoiseSchedule.cosine(self.sizes.check_steps).to(self.device)
        c = dataclasses.replace(self.components(case.horizon), schedule=schedule)
        error, allowed = step_errors(make_engine(case, c), c, case.dtype, s0)
        return {
            "status": "ok" if error <= allowed else "wrong",  # wrong where NaN
            "step_error": error,
            "step_error_allowed": allowed,
        }

    def check_moments(self, case: Case, engine, s0: Tensor) -> dict:
        """Compare the end of the whole chain of `engine`, the one to be timed, with the
        reference's."""
        key, rows = (case.batch, case.horizon), self.sizes.moment_rows
        if key not in self._moments:
            torch.manual_seed(2)
            reference = ReferenceEngine(self.components(case.horizon))
            self._moments[key] = Moments.of(reference, s0, rows)
        torch.manual_seed(3)
        score = Moments.of(engine, s0, rows).score(self._moments[key])
        return {
            "status": "ok" if score <= MAX_MOMENT_SCORE else "wrong",
            "moment_score": score,
            "moment_score_allowed": MAX_MOMENT_SCORE,
        }

    @torch.no_grad()
    def _measure(self, case: Case) -> dict:
        c = self.components(case.horizon)
        torch.manual_seed(1)
        s0 = torch.randn(case.batch, OBSERVATION_DIM, device=self.device)
        row = {"hidden_dim": c.denoiser.hidden_dim, **self.check_step(case, s0)}
        if row["status"] != "ok":
            return row
        self.free()
        engine = make_engine(case, c)

        def sample():
            engine.sample(s0, GUIDANCE_SCALE, None, None, False)

        sample()  # captures and warms up
        sample()
        memory = self._peak_memory()
        row |= self.check_moments(case, engine, s0)
        if row["status"] != "ok":
            return row
        return row | self._numbers(case, time_calls(sample, self.device)) | memory

    def _peak_memory(self) -> dict:
        if self.device.type != "cuda":
            return {}
        return {
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9,
            "peak_reserved_gb": torch.cuda.max_memory_reserved(self.device) / 1e9,
        }

    def _numbers(self, case: Case, times: list[float]) -> dict:
        ms = statistics.median(times)
        work = flops(self.components(case.horizon), case.batch)
        numbers = {
            "ms_median": ms,
            "ms_min": min(times),
            "ms_max": max(times),
            "calls": len(times),
            "us_per_trajectory": 1e3 * ms / case.batch,
            "tflop": work / 1e12,
            "tflops": work / ms / 1e9,
        }
        if case.dtype in self.peak_tflops:
            floor_ms = work / self.peak_tflops[case.dtype] / 1e9
            numbers |= {"floor_ms": floor_ms, "share_of_floor": floor_ms / ms}
        return numbers

    def free(self) -> None:
        """Give back what the last case held and start its memory statistics anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def is_lost(self) -> bool:
        """Whether an error has made the device unusable for the rest of this process."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False


def _driver() -> str | None:
    """Return the version of the GPU's driver, None where unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.stdout.split("\n")[0].strip() or None


def provenance(commit: str | None, tests: str, device: torch.device) -> dict:
    """Return what every row says about code and machine."""
    found = versions()
    commit = commit or found["git_commit"]
    return {
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": commit and commit.endswith("-dirty"),
        "tests": tests,
        "device": device.type,
        "gpu": found["gpu"] if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        **{name: found[name] for name in ("torch", "triton", "cuda", "python", "processor")},
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict]) -> str:
    """Return the rows as text, with each time against the reference's of that shape."""
    reference = {
        (row["batch"], row["horizon"]): row["ms_median"]
        for row in rows
        if row["engine"] == "reference" and "ms_median" in row
    }
    lines = [
        f"{'engine':10}{'dtype':10}{'B':>6}{'H':>5}{'ms':>10}{'us/traj':>9}{'TFLOP/s':>9}"
        f"{'floor':>7}{'GB':>7}{'x ref':>7}{'error':>10}{'allowed':>10}{'moments':>9}  status"
    ]

    def number(row: dict, key: str, format: str) -> str:
        return "-" if row.get(key) is None else f"{row[key]:{format}}"

    for row in rows:
        cells = [
            f"{row['engine']:10}{row['dtype']:10}{row['batch']:>6}{row['horizon']:>5}",
            f"{number(row, 'ms_median', '.3f'):>10}{number(row, 'us_per_trajectory', '.2f'):>9}",
            f"{number(row, 'tflops', '.1f'):>9}{number(row, 'share_of_floor', '.0%'):>7}",
            f"{number(row, 'peak_memory_gb', '.2f'):>7}",
        ]
        base = reference.get((row["batch"], row["horizon"]))
        ratio = base / row["ms_median"] if base and "ms_median" in row else None
        cells.append(f"{ratio:>7.1f}" if ratio else f"{'-':>7}")
        cells.append(f"{number(row, 'step_error', '.1e'):>10}")
        cells.append(f"{number(row, 'step_error_allowed', '.1e'):>10}")
        cells.append(f"{number(row, 'moment_score', '.1f'):>9}  {row['status']}")
        lines.append("".join(cells))
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict]:
    """Return the stored rows; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_cases(bench: Bench, cases: list[Case], path: Path, facts: dict, deadline: float) -> bool:
    """Measure cases until the deadline (`time.monotonic`), one row each; those whose row `path`
    holds are done. Return False if the device was lost on the way."""
    rows = read_rows(path)
    done = {Case(*(row[f.name] for f in dataclasses.fields(Case))) for row in rows}
    for case in (case for case in cases if case not in done):
        if time.monotonic() > deadline:
            print(f"time is up: {case} and what follows is not measured", flush=True)
            break
        print(f"{case} ...", flush=True)
        rows.append(bench.row(case) | facts)
        write_bytes_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(table(rows[-1:]).splitlines()[1], flush=True)
        if "error" in rows[-1]:
            print(rows[-1]["error"], flush=True)
        if bench.is_lost():
            return False
        bench.free()
    print(table(rows))
    return True


@torch.no_grad()
def run_once(bench: Bench, case: Case, kernel_times: bool) -> None:
    """Sample twice, for a profiler; with `kernel_times` under torch's own, and print its table of
    the second sample."""
    engine = make_engine(case, bench.components(case.horizon))
    s0 = torch.randn(case.batch, OBSERVATION_DIM, device=bench.device)
    engine.sample(s0, GUIDANCE_SCALE, None, None, False)
    profiler = torch.profiler.profile() if kernel_times else contextlib.nullcontext()
    with profiler:
        engine.sample(s0, GUIDANCE_SCALE, None, None, False)
        bench.synchronize()
    if kernel_times:
        sort_by = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        averages = profiler.key_averages()
        print(averages.table(sort_by=sort_by, row_limit=20, max_name_column_width=60))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time the sampler's engines.")
    parser.add_argument("out_dir", type=Path, help="folder of engines.jsonl")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all, on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all, on a GPU")
    parser.add_argument("--batches", nargs="+", type=int, help="instead of the paper's")
    parser.add_argument("--horizons", nargs="+", type=int, help="instead of the paper's")
    parser.add_argument("--commit", help="of the code, '-dirty' appended; default: asked of git")
    parser.add_argument(
        "--tests", choices=("passed", "failed", "not run"), default="not run", help="noted in rows"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows already there")
    parser.add_argument("--table", action="store_true", help="only print the stored rows")
    parser.add_argument("--run-once", action="store_true", help="only sample the first case twice")
    parser.add_argument("--kernel-times", action="store_true", help="the same; print kernel times")
    options = parser.parse_args(arguments)
    for name in ("batches", "horizons"):
        for value in getattr(options, name) or ():
            if value < 1:
                parser.error(f"--{name} must be at least 1, got {value}")
    return options


def main(arguments: list[str]) -> int:
    """Run the command line; return 1 if a result was wrong or an engine (not the control)
    failed."""
    start = time.monotonic()
    options = parse(arguments)
    path = options.out_dir / "engines.jsonl"
    if options.table:
        print(table(read_rows(path)))
        return 0
    device = torch.device(options.device)
    sizes = SMOKE if options.smoke else Sizes()
    for name in ("batches", "horizons"):
        if getattr(options, name):
            sizes = dataclasses.replace(sizes, **{name: tuple(getattr(options, name))})
    on_gpu = device.type == "cuda"
    engines = options.engines or (list(ENGINES) if on_gpu else ["torch", "reference"])
    dtypes = options.dtypes or (list(DTYPES) if on_gpu else ["bfloat16", "float32"])
    cases = list_cases(sizes, engines, dtypes)
    if not cases:
        raise SystemExit(f"no engine of {engines} computes in any of {dtypes}")
    bench = Bench(sizes, device)
    if options.run_once or options.kernel_times:
        run_once(bench, cases[0], options.kernel_times)
        return 0
    if not options.resume:
        path.unlink(missing_ok=True)
    facts = provenance(options.commit, options.tests, device)
    if not run_cases(bench, cases, path, facts, start + options.time_budget):
        left = options.time_budget - (time.monotonic() - start)
        print(f"the device is lost for this process: starting anew, {left:.0f} s left", flush=True)
        again = ["--resume", "--time-budget", str(left)]
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])
    failed = [
        row
        for row in read_rows(path)
        if row["status"] == "wrong" or (row["status"] == "error" and row["engine"] != "compile")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
