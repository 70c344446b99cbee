"""Engine "torch": Algorithm 2 in optimised PyTorch, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.config import check_choices
from polygrad_fast.errors import InputError
from polygrad_fast.policy import log_prob
from polygrad_fast.profiling import annotate
from polygrad_fast.reference.guided_step import policy_distribution
from polygrad_fast.sampling.components import SampleNoise, SamplerComponents
from polygrad_fast.sampling.folded_networks import (
    FoldedPolicy,
    HeldTensors,
    fold_denoiser,
    why_foreign,
)
from polygrad_fast.sampling.graphs import GraphCache
from polygrad_fast.sampling.linear import LinearOps

DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
POLICY_ROWS_PER_THREAD = 1024
"""Rows the policy evaluates at a time on a CPU; measured, as is the denoisers' number."""
MAX_WORKSPACES = 8
"""Batch sizes whose buffers are kept."""


@dataclass(frozen=True)
class StepConstants:
    """Every constant of one diffusion step, as Python numbers."""

    k: int
    is_last: bool
    action_scale: float
    denoised_from_trajectory: float
    denoised_from_prediction: float
    mean_from_denoised: float
    mean_from_trajectory: float
    max_state_change: float | None
    noise_std: float
    adds_state_noise: bool


@dataclass(frozen=True)
class ActionUpdate:
    """Coefficients of u <- c + (m - c) pull with c = clip(u, m - reach, m + reach), all in
    normalized actions, [H, A] or [B, H, A]."""

    std: Tensor
    pull: Tensor  # guidance_scale / sigma^2
    reach: Tensor | None  # clip_std sigma; None: no clipping


@dataclass
class Workspace:
    """Buffers of one batch size, float32 but for the denoiser's input."""

    trajectory: Tensor  # x [B, H, D]
    mean: Tensor  # [B, H, D]; takes turns with `trajectory`
    prediction: Tensor  # [B, H, D]
    trajectory_noise: Tensor  # [B, H, D]
    actions: Tensor  # u [B, H, A]
    policy_mean: Tensor  # m [B, H, A]
    low: Tensor  # m - reach and m + reach [B, H, A]
    high: Tensor
    action_noise: Tensor  # [B, H, A]
    denoiser_input: object  # in the denoiser's own layout, with two views of it:
    input_states: Tensor  # [B, H, D]
    input_actions: Tensor  # [B, H, A]


NoiseSource = Callable[[int], tuple[Tensor, Tensor | None]]


