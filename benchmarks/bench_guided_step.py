"""The guided step, everything between two denoiser calls: kernel by tile size, and plain twin.

    pytest benchmarks/bench_guided_step.py --benchmark-only --rows rows.jsonl

The kernel needs a CUDA GPU (with `--smoke` and TRITON_INTERPRET=1 the interpreter); a time is one
of `LAUNCHES` steps, on a GPU replayed as one CUDA graph. The dtype is the policy's.
"""

import copy
import dataclasses

import pytest
import torch

import polygrad_fast as pg
from harness.sampler_case import (
    ACTION_DIM,
    OBSERVATION_DIM,
    matmul_precision,
    policy_flops,
)
from harness.timing import repeated
from harness.work import Work, parameter_bytes, tensor_bytes
from polygrad_fast.reference import guided_step as twin

try:
    from polygrad_fast.kernels import guided_step as kernel
    from polygrad_fast.kernels.denoiser_input import ActionSpace
    from polygrad_fast.kernels.step_table import schedule_table, step_options
    from polygrad_fast.sampling.triton_operands import PolicyWeights, Refresh
except ImportError:  # triton
    kernel = None

LAUNCHES, NUM_STEPS, STEP = 50, 128, 64
GUIDANCE_SCALE = 0.5  # large, so that the check sees a wrong policy mean
ALLOWED = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2}
SIZES = [(1024, 10), (4096, 10), (256, 10), (1024, 50), (16384, 10), (4096, 50)]


def tiles(dtype: str) -> dict:
    """Return the shipped tiles for 19 states, and some to try, by name."""
    tried = {
        "float16": [kernel.StepBlocks(32, 64, 8, 2), kernel.StepBlocks(64, 32, 8, 2)],
        "tf32": [kernel.StepBlocks(32, 32, 8, 2)],
    }
    return {
        f"tile {'x'.join(map(str, dataclasses.astuple(blocks)))}": blocks
        for blocks in (*kernel.STEP_BLOCKS[dtype][32], *tried.get(dtype, []))
    }


def list_cases(setting):
    """Return kernel tiles and the twin for every size, the paper's first."""
    on_gpu = setting.device.type == "cuda"
    sizes = SIZES if on_gpu else [(64, 10), (256, 10)]
    sizes = [(3, 2)] if setting.smoke else sizes
    implementations = [("plain", "float32")]
    if kernel is not None and (on_gpu or (setting.smoke and kernel.is_interpreted())):
        implementations += [
            (name, dtype) for dtype in ("float16", "tf32", "float32") for name in tiles(dtype)
        ]
    return [
        (1 + i, {"implementation": name, "dtype": dtype, "batch": batch, "horizon": horizon})
        for i, (batch, horizon) in enumerate(sizes)
        for name, dtype in implementations
    ]


