"""Policy-guided trajectory diffusion: the public sampler and the reference engine's loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.config import SamplerConfig
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.reference.guided_step import denoiser_actions, guided_step
from polygrad_fast.schedule import NoiseSchedule

ENGINES = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True)
class SampleNoise:
    """Every standard normal of one sample, in loop order (first row = step i = K)."""

    initial_trajectories: Tensor  # [B, H, D]
    initial_actions: Tensor  # [B, H, A]
    trajectories: Tensor  # [K, B, H, D]
    actions: Tensor  # [K, B, H, A]


@dataclass(frozen=True)
class TrajectoryBatch:
    """Imagined trajectories, raw or (with `normalized=True`) normalized."""

    observations: Tensor  # [B, H, S]
    actions: Tensor  # [B, H, A]
    rewards: Tensor  # [B, H]
    terminals: Tensor  # [B, H], 0/1 flags; with normalized=True the values as denoised
    chain_trajectories: Tensor | None = None  # [K, B, H, D], normalized, after each step
    chain_actions: Tensor | None = None  # [K, B, H, A]


class PolicyGuidedSampler:
    """Diffuse random trajectories into on-policy ones (Algorithm 2).

    The sampler holds the modules it is given and reads their current weights and moments at every call.

    Args:
        denoiser: eps_theta, called as denoiser(trajectory, actions, timesteps).
        policy: maps raw observations [..., S] to (mean, std) of raw actions, [..., A] each.
        schedule: K diffusion steps.
        normalizer: moments of observations, actions, rewards and terminals.
        config: the sampler's options; default `SamplerConfig.official()`.
        engine: "reference" is plain PyTorch and reads like the paper; "auto" picks the fastest engine there is.
        dtype: "auto" or "float32".
        device: "auto" is the denoiser's device.
        action_bounds: (low, high) of the raw actions, [A] or scalars; needed for `denoiser_actions="clipped"`.

    Raises:
        InputError: an option the engine does not offer, or modules whose dimensions differ.
    """

    def __init__(
        self,
        denoiser,
        policy,
        schedule: NoiseSchedule,
        normalizer: Normalizer,
        config: SamplerConfig | None = None,
        engine: str = "auto",
        dtype: str = "auto",
        device: str | torch.device = "auto",
        action_bounds: tuple | None = None,
    ):
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
        if engine in ("torch", "triton"):
            raise InputError(f"engine {engine!r} is not part of this version; use 'reference'")
        if dtype not in ("auto", "float32"):
            raise InputError(
                f"the reference engine computes in float32 (dtype 'auto'), got dtype {dtype!r}"
            )
        self.config = config if config is not None else SamplerConfig.official()
        for name in ("observation_dim", "action_dim"):
            wanted = getattr(denoiser, name)
            for other in (policy, normalizer):
                got = getattr(other, name, wanted)
                if got != wanted:
                    raise InputError(
                        f"{type(other).__name__} has {name} {got}, the denoiser {wanted}"
                    )
        self.engine = "reference"
        self.denoiser, self.policy, self.normalizer = denoiser, policy, normalizer
        self.observation_dim, self.action_dim = denoiser.observation_dim, denoiser.action_dim
        self.horizon = denoiser.horizon
        self.device = (
            next(denoiser.parameters()).device if device == "auto" else torch.device(device)
        )
        self.schedule = schedule.to(self.device)
        self.action_bounds = None
        if action_bounds is not None:
            low, high = (
                torch.as_tensor(bound, dtype=torch.float32, device=self.device)
                for bound in action_bounds
            )
            self.action_bounds = (low, high)
        if self.config.denoiser_actions == "clipped" and self.action_bounds is None:
            raise InputError("denoiser_actions='clipped' needs action_bounds=(low, high), got None")

    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor = 0.005,
        generator: torch.Generator | None = None,
        noise: SampleNoise | None = None,
        normalized: bool = False,
        return_chain: bool = False,
    ) -> TrajectoryBatch:
        """Imagine one on-policy trajectory from each initial observation (Algorithm 2).

        Without `noise`, normals are drawn from `generator` (default: torch's) in the released code's order: initial
        states, initial actions, then per step states and actions (the latter not in the last step).

        Args:
            initial_observations: s0 [B, S], floating point, raw, or normalized with `normalized=True`.
            guidance_scale: delta > 0; a tensor is not read on the host.
            generator: source of the normals, on the sampler's device.
            noise: every normal, given by the caller.
            normalized: the input is normalized and all results shall be.
            return_chain: also return states and actions after each step.

        Raises:
            InputError: wrong shape or dtype, B = 0, a value that is not finite, or noise of other shapes.
        """
        s0 = self._check_observations(initial_observations)
        if not torch.is_tensor(guidance_scale) and not 0 <= guidance_scale < float("inf"):
            raise InputError(
                f"guidance_scale must be a non-negative finite number, got {guidance_scale!r}"
            )
        if noise is not None:
            self._check_noise(noise, s0.shape[0])
        s0_norm = s0 if normalized else self.normalizer.normalize(s0, "observations")
        with torch.no_grad():
            trajectory, actions, chain = self._sample_reference(
                s0_norm, guidance_scale, generator, noise, return_chain
            )
            return self._to_batch(s0, trajectory, actions, chain, normalized)

    def _sample_reference(self, s0_norm, guidance_scale, generator, noise, return_chain):
        batch = s0_norm.shape[0]
        trajectory_shape = (batch, self.horizon, self.observation_dim + 2)
        action_shape = (batch, self.horizon, self.action_dim)

        def normals(shape, given, step=None):
            if given is not None:
                return (given if step is None else given[step]).to(self.device)
            return torch.randn(shape, generator=generator, device=self.device)

        given = noise if noise is not None else SampleNoise(None, None, None, None)
        trajectory = normals(trajectory_shape, given.initial_trajectories).clone()
        actions = normals(action_shape, given.initial_actions)
        trajectory[:, 0, : self.observation_dim] = s0_norm
        num_steps = self.schedule.num_train_timesteps
        chain_trajectories, chain_actions = [], []
        for step, k in enumerate(reversed(range(num_steps))):
            seen = denoiser_actions(
                actions, k, self.schedule, self.normalizer, self.config, self.action_bounds
            )
            timesteps = torch.full((batch,), k, device=self.device)
            prediction = self.denoiser(trajectory, seen, timesteps)
            trajectory_noise = normals(trajectory_shape, given.trajectories, step)
            action_noise = None
            if k > 0 and self.config.action_update != "none":
                action_noise = normals(action_shape, given.actions, step)
            trajectory, actions = guided_step(
                prediction,
                trajectory,
                actions,
                s0_norm,
                k,
                self.policy,
                self.normalizer,
                self.schedule,
                self.config,
                guidance_scale,
                trajectory_noise,
                action_noise,
            )
            if return_chain:
                chain_trajectories.append(trajectory)
                chain_actions.append(actions)
        chain = (
            (torch.stack(chain_trajectories), torch.stack(chain_actions)) if return_chain else None
        )
        return trajectory, actions, chain

    def _to_batch(self, s0, trajectory, actions, chain, normalized) -> TrajectoryBatch:
        observations = trajectory[..., : self.observation_dim]
        rewards, terminals = trajectory[..., -2], trajectory[..., -1]
        if not normalized:
            observations = self.normalizer.unnormalize(observations, "observations")
            observations[:, 0] = s0  # exact, not through the normalizer and back
            actions = self.normalizer.unnormalize(actions, "actions")
            rewards = self.normalizer.unnormalize(rewards, "rewards")
            flags = self.normalizer.unnormalize(terminals, "terminals") > 0.5
            terminals = flags.to(trajectory.dtype)
        return TrajectoryBatch(observations, actions, rewards, terminals, *(chain or ()))

    def _check_observations(self, observations: Tensor) -> Tensor:
        if not torch.is_tensor(observations):
            raise InputError(
                f"initial_observations must be a torch tensor, got {type(observations).__name__}"
            )
        shape = tuple(observations.shape)
        if len(shape) != 2 or shape[1] != self.observation_dim or shape[0] < 1:
            raise InputError(
                f"initial_observations of shape {shape} given, wanted [B, {self.observation_dim}] with B >= 1"
            )
        if not observations.is_floating_point():
            raise InputError(
                f"initial_observations must be floating point, got {observations.dtype}"
            )
        finite = torch.isfinite(observations)
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            raise InputError(
                f"initial_observations[{row}, {column}] is {observations[row, column].item()}, wanted a finite number"
            )
        return observations.to(self.device, torch.float32)

    def _check_noise(self, noise: SampleNoise, batch: int) -> None:
        num_steps = self.schedule.num_train_timesteps
        states = (batch, self.horizon, self.observation_dim + 2)
        actions = (batch, self.horizon, self.action_dim)
        for name, wanted in (
            ("initial_trajectories", states),
            ("initial_actions", actions),
            ("trajectories", (num_steps, *states)),
            ("actions", (num_steps, *actions)),
        ):
            got = tuple(getattr(noise, name).shape)
            if got != wanted:
                raise InputError(f"noise.{name} of shape {got} given, wanted {wanted}")