class TorchEngine:
    """The mathematics of `ReferenceEngine` with folded weights, precomputed constants, reused
    buffers and no autograd.

    Differences in the order of operations: input Linears, step embedding and normalizer are folded
    into neighbouring Linears, and the action update is done on normalized actions, where it reads
    u <- u + (m - u) delta / sigma^2 with m = (mu - mean_a) / scale_a, u clipped to m +- reach. In
    float32 one step agrees with the reference to about 1e-6. Noise is drawn in the reference's
    order, so that on a CPU the same seed gives the same trajectories.

    Weights and moments are read anew at every sample, whichever way they were changed.

    On a GPU all K steps are one CUDA graph, captured once per batch size, and all normals of a
    sample are drawn before it, in another order than the reference's; they take 8 K B H (D + A)
    bytes. No call reads a tensor on the host. Foreign modules (`why_foreign`) are called as they
    are, step by step and uncaptured.

    Args:
        components: modules and options.
        dtype: "auto" and "float32"; "bfloat16" and "float16" hold the denoiser's weights and
            activations in half precision, GEMMs and LayerNorm accumulate in float32, states,
            actions and policy stay in float32 (half precision is slow on a CPU that lacks it);
            "tf32" needs CUDA.

    Raises:
        InputError: unknown dtype, one that the device lacks, or half precision with a foreign
            denoiser.
    """

    def __init__(self, components: SamplerComponents, dtype: str = "auto"):
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
        device = components.device
        if dtype == "tf32" and device.type != "cuda":
            raise InputError(f"dtype 'tf32' needs a CUDA device, got device {str(device)!r}")
        self.components, self.dtype = components, dtype
        num_steps = components.schedule.num_train_timesteps
        self._on_gpu = device.type == "cuda"
        foreign_policy = why_foreign(components.policy) is not None
        foreign = foreign_policy or why_foreign(components.denoiser) is not None
        # Foreign modules may do what a capture forbids, or move their weights.
        self._captures = self._on_gpu and not foreign
        self._held = HeldTensors(device, fixed_addresses=self._captures)
        compute_dtype = DTYPES[dtype]
        self._denoiser = fold_denoiser(
            components.denoiser,
            num_steps,
            compute_dtype,
            self._held,
            LinearOps.choose(device, compute_dtype),
        )
        self._policy = None
        if not foreign_policy:
            state_dim = components.observation_dim + 2
            self._policy = FoldedPolicy(components.policy, state_dim, num_steps, self._held)
        self._steps = _step_constants(components)
        self._workspaces: dict[int, Workspace] = {}
        self._graphs = GraphCache()

    @torch.no_grad()
    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return normalized states [B, H, D], actions [B, H, A] and, where asked, both chains
        [n, B, H, .] of the last n steps; new tensors.

        Args are those of `PolicyGuidedSampler.sample`, checked, with normalized initial
        observations [B, S].
        """
        with self._matmul_precision():
            with annotate("refresh"):
                self._refresh(guidance_scale)
            run = self._sample_captured if self._captures else self._sample_eagerly
            chain_length = self.components.chain_length(return_chain)
            return run(initial_observations, generator, noise, chain_length)

    def _sample_eagerly(self, initial_observations, generator, noise, chain_length):
        """Run all steps; the result of `sample`."""
        ws = self._workspace(initial_observations.shape[0])
        if noise is None:
            with annotate("noise"):
                ws.trajectory.normal_(generator=generator)
                ws.actions.normal_(generator=generator)
        else:
            ws.trajectory.copy_(noise.initial_trajectories)
            ws.actions.copy_(noise.initial_actions)
        noise_source = self._noise_source(ws, generator, noise)
        chain = self._loop(ws, initial_observations, noise_source, chain_length)
        return ws.trajectory.clone(), ws.actions.clone(), chain

    def _sample_captured(self, initial_observations, generator, noise, chain_length):
        """Replay the graph of all steps; the result of `sample`."""
        batch, num_steps, device = len(initial_observations), len(self._steps), self._held.device
        if noise is not None:
            normals = (
                noise.initial_trajectories,
                noise.initial_actions,
                noise.trajectories,
                noise.actions,
            )
            normals = tuple(tensor.to(device, torch.float32) for tensor in normals)
        else:
            states, actions = self._shapes(batch)
            with annotate("noise"):
                normals = tuple(
                    torch.randn(shape, generator=generator, device=device)
                    for shape in (states, actions, (num_steps, *states), (num_steps, *actions))
                )

        def run(initial_observations, trajectories, actions, trajectory_noise, action_noise):
            # This workspace belongs to the graph: it is allocated from the graph's own memory.
            ws = self._new_workspace(batch)
            ws.trajectory.copy_(trajectories)
            ws.actions.copy_(actions)
            chain = self._loop(
                ws,
                initial_observations,
                lambda step: (trajectory_noise[step], action_noise[step]),
                chain_length,
            )
            return ws.trajectory, ws.actions, *(chain or ())

        key = (chain_length, self._update.pull.shape, self._guidance_scale.shape)
        trajectory, actions, *chain = self._graphs(key, run, (initial_observations, *normals))
        return trajectory, actions, tuple(chain) or None

    def _matmul_precision(self):
        if not self._on_gpu:
            return contextlib.nullcontext()
        return _cuda_matmul_precision("tf32" if self.dtype == "tf32" else "ieee")

    def _refresh(self, guidance_scale: float | Tensor) -> None:
        """Read current weights, moments and guidance scale."""
        c, put = self.components, self._held.put
        self._denoiser.refresh()
        normalizer = c.normalizer
        scale, mean = (
            m.expand(c.horizon, c.action_dim)
            for m in (normalizer.actions_scale, normalizer.actions_mean)
        )
        self._action_scale = put("action_scale", scale, torch.float32)
        self._inverse_action_scale = put("inverse_action_scale", 1.0 / scale, torch.float32)
        self._action_offset = put("action_offset", -mean / scale, torch.float32)
        self._guidance_scale = guidance_scale
        if torch.is_tensor(guidance_scale) or self._captures:
            delta = guidance_scale
            if not torch.is_tensor(delta):  # filled on the device: as_tensor would synchronize
                delta = torch.full((), delta, device=c.device)
            self._guidance_scale = put("guidance_scale", delta, torch.float32)
        if self._policy is not None:
            self._policy.refresh(normalizer)
            update = self._action_update(c.policy.std.expand(c.horizon, -1))
            self._update = ActionUpdate(
                *(
                    None if tensor is None else put(f"update.{name}", tensor, torch.float32)
                    for name, tensor in vars(update).items()
                )
            )
        if c.config.denoiser_actions == "clipped":
            bounds = (normalizer.normalize(bound, "actions") for bound in c.action_bounds)
            self._bounds = [
                put(f"bound.{i}", bound.expand(c.horizon, c.action_dim), torch.float32)
                for i, bound in enumerate(bounds)
            ]

    def _action_update(self, std_raw: Tensor) -> ActionUpdate:
        """Return the update's coefficients for the policy's raw std, [H, A] or [B, H, A]."""
        config = self.components.config
        variance = std_raw.square()
        pull = self._guidance_scale / variance
        if config.max_guidance is not None:
            pull = pull.clamp(max=config.max_guidance)
        std = std_raw / self._action_scale
        reach = config.clip_std * std if config.clip_std is not None else None
        return ActionUpdate(std, pull, reach)

    def _workspace(self, batch: int) -> Workspace:
        ws = self._workspaces.pop(batch, None)
        if ws is None:
            while len(self._workspaces) >= MAX_WORKSPACES:
                self._workspaces.pop(next(iter(self._workspaces)))
            ws = self._new_workspace(batch)
        self._workspaces[batch] = ws
        return ws

    def _shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        c = self.components
        return (batch, c.horizon, c.observation_dim + 2), (batch, c.horizon, c.action_dim)

    def _new_workspace(self, batch: int) -> Workspace:
        states, actions = self._shapes(batch)
        shapes = (*[states] * 4, *[actions] * 5)
        buffers = (torch.empty(shape, device=self._held.device) for shape in shapes)
        return Workspace(*buffers, *self._denoiser.inputs(batch))

    def _noise_source(self, ws: Workspace, generator, noise: SampleNoise | None) -> NoiseSource:
        """Return the function that gives one step's normals, in the reference's order."""
        draws_actions = self.components.config.action_update != "none"
        if noise is not None:
            device = self.components.device
            return lambda step: (
                noise.trajectories[step].to(device, torch.float32),
                noise.actions[step].to(device, torch.float32),
            )

        def draw(step: int) -> tuple[Tensor, Tensor | None]:
            states = ws.trajectory_noise.normal_(generator=generator)
            if self._steps[step].is_last or not draws_actions:
                return states, None
            return states, ws.action_noise.normal_(generator=generator)

        return draw

    def _loop(
        self,
        ws: Workspace,
        initial_observations: Tensor,
        noise_source: NoiseSource,
        chain_length: int,
    ) -> tuple[Tensor, Tensor] | None:
        """Run all diffusion steps on the workspace's trajectory and actions; return their chains
        [chain_length, B, H, .] where asked."""
        chain = None
        if chain_length:
            chain = tuple(
                torch.empty(chain_length, *tensor.shape, device=tensor.device)
                for tensor in (ws.trajectory, ws.actions)
            )
        self._inpaint(ws.trajectory, initial_observations)
        first_kept = len(self._steps) - chain_length
        for step, constants in enumerate(self._steps):
            with annotate("denoiser"):
                self._write_denoiser_input(ws, constants)
                prediction = self._predict(ws, constants.k)
            with annotate("noise"):
                normals = noise_source(step)
            with annotate("guided_step"):
                self._guided_step(ws, prediction, initial_observations, constants, *normals)
            if step >= first_kept:
                chain[0][step - first_kept].copy_(ws.trajectory)
                chain[1][step - first_kept].copy_(ws.actions)
        return chain

    def _predict(self, ws: Workspace, k: int) -> Tensor:
        """Return the denoiser's output [B, H, D] at step k, float32; the caller may overwrite
        it."""
        parts = self._parts(ws.trajectory.shape[0], self._denoiser.rows_per_part)
        if len(parts) == 1:
            return self._denoiser(ws.denoiser_input, k).to(torch.float32)
        for part in parts:
            ws.prediction[part] = self._denoiser(ws.denoiser_input[part], k)
        return ws.prediction

    def _parts(self, rows: int, rows_per_thread: int | None) -> list[slice]:
        """Split `rows` evenly so that the activations of a part stay in a CPU's caches; a GPU and
        `None` get one part."""
        if self._on_gpu or rows_per_thread is None:
            return [slice(0, rows)]
        num_parts = math.ceil(rows / (rows_per_thread * torch.get_num_threads()))
        bounds = [rows * i // num_parts for i in range(num_parts + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]

    @staticmethod
    def _inpaint(states: Tensor, initial_observations: Tensor) -> None:
        states[:, 0, : initial_observations.shape[1]] = initial_observations

    def _write_denoiser_input(self, ws: Workspace, constants: StepConstants) -> None:
        ws.input_states.copy_(ws.trajectory)
        seen = ws.actions
        if self.components.config.denoiser_actions == "clipped":
            seen = torch.clamp(seen, *self._bounds)
        if constants.action_scale == 1.0:
            ws.input_actions.copy_(seen)
        else:
            torch.mul(seen, constants.action_scale, out=ws.input_actions)

    def _guided_step(
        self,
        ws: Workspace,
        prediction: Tensor,
        initial_observations: Tensor,
        constants: StepConstants,
        trajectory_noise: Tensor,
        action_noise: Tensor | None,
    ) -> None:
        """Advance `ws.trajectory` and `ws.actions` by one step (see
        `polygrad_fast.reference.guided_step`); overwrites `prediction` [B, H, D]."""
        config = self.components.config
        check_choices(config)
        denoised = prediction
        if config.prediction_type == "epsilon":
            denoised.mul_(-constants.denoised_from_prediction)
            denoised.add_(ws.trajectory, alpha=constants.denoised_from_trajectory)
        self._inpaint(denoised, initial_observations)
        self._posterior_mean(ws, denoised, constants)
        if constants.max_state_change is not None:
            limit = constants.max_state_change
            ws.mean.sub_(ws.trajectory).clamp_(-limit, limit).add_(ws.trajectory)
        states = {"denoised": denoised, "posterior_mean": ws.mean, "noisy": ws.trajectory}
        policy_states = states[config.policy_input]

        clips = config.clip_std is not None
        if constants.is_last:
            if config.clip_final_actions and clips:
                update = self._policy_at(ws, policy_states)
                self._clip(ws, update)
        elif config.action_update == "score":
            update = self._policy_at(ws, policy_states)
            if clips and config.clip_order == "before":
                self._clip(ws, update)
            # m + (u - m) (1 - pull) would cancel where m is large
            ws.actions.lerp_(ws.policy_mean, update.pull)
            if clips and config.clip_order == "after":
                self._clip(ws, update)
            if config.update_states:
                step = self._guidance_scale * self._likelihood_gradient(ws, policy_states)
                observation_dim = initial_observations.shape[1]
                denoised[..., :observation_dim] = policy_states[..., :observation_dim] + step
                self._posterior_mean(ws, denoised, constants)
            ws.actions.add_(action_noise, alpha=constants.noise_std)
        elif config.action_update == "sample":
            update = self._policy_at(ws, policy_states)
            torch.addcmul(ws.policy_mean, update.std, action_noise, out=ws.actions)

        if constants.adds_state_noise:
            ws.mean.add_(trajectory_noise, alpha=constants.noise_std)
        self._inpaint(ws.mean, initial_observations)
        ws.trajectory, ws.mean = ws.mean, ws.trajectory

    @staticmethod
    def _posterior_mean(ws: Workspace, denoised: Tensor, constants: StepConstants) -> None:
        torch.mul(denoised, constants.mean_from_denoised, out=ws.mean)
        ws.mean.add_(ws.trajectory, alpha=constants.mean_from_trajectory)

    @staticmethod
    def _clip(ws: Workspace, update: ActionUpdate) -> None:
        torch.sub(ws.policy_mean, update.reach, out=ws.low)
        torch.add(ws.policy_mean, update.reach, out=ws.high)
        torch.clamp(ws.actions, ws.low, ws.high, out=ws.actions)

    def _policy_at(self, ws: Workspace, states: Tensor) -> ActionUpdate:
        """Write the policy's mean at normalized states [B, H, D] to `ws.policy_mean`, as normalized
        actions, and return the update's coefficients."""
        if self._policy is None:
            c = self.components
            observations = states[..., : c.observation_dim]
            mean, std = policy_distribution(c.policy, c.normalizer, observations)
            ws.policy_mean.copy_(mean)
            update = self._action_update(std.expand(mean.shape))
        else:
            rows, means = states.flatten(0, 1), ws.policy_mean.flatten(0, 1)
            for part in self._parts(len(rows), POLICY_ROWS_PER_THREAD):
                means[part] = self._policy.mean(rows[part])
            update = self._update
        torch.addcmul(
            self._action_offset, ws.policy_mean, self._inverse_action_scale, out=ws.policy_mean
        )
        return update

    def _likelihood_gradient(self, ws: Workspace, states: Tensor) -> Tensor:
        """Return the gradient of log pi(u | o) with respect to the normalized observations at
        `ws.actions` and the normalized states [B, H, D]: [B, H, S]."""
        c = self.components
        with torch.enable_grad():
            states = states.detach().clone().requires_grad_(True)
            if self._policy is None:
                observations = states[..., : c.observation_dim]
                mean, std = policy_distribution(c.policy, c.normalizer, observations)
                std = std / self._action_scale
            else:
                mean = self._policy.differentiable_mean(states.flatten(0, 1))
                mean, std = mean.view_as(ws.actions), self._update.std
            mean = torch.addcmul(self._action_offset, mean, self._inverse_action_scale)
            (gradient,) = torch.autograd.grad(log_prob(ws.actions, mean, std).sum(), states)
        return gradient[..., : c.observation_dim]


