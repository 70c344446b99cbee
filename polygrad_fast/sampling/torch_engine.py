"""Engine "torch": Algorithm 2 in optimised PyTorch, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from polygrad_fast.errors import InputError
from polygrad_fast.profiling import annotate
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.engine import Sampled
from polygrad_fast.sampling.folded_networks import FoldedRollout, HeldTensors, fold_denoiser
from polygrad_fast.sampling.folding import why_foreign
from polygrad_fast.sampling.graphs import GraphCache
from polygrad_fast.sampling.linear import LinearOps
from polygrad_fast.sampling.noise import LoopNormals, SampleNoise
from polygrad_fast.sampling.torch_step import (
    TorchStep,
    Workspace,
    inpaint,
    row_parts,
    step_constants,
)

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MAX_WORKSPACES = 8
"""Batch sizes whose buffers are kept."""


class TorchEngine:
    """The mathematics of `ReferenceEngine` with folded weights, precomputed constants, reused
    buffers and no autograd.

    Differences in the order of operations: input Linears, step embedding and normalizer are folded
    into neighbouring Linears, and the action update is done on normalized actions, where it reads
    u <- u + (m - u) delta / sigma^2 with m = (mu - mean_a) / scale_a, u clipped to m +- reach. In
    float32 one step agrees with the reference to about 1e-6. Noise is drawn in the reference's
    order, so that on a CPU the same seed gives the same trajectories.

    Weights and moments are read anew at every sample, whichever way they were changed.

    With a denoiser of kind "rollout" and the action update "exact" each diffusion step settles one
    more step of the horizon, whatever the later ones are. Where only what is returned counts
    (`settles`, and no chain), each step of the horizon is computed once, when it is settled: the
    same trajectories, for which no other normals are drawn than those the diffusion begins from.

    On a GPU all K steps are one CUDA graph, captured once per batch size, which draws the normals
    of a step in that step. No call reads a tensor on the host. Foreign modules (`why_foreign`) are
    called as they are, step by step and uncaptured.

    Args:
        components: modules and options.
        dtype: "float32"; "bfloat16" and "float16" hold the denoiser's weights and
            activations in half precision, GEMMs and LayerNorm accumulate in float32, states,
            actions and policy stay in float32 (half precision is slow on a CPU that lacks it);
            "tf32" needs CUDA.

    Raises:
        InputError: unknown dtype, one that the device lacks, or half precision with a foreign
            denoiser.
    """

    def __init__(self, components: SamplerComponents, dtype: str = "float32"):
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
        device = components.device
        if dtype == "tf32" and device.type != "cuda":
            raise InputError(
                f"device must be a CUDA GPU with dtype 'tf32', got device {str(device)!r}"
            )
        self.components, self.dtype = components, dtype
        self._on_gpu = device.type == "cuda"
        follows = components.config.update_states
        foreign = (
            why_foreign(components.policy, differentiated=follows) is not None
            or why_foreign(components.denoiser) is not None
        )
        # Foreign modules may do what a capture forbids, or move their weights.
        self._captures = self._on_gpu and not foreign
        self._held = HeldTensors(device, fixed_addresses=self._captures)
        self.denoiser = fold_denoiser(
            components.denoiser,
            components.schedule.timesteps,
            DTYPES[dtype],
            self._held,
            LinearOps.choose(device, DTYPES[dtype]),
        )
        self.step = TorchStep(components, self._held, self._captures)
        self.settles = (
            isinstance(self.denoiser, FoldedRollout)
            and self.step.policy is not None
            and _settles_stepwise(components)
        )
        self.constants = step_constants(components)
        self._workspaces: dict[int, Workspace] = {}
        self._graphs = GraphCache()
        # The graphs draw from it; every sample lends it the state of the caller's.
        self._generator = torch.Generator(device) if self._captures else None

    @torch.no_grad()
    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> Sampled:
        """Run Algorithm 2; see `Engine.sample`."""
        with self._matmul_precision("ieee"), annotate("refresh"):
            self.denoiser.refresh()
            self.step.refresh(guidance_scale)
        with self._matmul_precision("tf32" if self.dtype == "tf32" else "ieee"):
            run = self._sample_captured if self._captures else self._sample_eagerly
            chain_length = self.components.chain_length(return_chain)
            return run(initial_observations, generator, noise, chain_length)

    def _sample_eagerly(self, initial_observations, generator, noise, chain_length) -> Sampled:
        """Run all steps."""
        batch = len(initial_observations)
        ws = self._workspace(batch)
        normals = LoopNormals(self.components, batch, generator, noise)
        chain = self._loop(ws, initial_observations, normals, chain_length)
        return ws.trajectory.clone(), ws.actions.clone(), chain

    def _sample_captured(self, initial_observations, generator, noise, chain_length) -> Sampled:
        """Replay the graph of all steps."""
        c, batch = self.components, len(initial_observations)
        given = () if noise is None else tuple(vars(noise).values())

        def run(initial_observations, *given):
            # This workspace belongs to the graph: it is allocated from the graph's own memory.
            ws = self._new_workspace(batch)
            noise = SampleNoise(*given) if given else None
            normals = LoopNormals(c, batch, self._generator, noise)
            chain = self._loop(ws, initial_observations, normals, chain_length)
            return ws.trajectory, ws.actions, *(chain or ())

        key = (chain_length, self.step.update.pull.shape, self.step.guidance_scale.shape)
        source = generator
        if source is None:
            source = torch.cuda.default_generators[c.device.index]
        self._generator.set_state(source.get_state())
        inputs = (initial_observations, *given)
        trajectory, actions, *chain = self._graphs(key, run, inputs, generator=self._generator)
        source.set_state(self._generator.get_state())
        return trajectory, actions, tuple(chain) or None

    def _matmul_precision(self, precision: str) -> contextlib.AbstractContextManager:
        return cuda_matmul_precision(precision) if self._on_gpu else contextlib.nullcontext()

    def _workspace(self, batch: int) -> Workspace:
        ws = self._workspaces.pop(batch, None)
        if ws is None:
            while len(self._workspaces) >= MAX_WORKSPACES:
                self._workspaces.pop(next(iter(self._workspaces)))
            ws = self._new_workspace(batch)
        self._workspaces[batch] = ws
        return ws

    def _new_workspace(self, batch: int) -> Workspace:
        states, actions = self.components.shapes(batch)
        shapes = (*[states] * 3, *[actions] * 4)
        buffers = (torch.empty(shape, device=self._held.device) for shape in shapes)
        return Workspace(*buffers, *self.denoiser.inputs(batch))

    def _loop(
        self, ws: Workspace, initial_observations: Tensor, normals: LoopNormals, chain_length: int
    ) -> tuple[Tensor, Tensor] | None:
        """Run all diffusion steps in the workspace; return the chains of states and actions
        [chain_length, B, H, .] where asked."""
        ws.trajectory.copy_(normals.initial_trajectories)
        ws.actions.copy_(normals.initial_actions)
        inpaint(ws.trajectory, initial_observations)
        if self.settles and not chain_length:
            self._settle(ws, normals.initial_actions)
            return None
        chain = None
        if chain_length:
            chain = tuple(
                torch.empty(chain_length, *tensor.shape, device=tensor.device)
                for tensor in (ws.trajectory, ws.actions)
            )
        first_kept = len(self.constants) - chain_length
        for step, constants in enumerate(self.constants):
            with annotate("denoiser"):
                if step == 0 or not self.components.shows_initial_noise:
                    ws.input_states.copy_(ws.trajectory)
                self.step.write_seen_actions(ws, constants)
                prediction = self._predict(ws, constants.k)
            noises = normals.step(step, constants.k)
            with annotate("guided_step"):
                self.step(ws, prediction, initial_observations, constants, *noises)
            if step >= first_kept:
                chain[0][step - first_kept].copy_(ws.trajectory)
                chain[1][step - first_kept].copy_(ws.actions)
        return chain

    def _settle(self, ws: Workspace, action_noise: Tensor) -> None:
        """Let policy and one-step network take turns over the horizon, from the first observations
        of `ws.trajectory`; the trajectories are what all diffusion steps would leave."""
        denoiser = self.denoiser
        ws.input_states.copy_(ws.trajectory)
        parts = row_parts(len(ws.trajectory), denoiser.rows_per_part, self._held.device)
        rollouts = [denoiser.begin(ws.denoiser_input[p], ws.trajectory[p]) for p in parts]
        for t in range(self.components.horizon):
            with annotate("guided_step"):
                self.step.draw_actions(ws, ws.trajectory, action_noise, slice(t, t + 1))
            with annotate("denoiser"):
                self.step.write_seen_actions(ws, self.constants[-1])
                for part, rollout in zip(parts, rollouts, strict=True):
                    denoiser.extend(rollout, ws.denoiser_input[part], t + 1)

    def _predict(self, ws: Workspace, k: int) -> Tensor:
        """Return the denoiser's output [B, H, D] at step k, float32; the caller may overwrite
        it."""
        denoiser, batch = self.denoiser, len(ws.trajectory)
        parts = row_parts(batch, denoiser.rows_per_part, self._held.device, denoiser.rows_on_gpu)
        if len(parts) == 1:
            return self.denoiser(ws.denoiser_input, k).to(torch.float32)
        for part in parts:
            ws.prediction[part] = self.denoiser(ws.denoiser_input[part], k)
        return ws.prediction


def _settles_stepwise(components: SamplerComponents) -> bool:
    """Return whether, with predictions that at each step of the horizon depend on earlier actions
    only, what a sample returns depends on nothing but these predictions, settled."""
    c = components.config
    return (
        c.action_update == "exact"
        and c.prediction_type == "sample"
        and c.policy_input == "denoised"
        and c.clip_state_change is None
        and c.variance_type == "posterior"  # none is added in the last step
        and components.num_steps > components.horizon
    )


@contextlib.contextmanager
def cuda_matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products on CUDA ("ieee" or "tf32"), and put the user's
    back."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
