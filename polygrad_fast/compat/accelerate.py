"""Sampling of a live diffusion model of the released code by this library's engines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.compat.guidance_options import GuidanceOptions, check_call, sampler_config
from polygrad_fast.compat.live import LiveDenoiser, LivePolicy, dropout_is_active, moments
from polygrad_fast.config import SamplerConfig
from polygrad_fast.diffusion.ddpm import TABLES, NoiseSchedule
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.sampling import PolicyGuidedSampler, SampleNoise

DIFFUSION_ATTRIBUTES = (
    "model",
    "horizon",
    "observation_dim",
    "action_dim",
    "n_timesteps",
    "predict_epsilon",
    "clip_denoised",
    "action_condition_noise_scale",
    *TABLES,
)
MAX_SAMPLERS = 8
"""Samplers kept, one for each combination of options."""
_OWN_ATTRIBUTES = ("diffusion_model", "engine", "dtype", "replaced_forward")


@contextlib.contextmanager
def _own_modes() -> Iterator[None]:
    """Turn the caller's inference mode, gradients and autocast off within the block."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


class AcceleratedDiffusion:
    """A live `GaussianDiffusion` of the released code, sampled by this library's engines.

    Called as the diffusion model is, it returns what that returns: x [B, H, D] and actions
    [B, H, A], normalized, the list `seq`, and the metrics. Every other attribute is the diffusion
    model's own, read and set there. Weights, moments, guidance scale and schedule are read anew at
    every call; samplers, and with them CUDA graphs, are kept as long as options, shapes and the
    networks' structure stay. Calls from several threads run one after the other.

    What the engines lack runs in the released code's own sampler, with one warning per reason:
    conditions at other times than 0, another `horizon` than the network's, `n_timesteps` other than
    the tables' length, active dropout, a single diffusion step, and, without a policy,
    `clip_denoised` or an `action_condition_noise_scale`.

    With gradients enabled, the actions carry the autograd graph of the last step's clip to the
    policy's parameters, as in the released code: in a loss, clipped actions move with the bounds.
    On a GPU the engines "torch" and "triton" draw other random numbers from the same seed.

    Args:
        diffusion_model: the live object.
        engine, dtype: as in `PolicyGuidedSampler`.

    Raises:
        InputError: another object, a network that is not one of the released two, or an engine
            that cannot run here.
    """

    def __init__(self, diffusion_model: nn.Module, engine: str = "auto", dtype: str = "auto"):
        for name in DIFFUSION_ATTRIBUTES:
            if not hasattr(diffusion_model, name):
                raise InputError(
                    f"diffusion_model must be a GaussianDiffusion of the released code, got a "
                    f"{type(diffusion_model).__name__}, which has no attribute {name!r}"
                )
        self.diffusion_model, self.engine, self.dtype = diffusion_model, engine, dtype
        self._reasons_told: set[str] = set()
        self._lock = threading.RLock()
        self.replaced_forward: Callable | None = None  # a forward of its own, by `install`
        with _own_modes():
            self._link()
            self._sampler(self._world_model_config(), None)  # so that errors come now

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.diffusion_model, name)
        if not inspect.ismethod(value):
            return value

        @functools.wraps(value)
        def method(*args, **kwargs):
            result = value(*args, **kwargs)
            return self if result is self.diffusion_model else result  # .to(), .eval()

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN_ATTRIBUTES or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.diffusion_model, name, value)

    def __reduce__(self):
        """Copies and pickles accelerate a copy of the diffusion model."""
        return accelerate, (self.diffusion_model, self.engine, self.dtype)

    def forward(self, *args, **kwargs):
        """Return what a call returns."""
        return self(*args, **kwargs)

    def __call__(
        self,
        cond: dict[int, Tensor],
        act: Tensor | None = None,
        normalizer: Any = None,
        policy: Callable | None = None,
        horizon: int | None = None,
        return_sequence: bool = False,
        verbose: bool = True,
        return_chain: bool = False,
        **guidance_options: Any,
    ) -> tuple[Tensor, Tensor | None, list[np.ndarray], dict[str, float] | float]:
        """Sample trajectories that start at the given observations.

        Args:
            cond: {0: normalized observations [B, S]}.
            act: normalized actions [B, H, A] of a call without policy; not read with one.
            normalizer: the released `DatasetNormalizer`, or another whose maps are affine.
            policy: `forward_actor` of the released actor-critic, or another function that returns
                Gaussian distributions; None: the world model alone, under the actions `act`.
            horizon: the model's.
            return_sequence: return the states after each step in `seq`, as numpy arrays.
            verbose, return_chain: without effect, as in the released code.
            guidance_options: those of `GuidanceOptions`; only with a policy.

        Returns:
            x [B, H, D], actions [B, H, A] (None without a policy), seq, and metrics of the last
            step's change: avg_change, max_change, min_change, std_change (0.0 without a policy).

        Raises:
            InputError: an option, object or shape that is not the released code's.
        """
        options = GuidanceOptions.from_call(guidance_options)
        check_call(cond, policy, guidance_options)
        needs_graph = torch.is_grad_enabled()
        with self._lock, _own_modes():
            self._refresh()
            reason = self._released_only(cond, policy, horizon)
            if reason is None and policy is None:
                return self._sample_world_model(cond[0], act, return_sequence)
            if reason is None:
                return self._sample_guided(
                    cond[0], normalizer, policy, options, return_sequence, needs_graph
                )
        if reason not in self._reasons_told:
            self._reasons_told.add(reason)
            warnings.warn(f"not accelerated, run by the released code: {reason}", stacklevel=2)
        model = self.diffusion_model
        forward = self.replaced_forward or functools.partial(type(model).forward, model)
        return forward(
            cond,
            act,
            normalizer,
            policy,
            horizon,
            return_sequence=return_sequence,
            **guidance_options,
        )

    def _released_only(self, cond, policy, horizon) -> str | None:
        """Return why the engines cannot run a call, or None."""
        model = self.diffusion_model
        horizon, own_horizon = horizon or model.horizon, self._denoiser.module.horizon
        if len(cond) > 1:
            return f"conditions at other times than 0, got {sorted(cond)}"
        if horizon != own_horizon:
            return f"horizon {horizon}, the network's is {own_horizon}"
        if model.n_timesteps != self._schedule.num_train_timesteps:
            return (
                f"n_timesteps {model.n_timesteps}, the schedule's tables have "
                f"{self._schedule.num_train_timesteps} rows"
            )
        if dropout_is_active(model):
            return "dropout is active (the model is in training mode)"
        if model.n_timesteps == 1:
            return "n_timesteps 1"
        if policy is None and model.clip_denoised:
            return "clip_denoised without a policy"
        if policy is None and model.action_condition_noise_scale:
            return (
                f"action_condition_noise_scale {model.action_condition_noise_scale} without a "
                f"policy"
            )
        return None

    def _sample_guided(self, s0, normalizer, policy, options, return_sequence, needs_graph):
        model = self.diffusion_model
        if normalizer is None:
            raise InputError("normalizer must be given where there is a policy, got None")
        pair = moments(normalizer, "actions", model.action_dim, self._device)
        self._normalizer.update({"actions": pair})
        if self._policy is None or not self._policy.refresh(policy):
            self._policy = LivePolicy(
                policy, model.observation_dim, model.action_dim, self._normalizer
            )
            self._policy.refresh(policy)
            self._samplers.clear()
        config = options.sampler_config(self._prediction_type)
        noise = None
        if config.action_update == "score" and options.action_noise_scale != 1.0:
            noise = self._draw_noise(len(s0), options.action_noise_scale)
        batch = self._sampler(config, self._policy.module).sample(
            s0,
            options.checked_guidance_scale(),
            noise=noise,
            normalized=True,
            return_chain=True if return_sequence else 2,
        )
        *_, before, x = batch.chain_trajectories
        seq = list(batch.chain_trajectories.cpu().numpy()) if return_sequence else []
        metrics = self._last_change(before, x, config.clip_state_change)
        actions = batch.actions
        if needs_graph and config.clip_std is not None:
            actions = self._with_graph(batch, normalizer, policy, config)
        return x.clone(), actions, seq, metrics

    def _with_graph(self, batch, normalizer, policy, config) -> Tensor:
        """Return the actions with the autograd graph of the last step's clip to the policy.

        The clip is computed again from the states and actions before the last step, in float32.
        """
        (*_, x, mean), (*_, u, _) = batch.chain_trajectories, batch.chain_actions
        observation_dim = self.diffusion_model.observation_dim
        states = mean
        if config.policy_input == "denoised":
            schedule, steps = self._schedule, torch.zeros(len(x), dtype=torch.long, device=x.device)
            states = self._denoiser.module(x, u * schedule.alphas_cumprod[0].sqrt(), steps)
            if config.prediction_type == "epsilon":
                states = (
                    schedule.sqrt_recip_alphas_cumprod[0] * x
                    - schedule.sqrt_recipm1_alphas_cumprod[0] * states
                )
            states[:, 0, :observation_dim] = x[:, 0, :observation_dim]
        with torch.enable_grad():
            distribution = policy(states[..., :observation_dim], normed_input=True)
            reach = config.clip_std * distribution.stddev
            raw = normalizer.unnormalize(u, "actions")
            raw = torch.clamp(raw, distribution.mean - reach, distribution.mean + reach)
            clipped = normalizer.normalize(raw, "actions")
            return batch.actions + (clipped - clipped.detach())  # the same numbers

    def _sample_world_model(self, s0, act, return_sequence):
        model = self.diffusion_model
        wanted = (len(s0), model.horizon, model.action_dim)
        if not torch.is_tensor(act) or tuple(act.shape) != wanted:
            got = f"shape {tuple(act.shape)}" if torch.is_tensor(act) else type(act).__name__
            raise InputError(
                f"act must be a tensor of shape {wanted} where there is no policy, got {got}"
            )
        batch = self._sampler(self._world_model_config(), None).sample(
            s0,
            noise=self._draw_world_model_noise(act),
            normalized=True,
            return_chain=True if return_sequence else 1,
        )
        seq = list(batch.chain_trajectories.cpu().numpy()) if return_sequence else []
        return batch.chain_trajectories[-1].clone(), None, seq, 0.0

    def _last_change(self, before: Tensor, after: Tensor, limit: float | None) -> dict[str, float]:
        """Return the released metrics: by how much the last step changed the normalized states.

        They are of the posterior mean before s0 is put back into it, whose float32 coefficients do
        not quite sum to 1.
        """
        schedule = self._schedule
        s0 = before[:, 0, : self.diffusion_model.observation_dim]
        mean = schedule.posterior_mean_coef1[0] * s0 + schedule.posterior_mean_coef2[0] * s0
        first = mean - s0
        change = after - before
        change[:, 0, : s0.shape[1]] = first if limit is None else first.clamp(-limit, limit)
        change.abs_()
        values = torch.stack([change.mean(), change.max(), change.min(), change.std()]).tolist()
        names = ("avg_change", "max_change", "min_change", "std_change")
        return dict(zip(names, values, strict=True))

    def _draw_noise(self, batch: int, action_noise_scale: float) -> SampleNoise:
        """Draw what a guided call draws, in its order, with scaled noise on the actions."""
        num_steps = self._schedule.num_train_timesteps
        noise = SampleNoise.draw(*self._shapes(batch), num_steps, self._device)
        return dataclasses.replace(noise, actions=noise.actions * action_noise_scale)

    def _draw_world_model_noise(self, act: Tensor) -> SampleNoise:
        """Draw what a call without policy draws, in its order, with normals for actions unused."""
        states, actions = self._shapes(len(act))
        randn = functools.partial(torch.randn, device=self._device)
        initial, drawn = randn(states), []
        for _ in range(self._schedule.num_train_timesteps):
            randn(actions)
            drawn.append(randn(states))
        no_noise = torch.zeros((), device=self._device).expand(len(drawn), *actions)
        return SampleNoise(initial, act.detach(), torch.stack(drawn), no_noise)

    def _shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        model = self.diffusion_model
        shape = batch, model.horizon
        return (*shape, model.observation_dim + 2), (*shape, model.action_dim)

    @property
    def _prediction_type(self) -> str:
        return "epsilon" if self.diffusion_model.predict_epsilon else "sample"

    def _world_model_config(self) -> SamplerConfig:
        return sampler_config(self._prediction_type, "none", None, "denoised", False, None)

    def _link(self) -> None:
        """Build our copies of the live denoiser and schedule, on the live model's device.

        An error leaves the copies that there are as they are.
        """
        model = self.diffusion_model
        device = model.betas.device
        denoiser, schedule = LiveDenoiser(model, device), self._read_schedule()
        normalizer = Normalizer(model.observation_dim, model.action_dim).to(device)
        with torch.random.fork_rng(devices=[]):
            unused_policy = GaussianPolicy(model.observation_dim, model.action_dim, hidden_dim=32)
        self._unused_policy = unused_policy.to(device).requires_grad_(False)
        self._device, self._denoiser, self._schedule = device, denoiser, schedule
        self._normalizer = normalizer
        self._policy: LivePolicy | None = None
        self._samplers: dict[tuple, PolicyGuidedSampler] = {}

    def _read_schedule(self) -> NoiseSchedule:
        """Return a copy of the live tables."""
        live = {name: getattr(self.diffusion_model, name) for name in TABLES}
        for name, table in live.items():
            if table.shape != live["betas"].shape or table.ndim != 1:
                raise InputError(
                    f"diffusion_model.{name} must have as many rows as betas, of shape "
                    f"{tuple(live['betas'].shape)}, got {tuple(table.shape)}"
                )
        return NoiseSchedule(**{name: table.detach().clone() for name, table in live.items()})

    def _tables_changed(self) -> bool:
        """Return whether a table has changed: the engines keep them as constants."""
        return not all(
            torch.equal(getattr(self.diffusion_model, name), getattr(self._schedule, name))
            for name in TABLES
        )

    def _refresh(self) -> None:
        model = self.diffusion_model
        if model.betas.device != self._device or not self._denoiser.refresh(model):
            self._link()
        elif self._tables_changed():
            self._schedule = self._read_schedule()
            self._samplers.clear()

    def _sampler(self, config: SamplerConfig, policy: nn.Module | None) -> PolicyGuidedSampler:
        """Return the sampler with these options, built where there is none yet."""
        key = config, policy is None, self.engine, self.dtype
        sampler = self._samplers.pop(key, None)
        if sampler is None:
            while len(self._samplers) >= MAX_SAMPLERS:
                self._samplers.pop(next(iter(self._samplers)))
            sampler = PolicyGuidedSampler(
                self._denoiser.module,
                self._unused_policy if policy is None else policy,
                self._schedule,
                self._normalizer,
                config,
                engine=self.engine,
                dtype=self.dtype,
            )
        self._samplers[key] = sampler
        return sampler


def accelerate(
    diffusion_model: nn.Module, engine: str = "auto", dtype: str = "auto"
) -> AcceleratedDiffusion:
    """Return a callable that samples a live `GaussianDiffusion` of the released code faster.

    See `AcceleratedDiffusion` for arguments, errors and differences.
    """
    if isinstance(diffusion_model, AcceleratedDiffusion):
        diffusion_model = diffusion_model.diffusion_model
    return AcceleratedDiffusion(diffusion_model, engine, dtype)
