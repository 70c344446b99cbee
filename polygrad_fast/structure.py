"""What can be seen of a module from outside, to notice that it computes something else."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.modules.module as torch_module
from torch import Tensor, nn

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_MISSING = object()


class Part(NamedTuple):
    """One module of a tree of modules."""

    kind: type
    forward: Callable
    hooks: tuple[int, ...]  # of the forward pass, by their handles' numbers
    children: tuple[str, ...]
    settings: dict[str, Any]
    tensors: tuple[tuple[str, type, tuple[int, ...]], ...]  # name, type, shape


def structure(module: nn.Module, ignored: frozenset[str] = frozenset()) -> dict[str, Part]:
    """Return name -> type, forward pass, hooks, plain attributes and weights' shapes of every part.

    While it stays the same, a module computes the same with the same weights. Reads no tensor.

    Args:
        ignored: attributes to leave out.
    """
    return {
        name: Part(
            type(part),
            type(part).forward,
            (*part._forward_pre_hooks, *part._forward_hooks),
            _children(part),
            {
                key: value
                for key, value in vars(part).items()
                if key not in _MODULE_ATTRIBUTES and key not in ignored and is_setting(value)
            },
            _shapes(part._parameters) + _shapes(part._buffers),
        )
        for name, part in module.named_modules(remove_duplicate=False)
    }


def parts(module: nn.Module) -> list[nn.Module]:
    """Return a module and its parts in the order of `structure`; faster than `modules()`."""
    found = [module]
    for child in module._modules.values():
        if child is not None:
            found += parts(child)
    return found


def is_setting(value: Any) -> bool:
    """Whether a module's attribute may be a setting of its forward pass: a number, a name, a
    function or a tuple of these."""
    if isinstance(value, tuple):
        return all(map(is_setting, value))
    return value is None or isinstance(value, (str, numbers.Number)) or callable(value)


def change(module: nn.Module, built: dict[str, Part]) -> str | None:
    """Return in words how a module differs from what `structure` returned when it had no hooks, or
    None.

    An attribute that was added counts where it hides a method; so do hooks that torch runs for
    every module. About 2 us per part: this is called at every sample.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "is called through hooks for all modules"
    # of the same length and order, unless an earlier part has other children
    for (name, wanted), part in zip(built.items(), parts(module), strict=False):
        kind, attributes, where = type(part), part.__dict__, f" in {name}" if name else ""
        if kind is not wanted.kind:
            return f"has a {kind.__name__}{where} instead of a {wanted.kind.__name__}"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"has a forward hook{where}"
        if "forward" in attributes or kind.forward is not wanted.forward:
            return f"has another forward{where}"
        for key, value in wanted.settings.items():
            if attributes.get(key, _MISSING) != value:
                return f"has another {key}{where}"
        if _shapes(part._parameters) + _shapes(part._buffers) != wanted.tensors:
            return f"has other weights{where} than its constructor makes"
        if _children(part) != wanted.children:
            return f"has other parts{where} than its constructor makes"
    for key in vars(module).keys() - _MODULE_ATTRIBUTES:
        if callable(getattr(type(module), key, None)):
            return f"has a {key} of its own"
    return None


def _children(part: nn.Module) -> tuple[str, ...]:
    return tuple([name for name, child in part._modules.items() if child is not None])


def _shapes(tensors: dict[str, Tensor | None]) -> tuple[tuple[str, type, tuple[int, ...]], ...]:
    return tuple([(n, type(t), t.shape) for n, t in tensors.items() if t is not None])