class Step:
    """Operands of one step of that many trajectories, with a paper-sized policy."""

    def __init__(self, batch: int, horizon: int, device: torch.device):
        torch.manual_seed(0)
        self.config = pg.SamplerConfig.official()
        self.schedule = pg.NoiseSchedule.cosine(NUM_STEPS).to(device)
        self.normalizer = pg.Normalizer(OBSERVATION_DIM, ACTION_DIM).to(device)
        self.policy = pg.GaussianPolicy(OBSERVATION_DIM, ACTION_DIM).to(device)
        states = batch, horizon, OBSERVATION_DIM + 2
        self.prediction, self.trajectory = torch.randn(2, *states, device=device)
        self.actions = torch.randn(batch, horizon, ACTION_DIM, device=device)
        self.s0 = torch.randn(batch, OBSERVATION_DIM, device=device)
        self.noise = torch.randn_like(self.trajectory), torch.randn_like(self.actions)

    def plain(self):
        """Return the twin's states and actions."""
        return twin.guided_step(
            self.prediction, self.trajectory, self.actions, self.s0, STEP, self.policy,
            self.normalizer, self.schedule, self.config, GUIDANCE_SCALE, *self.noise,
        )  # fmt: skip

    def exact(self):
        """Return the twin's states, actions and next denoiser input in float64."""
        states, actions = twin.guided_step(
            *(t.double() for t in (self.prediction, self.trajectory, self.actions, self.s0)),
            STEP, copy.deepcopy(self.policy).double(), copy.deepcopy(self.normalizer).double(),
            self.schedule.to(dtype=torch.float64), self.config, GUIDANCE_SCALE,
            *(t.double() for t in self.noise),
        )  # fmt: skip
        schedule = self.schedule.to(dtype=torch.float64)
        seen = twin.denoiser_actions(
            actions, STEP - 1, schedule, self.normalizer, self.config, None
        )
        return states, actions, torch.cat([states, seen], dim=-1).flatten(1)

    def fused(self, dtype: str, blocks):
        """Return a function of the noise (None: drawn in the kernel) that launches the kernel and
        returns states, actions and the next denoiser input [B, H (D + A)]."""
        device = self.actions.device
        weights = PolicyWeights(self.policy, self.normalizer, dtype, device)
        refresh = Refresh(device, weights)
        refresh.follow()
        refresh()
        options = step_options(self.config)
        table = schedule_table(self.schedule, options, self.config)
        mean, scale = self.normalizer.actions_mean, self.normalizer.actions_scale
        space = ActionSpace(mean, scale, mean, mean)
        out = tuple(torch.full_like(t, torch.nan) for t in (self.trajectory, self.actions))
        guidance = torch.full((1,), GUIDANCE_SCALE, device=device)
        seed = torch.zeros(2, dtype=torch.int64, device=device)
        batch, horizon, state_dim = self.trajectory.shape
        width = -(-horizon * (state_dim + ACTION_DIM) // 64) * 64
        input_dtype = torch.float16 if dtype == "float16" else torch.float32
        denoiser_input = torch.full((batch, width), torch.nan, dtype=input_dtype, device=device)
        used = denoiser_input[:, : horizon * (state_dim + ACTION_DIM)]

        def launch(noise=None):
            kernel.guided_step(
                self.prediction, self.trajectory, self.actions, self.s0, STEP, weights.operands,
                table, space, options, guidance, seed, noise, *out, denoiser_input, blocks,
            )  # fmt: skip
            return *out, used

        return launch

    def work(self) -> Work:
        """Return the step's work: prediction, states, actions and policy in, both and the next
        denoiser input out."""
        batch, horizon = self.actions.shape[:2]
        moved = 2 * tensor_bytes(self.trajectory, self.actions) + tensor_bytes(self.prediction)
        moved += tensor_bytes(self.s0, self.trajectory, self.actions)
        flops = batch * horizon * policy_flops(self.policy)
        return Work(flops, moved + parameter_bytes(self.policy))


@pytest.mark.cases(of=list_cases)
def test_step(bench, implementation, dtype, batch, horizon):
    names = {"implementation": implementation, "batch": batch, "horizon": horizon}
    with (
        bench.case("guided_step", dtype, **names) as case,
        torch.no_grad(),
        matmul_precision("float32"),
    ):
        step = Step(batch, horizon, bench.device)
        checked = call = step.plain
        if implementation.startswith("tile"):
            call = step.fused(dtype, tiles(dtype)[implementation])

            def checked():
                return call(step.noise)

        def error() -> float:
            pairs = zip(checked(), step.exact(), strict=False)  # the twin makes no denoiser input
            return torch.stack([(got - wanted).abs().max() for got, wanted in pairs]).max().item()

        case.check("largest error", error(), ALLOWED[dtype])
        count = 2 if bench.session.small else LAUNCHES if bench.device.type == "cuda" else 1
        several = repeated(call, count, bench.device)
        case.time(several, batch, "trajectory", step.work(), repeats=count, seconds=0.2)
