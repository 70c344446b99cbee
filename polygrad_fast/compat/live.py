"""This library's modules kept equal to live objects of the released code.

Every `refresh` copies the current numbers to fixed addresses: however the live tensors were changed
(an optimizer, `.data =`, `load_state_dict`, new moments), the copies are right and captured graphs
stay valid. What a live object computes with its numbers is compared once with our copy, on a twin
with random weights (a layer of zeros would hide the others), and again where its structure changes.
Call all of it under `torch.no_grad()`.
"""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from polygrad_fast.compat.weights import export_denoiser, load_denoiser, load_policy
from polygrad_fast.errors import InputError, first_line
from polygrad_fast.normalizer import EPSILON, Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.structure import is_setting, structure

PROBE_TOLERANCE = 5e-6
"""Largest relative difference between a live module's output and our copy's: mostly they are equal
to the bit, and the tanh approximation of GELU makes 2e-5."""
PROBE_SCALES = (1.0, 10.0, 100.0, 1000.0)
"""Scales of the inputs compared, so that limits on large inputs are seen too."""
NORMALIZER_PROBES = (0.0, 1024.0, 1.0, -2.0, -100.0)
"""Normalized values at which a map's offset and slope are read (the first two, far apart because
their difference is rounded) and its form is checked."""
NORMALIZER_TOLERANCE = 1e-4
"""Largest difference from an affine map and its inverse, in normalized units per unit."""
ACTOR_SETTINGS = (
    "action_dim",
    "actor_dist",
    "init_std",
    "learned_std",
    "min_std",
    "use_normed_inputs",
)
"""What the released `forward_actor` reads besides weights and normalizer."""


def released_network(diffusion_model: Any) -> nn.Module:
    """Return a diffusion model's network, out of `torch.compile`'s wrapper."""
    return getattr(diffusion_model.model, "_orig_mod", diffusion_model.model)


def dropout_is_active(module: nn.Module) -> bool:
    """Return whether a part of a module drops values now.

    A part is a dropout layer, or an attention that carries its rate as the attribute `dropout`.
    """
    for part in module.modules():
        rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
        if part.training and isinstance(rate, numbers.Real) and rate > 0:
            return True
    return False


class LiveDenoiser:
    """Our copy of a live denoiser.

    Attributes:
        module: the copy, on `device`.

    Raises:
        InputError: the live network is not one of the released two, or computes something else.
    """

    def __init__(self, diffusion_model: Any, device: torch.device):
        live = released_network(diffusion_model)
        self._signature = _denoiser_signature(diffusion_model)
        with torch.random.fork_rng(devices=[]):  # new weights are drawn, only to be overwritten
            module = load_denoiser(
                live.state_dict(),
                diffusion_model.observation_dim,
                diffusion_model.action_dim,
                diffusion_model.horizon,
                num_heads=_num_heads(live),
            )
        module.requires_grad_(False)
        _compare_denoisers(live, module, diffusion_model.n_timesteps)
        self.module = module.to(device)
        self._copies = export_denoiser(module.state_dict(), module)
        self.refresh(diffusion_model)

    def refresh(self, diffusion_model: Any) -> bool:
        """Copy the live network's weights, or return False where its structure, names, shapes or
        dimensions are others; no host synchronization."""
        if self._signature != _denoiser_signature(diffusion_model):
            return False
        weights = released_network(diffusion_model).state_dict()
        torch._foreach_copy_(list(self._copies.values()), [weights[n] for n in self._copies])
        return True


