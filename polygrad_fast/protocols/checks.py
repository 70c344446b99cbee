"""Checks of modules before they are used: weights, results, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polygrad_fast.errors import InputError, first_line
from polygrad_fast.normalizer import Normalizer


def check_normalizer(normalizer: Any) -> None:
    """Raise InputError unless this is a `Normalizer` in float32."""
    if not isinstance(normalizer, Normalizer):
        raise InputError(
            f"normalizer must be a polygrad_fast.Normalizer (Normalizer.from_moments makes one of "
            f"means and standard deviations), got {kind_of(normalizer)}"
        )
    for name, moment in normalizer.named_buffers():
        if moment.dtype != torch.float32:
            raise InputError(f"normalizer: {name} must be of torch.float32, got {moment.dtype}")


def check_trainable(name: str, module: Any) -> None:
    """Raise InputError unless this is a module with weights to train that a checkpoint can hold."""
    what = f"{name} {kind_of(module)}"
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} must be a torch.nn.Module to be trained, got {kind_of(module)}")
    check_weights(module, what)
    if not any(weight.requires_grad for weight in module.parameters()):
        raise InputError(f"{what} must have weights that require a gradient, got none to train")
    for key, value in module.state_dict().items():
        if not torch.is_tensor(value):
            raise InputError(
                f"{what} must keep tensors only in its state_dict, as a checkpoint holds nothing "
                f"else, got a {kind_of(value)} under {key!r}"
            )


def weights_dtype(module: Any, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a module's weights, `default` where there are none."""
    weights = module.parameters() if isinstance(module, nn.Module) else ()
    return next((w.dtype for w in weights if w.is_floating_point()), default)


def check_float32(module: nn.Module, name: str) -> None:
    """Raise InputError unless a module's weights are in float32."""
    for key, weight in module.named_parameters():
        if weight.dtype != torch.float32:
            raise InputError(
                f"{name} must have its weights in torch.float32 to be trained, got {key} in "
                f"{weight.dtype}"
            )


def check_weights(module: Any, name: str) -> None:
    """Raise InputError where a module's weights are still to be made by its first call."""
    if isinstance(module, nn.Module) and any(map(is_lazy, module.parameters())):
        raise InputError(
            f"{name} must be called once before, got weights without a shape (lazy layers)"
        )


def check_gradient(
    owner: Any,
    call: str,
    device: torch.device,
    what: str,
    inputs: list[Tensor],
    outputs: Callable[[], Iterable[Tensor]],
) -> None:
    """Raise InputError unless the outputs' gradient reaches one of the inputs.

    The inputs' `grad` stays as it is.

    Args:
        owner: the module that is called, on `device`.
        call, what: words for the error: the call, and the inputs.
        outputs: calls it.
    """

    def differentiate() -> None:
        total = sum(output.sum() for output in outputs())
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if total.requires_grad:
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
            if any(gradient is not None for gradient in gradients):
                return
        raise RuntimeError("there is no gradient")

    failed = f"cannot be differentiated with respect to {what}"
    dry_call(owner, call, device, differentiate, failed, gradients=True)


def dry_call(
    owner: Any,
    call: str,
    device: torch.device,
    function: Callable[[], Any],
    failed: str = "failed",
    gradients: bool = False,
) -> Any:
    """Return what a function that calls a module returns.

    The module's buffers and the global random numbers stay as they were.

    Args:
        owner: the module, on `device`.
        call, failed: words for the error.
        gradients: whether autograd records.

    Raises:
        InputError: the function raised an error.
    """
    try:
        with (
            _unchanged(owner, device),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device.type, enabled=False),
        ):
            return function()
    except InputError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"{call}, {failed}: {reason}") from error


@contextlib.contextmanager
def _unchanged(module: Any, device: torch.device) -> Iterator[None]:
    """Put a module's buffers and the global random numbers back as they were."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    before = [
        (part._buffers, name, buffer, buffer.detach().clone())
        for part in parts
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for buffers, name, buffer, value in before:
                buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def wrong_result(tensor: Any, wanted: tuple[int, ...]) -> str | None:
    """Return in words what a result must be and is not, or None."""
    if not torch.is_tensor(tensor):
        return f"that is a tensor, got a {kind_of(tensor)}"
    if tensor.shape != wanted:
        return f"of shape {list(wanted)}, got {list(tensor.shape)}"
    if not tensor.is_floating_point():
        return f"of floating point, got {tensor.dtype}"
    return None


def draw(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return normals to call a module with, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(device)


def kind_of(value: Any) -> str:
    """Return the name of a function or class, or that of a value's class."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) and callable(value) else type(value).__name__
