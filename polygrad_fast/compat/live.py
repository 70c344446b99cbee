"""This library's modules kept equal to live objects of the released code.

Every `refresh` copies the current numbers to fixed addresses: however the live tensors were changed
(an optimizer, `.data =`, `load_state_dict`, new moments), the copies are right and captured graphs
stay valid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.compat.weights import export_denoiser, load_denoiser, load_policy
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import EPSILON, Normalizer
from polygrad_fast.policy import GaussianPolicy

PROBE_TOLERANCE = 1e-3
"""Largest relative difference between a live module's output and our copy's; another activation or
layer order makes a far larger one."""


def released_network(diffusion_model: Any) -> nn.Module:
    """Return a diffusion model's network, out of `torch.compile`'s wrapper."""
    return getattr(diffusion_model.model, "_orig_mod", diffusion_model.model)


class LiveDenoiser:
    """Our copy of a live denoiser.

    Attributes:
        module: the copy, on `device`.

    Raises:
        InputError: the live network is not one of the released two, or computes something else.
    """

    def __init__(self, diffusion_model: Any, device: torch.device):
        self.device = device
        live = released_network(diffusion_model)
        weights = live.state_dict()
        dims = (
            diffusion_model.observation_dim,
            diffusion_model.action_dim,
            diffusion_model.horizon,
        )
        self._signature = _signature(weights)
        with torch.random.fork_rng(devices=[]):  # new weights are drawn, only to be overwritten
            module = load_denoiser(weights, *dims, num_heads=_num_heads(live))
        self.module = module.to(device).requires_grad_(False)
        self._copies = export_denoiser(module.state_dict(), module)
        self._compare(live, diffusion_model.n_timesteps)

    def refresh(self, diffusion_model: Any) -> bool:
        """Copy the live network's weights, or return False where its names or shapes are others;
        no host synchronization."""
        weights = released_network(diffusion_model).state_dict()
        if self._signature != _signature(weights):
            return False
        torch._foreach_copy_(list(self._copies.values()), [weights[n] for n in self._copies])
        return True

    @torch.no_grad()
    def _compare(self, live: nn.Module, num_steps: int) -> None:
        m, generator = self.module, torch.Generator().manual_seed(0)
        inputs = (
            torch.randn(2, m.horizon, m.state_dim, generator=generator).to(self.device),
            torch.randn(2, m.horizon, m.action_dim, generator=generator).to(self.device),
            torch.tensor([0, num_steps - 1], device=self.device),
        )
        modes = [(module, module.training) for module in live.modules()]
        live.eval()  # dropout
        try:
            wanted = live(*inputs)
        except Exception as error:
            raise InputError(
                f"diffusion_model.model cannot be called: {_first_line(error)}"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        if not _same(m(*inputs), wanted):
            raise InputError(
                f"diffusion_model.model has the weights of a released network, but this "
                f"{type(live).__name__} computes something else with them, for "
                f"instance by another activation; wanted the released forward pass"
            )


class LivePolicy:
    """Our copy of a live actor, or, where the policy is of another kind, the policy as it is.

    Args:
        policy: called as policy(observations, normed_input=True), returning a Gaussian
            distribution of raw actions. The bound method `forward_actor` of a released actor-critic
            is copied.
        observation_dim, action_dim: S and A.
        normalizer: ours, whose observation moments `refresh` sets to those the live actor-critic
            uses.

    Attributes:
        module: what our samplers evaluate.

    Raises:
        InputError: the policy cannot be called so, or returns another distribution.
    """

    def __init__(
        self,
        policy: Callable,
        observation_dim: int,
        action_dim: int,
        normalizer: Normalizer,
    ):
        self.normalizer = normalizer
        self.device = normalizer.observations_mean.device
        generator = torch.Generator().manual_seed(0)
        self._probe = torch.randn(3, observation_dim, generator=generator).to(self.device)
        mean, std = self._evaluate(policy, action_dim)
        self.policy, self.signature = policy, _policy_signature(policy)
        self.module = _CalledPolicy(policy, observation_dim, action_dim)
        if self.signature is not None:
            try:
                copy = self._copy(policy.__self__)
            except InputError:  # an actor of another kind, to be called as it is
                copy = None
            if copy is not None and self._same_as_copy(copy, mean, std):
                self.module = copy
        self.is_copy = isinstance(self.module, GaussianPolicy)

    def fits(self, policy: Callable) -> bool:
        """Whether `refresh` suffices."""
        return policy == self.policy and _policy_signature(policy) == self.signature

    def refresh(self) -> None:
        """Copy the live actor's weights and the moments of the observations it reads."""
        if not self.is_copy:
            return
        owner = self.policy.__self__
        weights = owner.actor.state_dict()
        for name, tensor in self.module.network.state_dict().items():
            tensor.copy_(weights[f"model.{name}"])
        with torch.no_grad():
            self.module.log_std.copy_(owner.logstd._bias)
        if not owner.use_normed_inputs:
            self._read_observation_moments(owner)

    def _read_observation_moments(self, owner: Any) -> None:
        dim = self.normalizer.observation_dim
        pair = moments(owner.normalizer, "observations", dim, self.device)
        self.normalizer.update({"observations": pair})

    def _copy(self, owner: Any) -> GaussianPolicy:
        with torch.random.fork_rng(devices=[]):
            copy = load_policy(
                owner.actor.state_dict(),
                owner.logstd._bias.detach(),
                owner.min_std,
                self.normalizer,
                bool(owner.use_normed_inputs),
            )
        if not copy.normed_inputs:
            self._read_observation_moments(owner)
        return copy.to(self.device).requires_grad_(False)

    @torch.no_grad()
    def _same_as_copy(self, copy: GaussianPolicy, mean: Tensor, std: Tensor) -> bool:
        inputs = self._probe
        if not copy.normed_inputs:
            inputs = self.normalizer.unnormalize(inputs, "observations")
        return all(map(_same, copy.distribution(inputs), (mean, std)))

    @torch.no_grad()
    def _evaluate(self, policy: Callable, action_dim: int) -> tuple[Tensor, Tensor]:
        """Return mean and std [3, A] at the probe."""
        what = "policy, called as policy(observations, normed_input=True),"
        try:
            distribution = policy(self._probe, normed_input=True)
        except Exception as error:
            raise InputError(f"{what} failed: {_first_line(error)}") from error
        base = distribution
        if isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        if not isinstance(base, torch.distributions.Normal):
            raise InputError(
                f"{what} returned a {type(base).__name__}, wanted a Gaussian "
                f"(torch.distributions.Normal or an Independent of one)"
            )
        if tuple(base.mean.shape) != (len(self._probe), action_dim):
            raise InputError(
                f"{what} returned actions of shape {tuple(base.mean.shape)} for observations of "
                f"shape {tuple(self._probe.shape)}, wanted {(len(self._probe), action_dim)}"
            )
        return base.mean, base.stddev