def _compare_denoisers(live: nn.Module, module: nn.Module, num_steps: int) -> None:
    """Raise InputError unless both compute the same with random weights.

    They are compared on the CPU, whose float32 products are not TF32. `module` keeps the random
    weights.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor(PROBE_SCALES)[:, None, None]
    inputs = (
        scales * torch.randn(len(scales), module.horizon, module.state_dim, generator=generator),
        scales * torch.randn(len(scales), module.horizon, module.action_dim, generator=generator),
        torch.tensor([0, min(1, num_steps - 1), num_steps // 2, num_steps - 1]),
    )
    try:
        twin = copy.deepcopy(live).float().cpu().eval()
        weights = _randomize(twin)
        wanted = twin(*inputs)
    except Exception as error:
        raise InputError(f"diffusion_model.model cannot be called: {first_line(error)}") from error
    for name, tensor in export_denoiser(module.state_dict(), module).items():
        tensor.copy_(weights[name])
    if not _same(module(*inputs).flatten(1), wanted.flatten(1)):
        raise InputError(
            f"diffusion_model.model must compute what the released network of its names and shapes "
            f"does, got a {type(live).__name__} that computes something else, for instance by "
            f"another activation or a forward set on the object"
        )


class LivePolicy:
    """Our copy of a live actor, or, where the policy is of another kind, the policy as it is.

    Args:
        policy: called as policy(observations, normed_input=True), returning a Gaussian
            distribution of raw actions. The bound method `forward_actor` of a released actor-critic
            is copied, unless a subclass or the object overrides it or it computes something else.
        observation_dim, action_dim: S and A.
        normalizer: ours, whose observation moments `refresh` sets to those the live actor-critic
            uses.

    Attributes:
        module: what our samplers evaluate.
        is_copy: whether that is a copy.

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
        _check_policy(policy, observation_dim, action_dim, self.device)
        self.policy, self._signature = policy, _policy_signature(policy)
        copied = None if self._signature is None else self._copy()
        self.is_copy = copied is not None
        self.module = copied or _CalledPolicy(policy, observation_dim, action_dim)

    def refresh(self, policy: Callable) -> bool:
        """Copy the live actor's weights and the moments of the observations it reads, or return
        False where a new copy is needed."""
        if policy != self.policy or _policy_signature(policy) != self._signature:
            return False
        if not self.is_copy:
            return True
        owner = policy.__self__
        if not owner.use_normed_inputs:
            try:
                self._read_observation_moments(owner)
            except InputError:  # a map that only the live policy can apply
                return False
        weights = owner.actor.state_dict()
        for name, tensor in self.module.network.state_dict().items():
            tensor.copy_(weights[f"model.{name}"])
        self.module.log_std.copy_(owner.logstd._bias)
        return True

    def _read_observation_moments(self, owner: Any) -> None:
        dim = self.normalizer.observation_dim
        pair = moments(owner.normalizer, "observations", dim, self.device)
        self.normalizer.update({"observations": pair})

    def _copy(self) -> GaussianPolicy | None:
        """Return a copy of the live actor, None where it computes something else.

        They are compared in float64, which a GPU does not round to TF32.
        """
        owner, generator = self.policy.__self__, torch.Generator().manual_seed(0)
        scales = torch.tensor(PROBE_SCALES, dtype=torch.float64).repeat(4)[:, None]
        probe = torch.randn(len(scales), self.normalizer.observation_dim, generator=generator)
        probe = (scales * probe).to(self.device)
        twin = copy.copy(owner)
        parts = {name: copy.deepcopy(getattr(owner, name)) for name in ("actor", "logstd")}
        twin.__dict__["_modules"] = {**owner._modules, **parts}
        for part in parts.values():
            _randomize(part.float())
            part.double()
        try:
            distribution = self.policy.__func__(twin, probe, normed_input=True)
            wanted = distribution.mean, distribution.stddev
        except Exception:  # the live policy itself can be called
            return None
        try:
            with torch.random.fork_rng(devices=[]):
                copied = load_policy(
                    twin.actor.state_dict(),
                    twin.logstd._bias.detach(),
                    owner.min_std,
                    self.normalizer,
                    bool(owner.use_normed_inputs),
                )
            if not copied.normed_inputs:
                self._read_observation_moments(owner)
        except InputError:  # another network, or a map that only the live policy can apply
            return None
        copied.to(self.device).requires_grad_(False).double()
        inputs = probe
        if not copied.normed_inputs:
            inputs = self.normalizer.unnormalize(probe, "observations")
        same = all(map(_same, copied.distribution(inputs), wanted))
        return copied.float() if same else None


