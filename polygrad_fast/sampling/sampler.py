"""Policy-guided trajectory diffusion: the public sampler."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.config import SamplerConfig
from polygrad_fast.diffusion.ddpm import NoiseSchedule
from polygrad_fast.errors import InputError, NonFiniteError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.profiling import annotate
from polygrad_fast.protocols import Denoiser, Policy, check_normalizer, policy_moments
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.engine import Engine
from polygrad_fast.sampling.folding import why_foreign
from polygrad_fast.sampling.input_checks import (
    check_bounds,
    check_chain,
    check_generator,
    check_guidance_scale,
    check_modules,
    check_noise,
    check_observations,
    common_device,
)
from polygrad_fast.sampling.noise import SampleNoise
from polygrad_fast.sampling.reference_engine import ReferenceEngine
from polygrad_fast.sampling.torch_engine import TorchEngine
from polygrad_fast.sampling.triton_engine import TritonEngine
from polygrad_fast.structure import parts

ENGINES = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True)
class TrajectoryBatch:
    """Imagined trajectories, raw or (with `normalized=True`) normalized."""

    observations: Tensor  # [B, H, S]
    actions: Tensor  # [B, H, A]
    rewards: Tensor  # [B, H]
    terminals: Tensor  # [B, H], 0/1 flags; with normalized=True the values as denoised
    chain_trajectories: Tensor | None = None  # [K or fewer, B, H, D], normalized, after each step
    chain_actions: Tensor | None = None  # [K or fewer, B, H, A]
    mean_change: Tensor | None = None
    """With action_update "exact" and more than one step, a scalar: by how much the policy's mean
    changed between the states of the last step but one, whose actions the denoiser saw last, and
    those returned; in standard deviations, root mean square over the batch. Actions and states have
    settled on each other where it is small."""

    def first_steps(self, horizon: int) -> TrajectoryBatch:
        """Return the first steps of all trajectories, without a chain."""
        return TrajectoryBatch(*(part[:, :horizon] for part in self._trajectories()))

    def finite(self) -> dict[str, Tensor]:
        """Return whether each part of the trajectories is finite, bool scalars by their names."""
        names = ("observations", "actions", "rewards", "terminals")
        finite = (torch.isfinite(part).all() for part in self._trajectories())
        return dict(zip(names, finite, strict=True))

    def check_finite(self) -> None:
        """Raise NonFiniteError where something imagined is not finite."""
        finite = self.finite()
        for name, fine in zip(finite, torch.stack(list(finite.values())).tolist(), strict=True):
            if not fine:
                raise NonFiniteError(f"the imagined {name} are not finite")

    @classmethod
    def joined(cls, batches: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
        """Return all trajectories in one batch, without chains."""
        parts = zip(*(batch._trajectories() for batch in batches), strict=True)
        return cls(*(torch.cat(part) for part in parts))

    def _trajectories(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.observations, self.actions, self.rewards, self.terminals


class PolicyGuidedSampler:
    """Diffuse random trajectories into on-policy ones (Algorithm 2).

    The sampler holds the modules it is given and reads their current weights and moments at every
    call. Threads may share it: their calls wait for each other. A copy or an unpickled sampler is
    built anew, with its own graphs and buffers.

    The engines "torch" and "triton" fold this library's networks as their constructors make them.
    Any other module, also one with a hook, a parametrization or a replaced part (LoRA), is called
    as it is, which "triton" refuses. Such a change is noticed at the next sample (about 2 us per
    part of the networks), and the engine built anew.

    Args:
        denoiser: eps_theta, a `polygrad_fast.Denoiser`.
        policy: a `polygrad_fast.Policy`; it and the denoiser are called once here, to check them.
        schedule: the K diffusion steps of training; `SamplerConfig.num_inference_steps` samples in
            fewer of them.
        normalizer: moments of observations, actions, rewards and terminals.
        config: the sampler's options; default `SamplerConfig.official()`.
        engine: "reference" is plain PyTorch and reads like the paper; "torch" the same mathematics,
            optimised, on a CPU and on a GPU; "triton" fused kernels in one CUDA graph; "auto" is
            triton on a GPU where it can, else torch (one warning says why).
        dtype: "float32", "tf32", "float16" or "bfloat16" (or torch's dtype of that name): the
            denoiser's arithmetic; states and actions stay in float32, and the reference engine
            computes in float32 only. "auto" is float32 on a CPU, and on a GPU float16, as the
            released code's autocast.
        device: "auto" and None are the denoiser's device.
        action_bounds: (low, high) of the raw actions, [A] or scalars; needed for
            `denoiser_actions="clipped"`.

    Raises:
        InputError: an option the engine does not offer, modules whose dimensions differ, or a
            denoiser, policy or normalizer that cannot be used as one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        policy: Policy,
        schedule: NoiseSchedule,
        normalizer: Normalizer,
        config: SamplerConfig | None = None,
        engine: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = "auto",
        action_bounds: tuple | None = None,
    ):
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
        if isinstance(dtype, torch.dtype):
            dtype = str(dtype).removeprefix("torch.")
        if not isinstance(dtype, str):
            raise InputError(f"dtype must be a name or a torch.dtype, got {dtype!r}")
        for name, value, kind in (
            ("schedule", schedule, NoiseSchedule),
            ("config", config, SamplerConfig),
        ):
            if not (isinstance(value, kind) or (value is None and name == "config")):
                raise InputError(f"{name} must be a {kind.__name__}, got {value!r}")
        self.config = config if config is not None else SamplerConfig.official()
        check_normalizer(normalizer)
        device = common_device(device, denoiser, policy, normalizer)
        check_modules(denoiser, policy, schedule, normalizer, self.config, engine, device)
        if action_bounds is not None:
            action_bounds = check_bounds(action_bounds, denoiser.action_dim, device)
        elif self.config.denoiser_actions == "clipped":
            raise InputError(
                "action_bounds must be a pair (low, high) with denoiser_actions='clipped', got None"
            )
        self.components = SamplerComponents(
            denoiser,
            policy,
            schedule.to(device),
            normalizer,
            self.config,
            device,
            action_bounds,
        )
        self._asked = engine, dtype
        self._lock = threading.Lock()  # the engines' buffers serve one call at a time
        self._build()

    def __reduce__(self):
        c = self.components
        modules = c.denoiser, c.policy, c.schedule, c.normalizer
        options = self.config, *self._asked, "auto", c.action_bounds  # on the modules' device
        return PolicyGuidedSampler, (*modules, *options)

    def _build(self) -> None:
        """Build the engine for the modules as they are now."""
        c, (engine, dtype) = self.components, self._asked
        structure = _structure(c)
        self.engine, self._engine = _build_engine(engine, c, _resolve_dtype(dtype, engine, c))
        self._built_for = structure

    def sample(
        self,
        initial_observations: Tensor | np.ndarray | Sequence,
        guidance_scale: float | Tensor = 0.005,
        generator: torch.Generator | None = None,
        noise: SampleNoise | None = None,
        normalized: bool = False,
        return_chain: bool | int = False,
        check_finite: bool = True,
    ) -> TrajectoryBatch:
        """Imagine one on-policy trajectory from each initial observation (Algorithm 2).

        The check that observations are finite reads one number on the host, so that this
        synchronizes with a GPU unless `check_finite` is False; it may not be captured. An ambient
        autocast has no effect.

        Without `noise`, normals are drawn from `generator` (default: torch's) in the released
        code's order: initial states, initial actions, then per step states and actions (the latter
        not in the last step, and only for action_update "score" and "sample"). With "exact" the
        initial actions are xi: the actions returned are mean + std xi of the policy at the
        observations returned.

        Args:
            initial_observations: s0 [B, S], raw, or normalized with `normalized=True`: a tensor or
                array of floating point, or a list of observations.
            guidance_scale: delta >= 0, in squared raw actions; a tensor (one element) is not read
                on the host. Only action_update "score" uses it.
            generator: source of the normals, on the sampler's device.
            noise: every normal, given by the caller, as tensors or arrays.
            normalized: the input is normalized and all results shall be.
            return_chain: also return states and actions after each step, or after each of this
                many last ones.
            check_finite: False for observations that are known to be finite.

        Raises:
            InputError: wrong shape or dtype, B = 0, a value that is not finite, noise of other
                shapes, modules that were changed so that the engine asked for refuses them, or a
                denoiser or policy that returns something else than its protocol says.
        """
        with annotate("sample"):
            with annotate("check_inputs"):
                c = self.components
                s0 = check_observations(initial_observations, c, check_finite)
                guidance_scale = check_guidance_scale(guidance_scale)
                check_generator(generator, c.device)
                check_chain(return_chain, c.num_steps)
                if noise is not None:
                    noise = check_noise(noise, len(s0), c)
            s0_norm = s0 if normalized else self.components.normalizer.normalize(s0, "observations")
            autocast_off = torch.autocast(c.device.type, enabled=False)
            with self._lock, torch.inference_mode(False), torch.no_grad(), autocast_off:
                if _structure(self.components) != self._built_for:
                    self._build()
                exact, settles = c.config.action_update == "exact", self._engine.settles
                compares = exact and c.num_steps > 1 and not settles
                kept = c.chain_length(return_chain)
                trajectory, actions, chain = self._engine.sample(
                    s0_norm, guidance_scale, generator, noise, max(kept, 2) if compares else kept
                )
                mean_change = trajectory.new_zeros(()) if settles else None
                with annotate("results"):
                    if compares:
                        mean_change = _mean_change(c, trajectory, *chain[1][-2:])
                        chain = tuple(part[-kept:] for part in chain) if kept else None
                    return self._to_batch(s0, trajectory, actions, chain, mean_change, normalized)

    def _to_batch(self, s0, trajectory, actions, chain, mean_change, normalized) -> TrajectoryBatch:
        observations = trajectory[..., : self.components.observation_dim]
        rewards, terminals = trajectory[..., -2], trajectory[..., -1]
        if not normalized:
            observations = self.components.normalizer.unnormalize(observations, "observations")
            observations[:, 0] = s0  # exact, not through the normalizer and back
            actions = self.components.normalizer.unnormalize(actions, "actions")
            rewards = self.components.normalizer.unnormalize(rewards, "rewards")
            flags = self.components.normalizer.unnormalize(terminals, "terminals") > 0.5
            terminals = flags.to(trajectory.dtype)
        chains = chain or (None, None)
        return TrajectoryBatch(observations, actions, rewards, terminals, *chains, mean_change)