class _CalledPolicy(nn.Module):
    """A live policy of another kind, in the form our samplers call."""

    normed_inputs = True

    def __init__(self, policy: Callable, observation_dim: int, action_dim: int):
        super().__init__()
        self.observation_dim, self.action_dim = observation_dim, action_dim
        object.__setattr__(self, "policy", policy)  # not ours: its weights are no part of this

    def distribution(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the raw actions at normalized observations."""
        distribution = self.policy(inputs, normed_input=True)
        return distribution.mean, distribution.stddev


def moments(normalizer: Any, field: str, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std [dim] of one field of a released `DatasetNormalizer`, or of any object
    whose `normalize(x, field)` and `unnormalize(x, field)` are affine and inverse to each other.

    Raises:
        InputError: they are not.
    """
    part = getattr(normalizer, "normalizers", {}).get(field)
    if type(part).__name__ == "GaussianNormalizer":
        return part.means_torch, part.stds_torch
    what = f"normalizer ({type(normalizer).__name__}), field {field!r}"
    points = torch.tensor([[0.0], [1.0], [-2.0]], device=device).expand(3, dim).contiguous()
    try:
        raw = normalizer.unnormalize(points, field)
        back = normalizer.normalize(raw, field)
    except Exception as error:
        raise InputError(
            f"{what}: wanted normalize(x, field) and unnormalize(x, field) as in the released "
            f"DatasetNormalizer, but the call failed: {_first_line(error)}"
        ) from error
    offset, scale = raw[0], raw[1] - raw[0]
    if not (_same(raw[2], offset - 2.0 * scale) and _same(back, points)):
        raise InputError(f"{what}: wanted an affine map and its inverse, got another")
    return offset, (scale - EPSILON).clamp(min=0.0)


def _signature(weights: dict[str, Tensor]) -> tuple:
    return tuple((name, tensor.shape) for name, tensor in weights.items())


def _policy_signature(policy: Callable) -> tuple | None:
    """Return what must stay as it is for a copy to stay right; None where the policy is not a
    released actor-critic's `forward_actor`."""
    owner = getattr(policy, "__self__", None)
    names = ("actor", "logstd", "min_std", "use_normed_inputs", "normalizer")
    if getattr(policy, "__name__", "") != "forward_actor" or not all(
        hasattr(owner, name) for name in names
    ):
        return None
    return _signature(owner.actor.state_dict()), owner.min_std, owner.use_normed_inputs


def _num_heads(live: nn.Module) -> int:
    """Return a live transformer's number of attention heads; 4 for other networks."""
    heads = {module.n_head for module in live.modules() if hasattr(module, "n_head")}
    return heads.pop() if heads else 4


def _same(a: Tensor, b: Tensor) -> bool:
    limit = PROBE_TOLERANCE * max(1e-6, b.abs().max().item())
    return torch.allclose(a, b, rtol=0.0, atol=limit, equal_nan=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