def _check_policy(
    policy: Callable, observation_dim: int, action_dim: int, device: torch.device
) -> None:
    """Raise InputError unless a policy returns Gaussian distributions of raw actions."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, observation_dim, generator=generator).to(device)
    what = "policy, called as policy(observations, normed_input=True),"
    try:
        distribution = policy(probe, normed_input=True)
    except Exception as error:
        raise InputError(f"{what} failed: {first_line(error)}") from error
    base = distribution
    if isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if not isinstance(base, torch.distributions.Normal):
        raise InputError(
            f"{what} must return a Gaussian (torch.distributions.Normal or an Independent of one), "
            f"got a {type(base).__name__}"
        )
    if tuple(base.mean.shape) != (len(probe), action_dim):
        raise InputError(
            f"{what} must return actions of shape {(len(probe), action_dim)} for observations of "
            f"shape {tuple(probe.shape)}, got {tuple(base.mean.shape)}"
        )


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
        InputError: they are not, or a slope is below the 1e-6 that our normalizer adds to every
            standard deviation.
    """
    parts = getattr(normalizer, "normalizers", None)
    part = parts.get(field) if isinstance(parts, Mapping) else None
    if type(part).__name__ == "GaussianNormalizer":
        return part.means_torch, part.stds_torch
    what = f"normalizer ({type(normalizer).__name__}), field {field!r}"
    points = torch.tensor(NORMALIZER_PROBES, device=device)[:, None].expand(-1, dim).contiguous()
    try:
        raw = normalizer.unnormalize(points, field)
        back = normalizer.normalize(raw, field)
    except Exception as error:
        raise InputError(
            f"{what} must offer normalize(x, field) and unnormalize(x, field) as the released "
            f"DatasetNormalizer, got an error: {first_line(error)}"
        ) from error
    offset, scale = raw[0], (raw[1] - raw[0]) / points[1]
    if not (scale >= 0.99 * EPSILON).all():  # a slope of 1e-6 comes out rounded
        raise InputError(
            f"{what}: unnormalize must have slopes of at least {EPSILON} in every dimension (0 is "
            f"a dimension that is constant in the data), got {scale.tolist()}"
        )
    line = offset + scale * points
    rounding = offset.abs() / scale  # of raw values, in normalized units
    limit = NORMALIZER_TOLERANCE * (1.0 + points.abs() + 0.1 * rounding)
    if not ((raw - line).abs() <= scale * limit).all():
        raise InputError(f"{what}: unnormalize must be an affine map, got another one")
    if not ((back - points).abs() <= limit).all():
        raise InputError(
            f"{what}: normalize must be the inverse of unnormalize and map {raw[2].tolist()} to 1, "
            f"got {back[2].tolist()}"
        )
    return offset, (scale - EPSILON).clamp(min=0.0)


def _denoiser_signature(diffusion_model: Any) -> tuple:
    """Return what must stay as it is for a copy of the network to stay right."""
    dims = diffusion_model.observation_dim, diffusion_model.action_dim
    return *dims, structure(released_network(diffusion_model))


def _policy_signature(policy: Callable) -> tuple | None:
    """Return what must stay as it is for a copy of the policy to stay right.

    None where the policy is not the `forward_actor` that a released actor-critic's class defines,
    for instance where a subclass or the object overrides it: comparing some outputs would not show
    where an override differs.
    """
    owner = getattr(policy, "__self__", None)
    defined = [base for base in type(owner).__mro__ if "forward_actor" in vars(base)]
    if not (
        isinstance(owner, nn.Module)
        and inspect.ismethod(policy)
        and len(defined) == 1
        and policy.__func__ is type(owner).forward_actor
        and all(hasattr(owner, name) for name in ("actor", "logstd", "normalizer"))
    ):
        return None
    settings = tuple(getattr(owner, name, None) for name in ACTOR_SETTINGS)
    if not is_setting(settings):
        return None
    return settings, structure(owner.actor), structure(owner.logstd)


def _num_heads(live: nn.Module) -> int:
    """Return a live transformer's number of attention heads; 4 for other networks."""
    heads = {module.n_head for module in live.modules() if hasattr(module, "n_head")}
    return heads.pop() if heads else 4


def _randomize(module: nn.Module) -> dict[str, Tensor]:
    """Draw a module's weights anew and return its `state_dict`.

    Their scale lets every layer be seen in the module's output.
    """
    generator = torch.Generator().manual_seed(0)
    weights = module.state_dict()
    for tensor in weights.values():
        draw = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(draw / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 3.0 * draw)
    return weights


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors [rows, values] agree up to PROBE_TOLERANCE of each row's largest."""
    limit = PROBE_TOLERANCE * b.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    return a.shape == b.shape and bool(((a - b).abs() <= limit).all())
