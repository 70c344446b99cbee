"""One diffusion step of engine "torch", in place and without autograd."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.config import check_choices
from polygrad_fast.policy import log_prob
from polygrad_fast.protocols import policy_moments
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.folded_networks import FoldedPolicy, HeldTensors
from polygrad_fast.sampling.folding import why_foreign

POLICY_ROWS_PER_THREAD = 1024
"""Rows the policy evaluates at a time on a CPU; measured, as is the denoisers' number."""


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


def step_constants(components: SamplerComponents) -> list[StepConstants]:
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
    actions: Tensor  # u [B, H, A]
    policy_mean: Tensor  # m [B, H, A]
    low: Tensor  # m - reach and m + reach [B, H, A]
    high: Tensor
    denoiser_input: object  # in the denoiser's own layout, with two views of it:
    input_states: Tensor  # [B, H, D]
    input_actions: Tensor  # [B, H, A]


class TorchStep:
    """What happens between two calls of the denoiser; see `polygrad_fast.reference.guided_step`.

    Args:
        components: modules and options.
        held: the tensors that the loop reads.
        captures: whether the step is captured in a graph, which fixes the guidance scale's address.
    """

    def __init__(self, components: SamplerComponents, held: HeldTensors, captures: bool):
        self.components, self.held, self.captures = components, held, captures
        c, self.policy = components, None
        if why_foreign(c.policy, differentiated=c.config.update_states) is None:
            state_dim = c.observation_dim + 2
            self.policy = FoldedPolicy(c.policy, state_dim, c.num_steps, held)

    def refresh(self, guidance_scale: float | Tensor) -> None:
        """Read the policy's current weights, the moments and the guidance scale."""
        c, put = self.components, self.held.put
        normalizer = c.normalizer
        scale, mean = (
            m.expand(c.horizon, c.action_dim)
            for m in (normalizer.actions_scale, normalizer.actions_mean)
        )
        self._action_scale = put("action_scale", scale, torch.float32)
        self._inverse_action_scale = put("inverse_action_scale", 1.0 / scale, torch.float32)
        self._action_offset = put("action_offset", -mean / scale, torch.float32)
        self.guidance_scale = guidance_scale
        if torch.is_tensor(guidance_scale) or self.captures:
            delta = guidance_scale
            if not torch.is_tensor(delta):  # filled on the device: as_tensor would synchronize
                delta = torch.full((), delta, device=c.device)
            self.guidance_scale = put("guidance_scale", delta, torch.float32)
        if self.policy is not None:
            self.policy.refresh(normalizer)
            update = self._action_update(c.policy.std.expand(c.horizon, -1))
            self.update = ActionUpdate(
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
        pull = self.guidance_scale / variance
        if config.max_guidance is not None:
            pull = pull.clamp(max=config.max_guidance)
        std = std_raw / self._action_scale
        reach = config.clip_std * std if config.clip_std is not None else None
        return ActionUpdate(std, pull, reach)

    def write_seen_actions(self, ws: Workspace, constants: StepConstants) -> None:
        """Write the actions as the denoiser sees them in this step."""
        seen = ws.actions
        if self.components.config.denoiser_actions == "clipped":
            seen = torch.clamp(seen, *self._bounds)
        if constants.action_scale == 1.0:
            ws.input_actions.copy_(seen)
        else:
            torch.mul(seen, constants.action_scale, out=ws.input_actions)

    def __call__(
        self,
        ws: Workspace,
        prediction: Tensor,
        initial_observations: Tensor,
        constants: StepConstants,
        trajectory_noise: Tensor,
        action_noise: Tensor | None,
    ) -> None:
        """Advance `ws.trajectory` and `ws.actions` by one step; overwrites `prediction` [B, H,
        D]."""
        config = self.components.config
        check_choices(config)
        denoised = prediction
        if config.prediction_type == "epsilon":
            denoised.mul_(-constants.denoised_from_prediction)
            denoised.add_(ws.trajectory, alpha=constants.denoised_from_trajectory)
        inpaint(denoised, initial_observations)
        self._posterior_mean(ws, denoised, constants)
        if constants.max_state_change is not None:
            limit = constants.max_state_change
            ws.mean.sub_(ws.trajectory).clamp_(-limit, limit).add_(ws.trajectory)
        states = {"denoised": denoised, "posterior_mean": ws.mean, "noisy": ws.trajectory}
        policy_states = states[config.policy_input]

        clips, exact = config.clip_std is not None, config.action_update == "exact"
        if exact:
            if not constants.is_last:
                self.draw_actions(ws, policy_states, action_noise)
        elif constants.is_last:
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
                step = self.guidance_scale * self._likelihood_gradient(ws, policy_states)
                observation_dim = initial_observations.shape[1]
                denoised[..., :observation_dim] = policy_states[..., :observation_dim] + step
                self._posterior_mean(ws, denoised, constants)
            ws.actions.add_(action_noise, alpha=constants.noise_std)
        elif config.action_update == "sample":
            self.draw_actions(ws, policy_states, action_noise)

        if constants.adds_state_noise:
            ws.mean.add_(trajectory_noise, alpha=constants.noise_std)
        inpaint(ws.mean, initial_observations)
        if exact and constants.is_last:  # the policy's at the states that are returned
            self.draw_actions(ws, ws.mean, action_noise)
        ws.trajectory, ws.mean = ws.mean, ws.trajectory

    @staticmethod
    def _posterior_mean(ws: Workspace, denoised: Tensor, constants: StepConstants) -> None:
        torch.mul(denoised, constants.mean_from_denoised, out=ws.mean)
        ws.mean.add_(ws.trajectory, alpha=constants.mean_from_trajectory)

    def draw_actions(
        self, ws: Workspace, states: Tensor, action_noise: Tensor, due: slice = slice(None)
    ) -> None:
        """Set `ws.actions` at steps `due` to the policy's at normalized states [B, H, D], by given
        normals."""
        update = self._policy_at(ws, states, due)
        mean, std, noise = ws.policy_mean[:, due], update.std[..., due, :], action_noise[:, due]
        torch.addcmul(mean, std, noise, out=ws.actions[:, due])

    @staticmethod
    def _clip(ws: Workspace, update: ActionUpdate) -> None:
        torch.sub(ws.policy_mean, update.reach, out=ws.low)
        torch.add(ws.policy_mean, update.reach, out=ws.high)
        torch.clamp(ws.actions, ws.low, ws.high, out=ws.actions)

    def _policy_at(self, ws: Workspace, states: Tensor, due: slice = slice(None)) -> ActionUpdate:
        """Write the policy's mean at normalized states [B, H, D] to `ws.policy_mean`, as normalized
        actions, and return the update's coefficients; of a folded policy at steps `due` only."""
        means = ws.policy_mean[:, due]
        if self.policy is None:
            c = self.components
            observations = states[..., : c.observation_dim]
            mean, std = policy_moments(c.policy, c.normalizer, observations, normalized=True)
            means.copy_(mean)
            update = self._action_update(std)
        else:
            rows = states[:, due].flatten(0, 1)
            parts = row_parts(len(rows), POLICY_ROWS_PER_THREAD, self.held.device)
            found = [self.policy.mean(rows[part]) for part in parts]
            means.copy_((torch.cat(found) if len(found) > 1 else found[0]).view_as(means))
            update = self.update
        torch.addcmul(self._action_offset[due], means, self._inverse_action_scale[due], out=means)
        return update

    def _likelihood_gradient(self, ws: Workspace, states: Tensor) -> Tensor:
        """Return the gradient of log pi(u | o) with respect to the normalized observations at
        `ws.actions` and the normalized states [B, H, D]: [B, H, S]."""
        c = self.components
        with torch.enable_grad():
            states = states.detach().clone().requires_grad_(True)
            if self.policy is None:
                observations = states[..., : c.observation_dim]
                mean, std = policy_moments(c.policy, c.normalizer, observations, normalized=True)
                std = std / self._action_scale
            else:
                mean = self.policy.differentiable_mean(states.flatten(0, 1))
                mean, std = mean.view_as(ws.actions), self.update.std
            mean = torch.addcmul(self._action_offset, mean, self._inverse_action_scale)
            (gradient,) = torch.autograd.grad(log_prob(ws.actions, mean, std).sum(), states)
        return gradient[..., : c.observation_dim]


def row_parts(
    rows: int,
    rows_per_thread: int | None,
    device: torch.device,
    rows_on_gpu: int | None = None,
) -> list[slice]:
    """Split `rows` evenly so that the activations of a part stay in a cache: at most
    `rows_per_thread` for each thread of a CPU, or `rows_on_gpu`; `None`: one part."""
    most = rows_on_gpu
    if device.type != "cuda":
        most = rows_per_thread and rows_per_thread * torch.get_num_threads()
    num_parts = 1 if most is None else math.ceil(rows / most)
    bounds = [rows * i // num_parts for i in range(num_parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def inpaint(states: Tensor, initial_observations: Tensor) -> None:
    """Put s0 [B, S] into states [B, H, D], in place."""
    states[:, 0, : initial_observations.shape[1]] = initial_observations
