"""The policy as it acts: a forward for single observations, and a copy on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.protocols import policy_moments
from polygrad_fast.sampling.folding import why_foreign

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


def moments_of(policy: nn.Module, normalizer: Normalizer) -> Moments:
    """Return what maps raw observations [..., S] to a policy's mean [..., A] and its std, which may
    lack the axes before A.

    For a `GaussianPolicy` as its constructor made it these are the operations of its modules, on
    the weights as they are at every call, without the calls: the same numbers in less than half
    the time at one observation. Another policy is called as it is. No gradient may be asked for.
    """
    if why_foreign(policy) is None:
        return _GaussianMoments(policy, normalizer)
    return lambda observations: policy_moments(policy, normalizer, observations, normalized=False)


class _GaussianMoments:
    """The forward of a `GaussianPolicy` without its modules."""

    def __init__(self, policy: GaussianPolicy, normalizer: Normalizer):
        *hidden, last = policy.network
        self._hidden = [
            (linear.weight, linear.bias, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            for linear, norm in zip(hidden[0::3], hidden[1::3], strict=True)
        ]
        self._last = last.weight, last.bias
        self._log_std, self._min_std = policy.log_std, policy.min_std
        self._scaling = None
        if policy.normed_inputs:
            self._scaling = normalizer.observations_mean, normalizer.observations_scale

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        h = observations
        if self._scaling is not None:
            mean, scale = self._scaling
            h = (h - mean) / scale
        for weight, bias, *norm in self._hidden:
            h = torch.layer_norm(nn.functional.linear(h, weight, bias), *norm)
            h = nn.functional.elu(h, inplace=True)
        mean = torch.tanh(nn.functional.linear(h, *self._last))
        return mean, self._log_std.exp() + self._min_std


class ActingPolicy:
    """The policy that acts in the training environment, on the host.

    On a CPU it is the trained policy itself. On another device it is a copy of it, so that no step
    of the environment waits for the device: `refresh`, called after every change of policy or
    normalizer, begins to copy their weights into pinned memory, and makes those act that the call
    before has copied. The acting policy is then exactly one change old, whatever the timing; the
    host waits only where the device has not begun the change before.

    Args:
        policy, normalizer: the trained ones, on one device.
        is_copied: None: where they are on another device than a CPU.

    Raises:
        InputError: a policy that cannot be copied, on another device than a CPU.
    """

    def __init__(self, policy: nn.Module, normalizer: Normalizer, is_copied: bool | None = None):
        self._policy, self._normalizer = policy, normalizer
        device = normalizer.observations_mean.device
        self._is_copied = device.type != "cpu" if is_copied is None else is_copied
        self._acting = policy, normalizer
        if self._is_copied:
            self._acting = _on_the_host(policy, normalizer)
            on_gpu = device.type == "cuda"
            self._arriving = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
                for tensor in _tensors(policy, normalizer)
            ]
            self._arrived = torch.cuda.Event() if on_gpu else None
        self.settle()

    def settle(self) -> None:
        """Let the current policy act at once; waits for the device."""
        if self._is_copied:
            self._begin_copy()
        self.refresh()

    def refresh(self) -> None:
        """Note that policy or normalizer have changed."""
        if self._is_copied:
            self._finish_copy()
            self._begin_copy()
        self.moments = moments_of(*self._acting)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that act, where these are older than the trained ones."""
        if not self._is_copied:
            return {"acting_policy": None}
        return {"acting_policy": [tensor.clone() for tensor in _tensors(*self._acting)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, after the trained weights have been; of a checkpoint
        written on a CPU, the trained ones act."""
        self.settle()
        saved = state.get("acting_policy")
        if self._is_copied and saved is not None:
            _copy(saved, _tensors(*self._acting))

    @torch.no_grad()
    def _begin_copy(self) -> None:
        _copy(_tensors(self._policy, self._normalizer), self._arriving)
        if self._arrived is not None:
            self._arrived.record()

    def _finish_copy(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()
        _copy(self._arriving, _tensors(*self._acting))
        for acting, trained in zip(self._acting[0].modules(), self._policy.modules(), strict=True):
            acting.training = trained.training


def _on_the_host(policy: nn.Module, normalizer: Normalizer) -> tuple[nn.Module, Normalizer]:
    """Return copies on the CPU; a normalizer that the policy holds becomes the copied one."""
    host = copy.deepcopy(normalizer).to("cpu")
    try:
        copied = copy.deepcopy(policy, {id(normalizer): host}).to("cpu")
    except Exception as error:  # of the attributes of the user's own
        raise InputError(
            f"policy {type(policy).__name__} cannot be copied to act on the host: {error}"
        ) from error
    return copied.requires_grad_(False), host


def _tensors(policy: nn.Module, normalizer: Normalizer) -> list[Tensor]:
    return [*policy.parameters(), *policy.buffers(), *normalizer.buffers()]


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