def _mean_change(
    components: SamplerComponents, states: Tensor, before: Tensor, after: Tensor
) -> Tensor:
    """Return by how much actions u = mean + std xi changed, in standard deviations at the final
    states [B, H, D], root mean square: a scalar. All are normalized; xi is the same in both."""
    c = components
    if why_foreign(c.policy) is None:
        std = c.policy.std
    else:
        observations = states[..., : c.observation_dim]
        _, std = policy_moments(c.policy, c.normalizer, observations, normalized=True)
    return ((after - before) * c.normalizer.actions_scale / std).square().mean().sqrt()


def _structure(components: SamplerComponents) -> tuple:
    """Return what an engine was built for: it folds the very parts that are there, and fixes the
    policy's two settings in its graphs."""
    denoiser, policy = components.denoiser, components.policy
    foreign_denoiser = why_foreign(denoiser) is not None
    foreign_policy = why_foreign(policy, components.config.update_states) is not None
    return (
        None if foreign_denoiser else parts(denoiser),
        None if foreign_policy else (parts(policy), policy.min_std, policy.normed_inputs),
    )


def _resolve_dtype(dtype: str, engine: str, components: SamplerComponents) -> str:
    """Return the dtype that "auto" stands for."""
    if dtype != "auto":
        return dtype
    half = components.device.type == "cuda" and engine != "reference"
    return "float16" if half and why_foreign(components.denoiser) is None else "float32"


def _build_engine(name: str, components: SamplerComponents, dtype: str) -> tuple[str, Engine]:
    """Return the engine's name, resolved, and the engine."""
    if name == "reference":
        if dtype != "float32":
            raise InputError(
                f"dtype must be 'auto' or 'float32' with engine 'reference', got {dtype!r}"
            )
        return name, ReferenceEngine(components)
    if name == "triton" or (name == "auto" and components.device.type == "cuda"):
        try:
            return "triton", TritonEngine(components, dtype)
        except InputError as error:
            if name == "triton":
                raise
            warnings.warn(f"engine 'auto' falls back to 'torch': {error}", stacklevel=4)
    return "torch", TorchEngine(components, dtype)
