"""Time the guided step: kernel by tile size against its plain PyTorch twin.

    pytest benchmarks/bench_guided_step.py --benchmark-columns=median,rounds

Needs a CUDA GPU; every kernel row is checked against the twin first. A round replays a CUDA graph
of `LAUNCHES` steps; `extra_info` holds the time of one in microseconds.
"""

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.reference import guided_step as twin
from polygrad_fast.sampling.graphs import CapturedFunction

LAUNCHES, K, S, A = 50, 128, 17, 6  # Walker2d
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from polygrad_fast.kernels import guided_step as kernel  # noqa: E402
from polygrad_fast.sampling.triton_engine import PolicyWeights  # noqa: E402

TILES = [
    *((precision, blocks) for precision in ("float32", "tf32", "float16")
      for blocks in kernel.STEP_BLOCKS[precision][32]),
    ("float16", kernel.StepBlocks(32, 64, 8, 2)),
    ("float16", kernel.StepBlocks(64, 32, 8, 2)),
    ("tf32", kernel.StepBlocks(32, 32, 8, 2)),
]  # fmt: skip


class Step:
    """Operands of one step of that many trajectories, with a paper-sized policy."""

    k = 64

    def __init__(self, batch: int, horizon: int, precision: str):
        torch.manual_seed(0)
        device = "cuda"
        self.config = pg.SamplerConfig.official()
        self.schedule = pg.NoiseSchedule.cosine(K).to(device)
        self.normalizer = pg.Normalizer(S, A).to(device)
        self.policy = pg.GaussianPolicy(S, A).to(device)
        weights = PolicyWeights(self.policy, self.normalizer, precision, torch.device(device))
        with torch.no_grad():
            weights.refresh()
        self.weights = weights.operands
        self.options = kernel.step_options(self.config)
        self.table = kernel.schedule_table(self.schedule, self.options, self.config)
        shape = (batch, horizon)
        self.prediction, self.trajectory = torch.randn(2, *shape, S + 2, device=device)
        self.actions, self.s0 = torch.randn(*shape, A, device=device), torch.randn(batch, S).cuda()
        self.noise = torch.randn_like(self.trajectory), torch.randn_like(self.actions)
        self.out = torch.empty_like(self.trajectory), torch.empty_like(self.actions)
        self.guidance = torch.full((1,), 0.005, device=device)
        self.seed = torch.zeros(2, dtype=torch.int64, device=device)
        dtype = torch.float16 if precision == "float16" else torch.float32
        width = -(-horizon * (S + 2 + A) // 64) * 64
        self.denoiser_input = torch.zeros(batch, width, dtype=dtype, device=device)

    def fused(self, blocks, noise=None):
        mean, scale = self.normalizer.actions_mean, self.normalizer.actions_scale
        space = kernel.ActionSpace(mean, scale, mean, mean)
        kernel.guided_step(
            self.prediction, self.trajectory, self.actions, self.s0, self.k, self.weights,
            self.table, space, self.options, self.guidance, self.seed, noise, *self.out,
            self.denoiser_input, blocks,
        )  # fmt: skip
        return self.out

    @torch.no_grad()
    def plain(self):
        return twin.guided_step(
            self.prediction, self.trajectory, self.actions, self.s0, self.k, self.policy,
            self.normalizer, self.schedule, self.config, self.guidance, *self.noise,
        )  # fmt: skip


def time_it(benchmark, step: Step, function):
    def launches(x):
        for _ in range(LAUNCHES):
            out = function()
        return out

    graph = CapturedFunction(launches, (step.s0[:1],))

    def replay():
        graph.graph.replay()
        torch.cuda.synchronize()

    benchmark.group = f"B={step.out[0].shape[0]} H={step.out[0].shape[1]}"
    benchmark(replay)
    benchmark.extra_info["us"] = benchmark.stats.stats.median / LAUNCHES * 1e6


@pytest.mark.parametrize("horizon", [10, 50])
@pytest.mark.parametrize("batch", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("precision, blocks", TILES, ids=str)
def test_fused(benchmark, precision, blocks, batch, horizon):
    step = Step(batch, horizon, precision)
    got, wanted = step.fused(blocks, step.noise), step.plain()
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).abs().max() < tolerance
    time_it(benchmark, step, lambda: step.fused(blocks))


@pytest.mark.parametrize("horizon", [10, 50])
@pytest.mark.parametrize("batch", [256, 1024, 4096, 16384])
def test_plain(benchmark, batch, horizon):
    step = Step(batch, horizon, "float32")
    time_it(benchmark, step, step.plain)