def _step_constants(components: SamplerComponents) -> list[StepConstants]:
    """Return the constants of every step, in loop order (first k = K - 1)."""
    schedule, config = components.schedule, components.config
    from_denoised, from_trajectory, noise_std = schedule.step_coefficients(config.variance_type)
    action_scale = schedule.alphas_cumprod.sqrt()
    if not config.scale_actions:
        action_scale = torch.ones_like(action_scale)
    table = torch.stack(
        [
            action_scale,
            schedule.sqrt_recip_alphas_cumprod,
            schedule.sqrt_recipm1_alphas_cumprod,
            from_denoised,
            from_trajectory,
            noise_std,
        ],
        dim=1,
    ).tolist()
    return [
        StepConstants(
            k=k,
            is_last=k == 0,
            action_scale=scale,
            denoised_from_trajectory=from_trajectory,
            denoised_from_prediction=from_prediction,
            mean_from_denoised=coef1,
            mean_from_trajectory=coef2,
            max_state_change=(
                config.clip_state_change if k < config.clip_state_change_steps else None
            ),
            noise_std=std,
            adds_state_noise=k > 0 or config.variance_type == "beta",
        )
        for k, (scale, from_trajectory, from_prediction, coef1, coef2, std) in reversed(
            list(enumerate(table))
        )
    ]


@contextlib.contextmanager
def _cuda_matmul_precision(precision: str):
    """Set the precision of float32 matrix products on CUDA ("ieee" or "tf32"), and put the user's
    back."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
