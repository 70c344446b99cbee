"""Sampling of a live diffusion model of the released code by this library's engines."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.compat.live import LiveDenoiser, LivePolicy, moments
from polygrad_fast.config import SamplerConfig
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.sampling import PolicyGuidedSampler, SampleNoise
from polygrad_fast.schedule import NoiseSchedule

TABLES = tuple(field.name for field in fields(NoiseSchedule))
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
ACTION_UPDATES = {"grad": "score", "sample": "sample", "none": "none"}
POLICY_INPUTS = {"recon": "denoised", "posterior_mean": "posterior_mean"}


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of a guided call, with the released code's defaults."""

    guidance_scale: float | Tensor = 1.0
    action_noise_scale: float = 1.0
    clip_std: float | None = None
    states_for_guidance: str = "recon"
    update_states: bool = False
    guidance_type: str = "grad"
    clip_state_change: float = 1.0

    @classmethod
    def from_call(cls, options: dict[str, Any]) -> GuidanceOptions:
        """Check names and values of a call's keyword arguments."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise InputError(f"unknown option {name!r}, wanted one of {sorted(known)}")
        result = cls(**options)
        for name, allowed in (
            ("guidance_type", ACTION_UPDATES),
            ("states_for_guidance", POLICY_INPUTS),
        ):
            got = getattr(result, name)
            if got not in list(allowed):
                raise InputError(f"{name} must be one of {list(allowed)}, got {got!r}")
        scale = result.action_noise_scale
        if not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
            raise InputError(f"action_noise_scale must be a finite number, got {scale!r}")
        return result

    def sampler_config(self, prediction_type: str) -> SamplerConfig:
        """Return our options for the same mathematics."""
        return _sampler_config(
            prediction_type,
            ACTION_UPDATES[self.guidance_type],
            _limit("clip_std", self.clip_std),
            POLICY_INPUTS[self.states_for_guidance],
            self.guidance_type == "grad" and bool(self.update_states),
            _limit("clip_state_change", self.clip_state_change),
        )


@functools.lru_cache  # building a configuration takes a millisecond
def _sampler_config(
    prediction_type: str,
    action_update: str,
    clip_std: float | None,
    policy_input: str,
    update_states: bool,
    clip_state_change: float | None,
) -> SamplerConfig:
    return SamplerConfig.official(
        prediction_type=prediction_type,
        action_update=action_update,
        clip_std=clip_std,
        policy_input=policy_input,
        update_states=update_states,
        clip_state_change=clip_state_change,
    )


class AcceleratedDiffusion:
    """A live `GaussianDiffusion` of the released code, sampled by this library's engines.

    Called as the diffusion model is, it returns what that returns: x [B, H, D] and actions
    [B, H, A], normalized, the list `seq`, and the metrics. Every other attribute is the diffusion
    model's own. Weights, moments and guidance scale are read anew at every call; samplers, and
    with them CUDA graphs, are kept as long as options and shapes stay.

    What the engines lack runs in the released code's own sampler, with one warning per reason:
    conditions at other times than 0, another `horizon` than the model's, active dropout, a single
    diffusion step, and, without a policy, `clip_denoised` or an `action_condition_noise_scale`.

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
                    f"wanted a GaussianDiffusion of the released code, got a "
                    f"{type(diffusion_model).__name__}, which has no attribute {name!r}"
                )
        self.diffusion_model, self.engine, self.dtype = diffusion_model, engine, dtype
        self._reasons_told: set[str] = set()
        with torch.inference_mode(False):
            self._link()
            self._sampler(self._world_model_config(), None)  # so that errors come now

    def __getattr__(self, name: str) -> Any:
        if name == "diffusion_model":  # not set yet: a copy is being made
            raise AttributeError(name)
        value = getattr(self.diffusion_model, name)
        if not inspect.ismethod(value):
            return value

        @functools.wraps(value)
        def method(*args, **kwargs):
            result = value(*args, **kwargs)
            return self if result is self.diffusion_model else result  # .to(), .eval()

        return method

    def __reduce__(self):
        # Copies and pickles of a diffusion model that carries this object get their class's own
        # method: their attributes are not there yet when this is looked up.
        return getattr, (self.diffusion_model, "forward")

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
        if policy is None and guidance_options:
            raise InputError(
                f"{sorted(guidance_options)} need a policy, got policy=None (the released code "
                f"takes no guidance options without one)"
            )
        if not isinstance(cond, dict) or 0 not in cond:
            raise InputError(
                f"cond must be a dictionary with the observations [B, S] under 0, got "
                f"{list(cond) if isinstance(cond, dict) else type(cond).__name__}"
            )
        if not torch.is_tensor(cond[0]) or cond[0].ndim != 2:
            shape = tuple(cond[0].shape) if torch.is_tensor(cond[0]) else type(cond[0]).__name__
            raise InputError(f"cond[0] must be a tensor [B, S] of observations, got {shape}")
        reason = self._released_only(cond, policy, horizon)
        if reason is not None:
            if reason not in self._reasons_told:
                self._reasons_told.add(reason)
                message = f"not accelerated, run by the released code: {reason}"
                warnings.warn(message, stacklevel=2)
            return type(self.diffusion_model).forward(
                self.diffusion_model,
                cond,
                act,
                normalizer,
                policy,
                horizon,
                return_sequence=return_sequence,
                **guidance_options,
            )
        needs_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():
            self._refresh()
            if policy is None:
                return self._sample_world_model(cond[0], act, return_sequence)
            return self._sample_guided(
                cond[0], normalizer, policy, options, return_sequence, needs_graph
            )

    def _released_only(self, cond, policy, horizon) -> str | None:
        """Return why the engines cannot run a call, or None."""
        model = self.diffusion_model
        if len(cond) > 1:
            return f"conditions at other times than 0, got {sorted(cond)}"
        if horizon and horizon != model.horizon:
            return f"horizon {horizon}, the model's is {model.horizon}"
        if any(module.p > 0 and module.training for module in self._dropouts):
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
            raise InputError("a policy needs the normalizer, got None")
        pair = moments(normalizer, "actions", model.action_dim, self._device)
        self._normalizer.update({"actions": pair})
        if self._policy is None or not self._policy.fits(policy):
            self._policy = LivePolicy(
                policy, model.observation_dim, model.action_dim, self._normalizer
            )
            self._samplers.clear()
        self._policy.refresh()
        config = options.sampler_config(self._prediction_type)
        noise = None
        if config.action_update == "score" and options.action_noise_scale != 1.0:
            noise = self._draw_noise(len(s0), options.action_noise_scale)
        guidance_scale = options.guidance_scale
        if torch.is_tensor(guidance_scale):
            guidance_scale = guidance_scale.detach()
        batch = self._sampler(config, self._policy.module).sample(
            s0,
            guidance_scale,
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
        states, actions = self._shapes(batch)
        randn = functools.partial(torch.randn, device=self._device)
        initial = randn(states), randn(actions)
        num_steps = self._schedule.num_train_timesteps
        drawn = [(randn(states), randn(actions)) for _ in range(num_steps - 1)]
        drawn.append((randn(states), torch.zeros(actions, device=self._device)))
        trajectories, action_noise = map(torch.stack, zip(*drawn, strict=True))
        return SampleNoise(*initial, trajectories, action_noise * action_noise_scale)

    def _draw_world_model_noise(self, act: Tensor) -> SampleNoise:
        """Draw what a call without policy draws, in its order: it noises the actions too, by 0."""
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
        return _sampler_config(self._prediction_type, "none", None, "denoised", False, None)

    def _link(self) -> None:
        """Build our copies of the live denoiser and schedule, on the live model's device."""
        model = self.diffusion_model
        self._device = model.betas.device
        self._denoiser = LiveDenoiser(model, self._device)
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        self._normalizer = Normalizer(model.observation_dim, model.action_dim).to(self._device)
        with torch.random.fork_rng(devices=[]):
            unused = GaussianPolicy(model.observation_dim, model.action_dim, hidden_dim=32)
        self._unused_policy = unused.to(self._device).requires_grad_(False)
        self._policy: LivePolicy | None = None
        self._samplers: dict[tuple, PolicyGuidedSampler] = {}
        self._read_tables()

    def _read_tables(self) -> None:
        live = [getattr(self.diffusion_model, name) for name in TABLES]
        self._tables_read = [(table, table._version) for table in live]
        tables = {name: table.detach().clone() for name, table in zip(TABLES, live, strict=True)}
        self._schedule = NoiseSchedule(**tables)

    def _tables_changed(self) -> bool:
        """Whether a table may have changed, which the engines keep as constants."""
        live = [getattr(self.diffusion_model, name) for name in TABLES]
        return any(
            table is not read or table._version != version
            for table, (read, version) in zip(live, self._tables_read, strict=True)
        )

    def _refresh(self) -> None:
        model = self.diffusion_model
        if model.betas.device != self._device or not self._denoiser.refresh(model):
            self._link()
        elif self._tables_changed():
            self._read_tables()
            self._samplers.clear()

    def _sampler(self, config: SamplerConfig, policy: nn.Module | None) -> PolicyGuidedSampler:
        """Return the sampler with these options, built where there is none yet."""
        key = config, policy is None
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


def install(agent: nn.Module, engine: str = "auto", dtype: str = "auto") -> AcceleratedDiffusion:
    """Let a live `DiffusionWMAgent` of the released code imagine with this library's engines.

    The agent's diffusion model stays the object it is, with its parameters, buffers, `state_dict`,
    loss and training; only calling it is replaced, so that whoever holds it (the released trainer's
    `ema_model` is the same object) samples faster too. Copies and pickles of it are without.
    Installing again replaces the engine.

    Args:
        agent: has the attribute `diffusion_model`.
        engine, dtype: as in `PolicyGuidedSampler`.

    Returns:
        What is now called.

    Raises:
        InputError: as `AcceleratedDiffusion`, or another object; nothing was changed.
    """
    accelerated = accelerate(_diffusion_model(agent), engine, dtype)
    accelerated.diffusion_model.forward = accelerated
    return accelerated


def uninstall(agent: nn.Module) -> None:
    """Undo `install`; without effect where nothing is installed."""
    diffusion_model = _diffusion_model(agent)
    if isinstance(vars(diffusion_model).get("forward"), AcceleratedDiffusion):
        del diffusion_model.forward


def _diffusion_model(agent: nn.Module) -> nn.Module:
    try:
        return agent.diffusion_model
    except AttributeError:
        raise InputError(
            f"wanted a DiffusionWMAgent of the released code, got a {type(agent).__name__}, which "
            f"has no attribute 'diffusion_model'"
        ) from None


def _limit(name: str, value: float | None) -> float | None:
    """Return a bound as our options take it: infinity is no bound."""
    if value is None or value == math.inf:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{name} must be a positive number or None, got {value!r}")
    return float(value)
