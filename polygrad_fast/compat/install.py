"""This library's sampling put into a live agent of the released code, and taken out again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from polygrad_fast.compat.accelerate import AcceleratedDiffusion, accelerate
from polygrad_fast.errors import InputError


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
    model = accelerated.diffusion_model
    accelerated.replaced_forward = _own_forward(model)
    model.forward = accelerated
    model.__getstate__ = functools.partial(_state, model)  # read by copy and pickle
    return accelerated


def uninstall(agent: nn.Module) -> None:
    """Undo `install`; without effect where nothing is installed."""
    model = _diffusion_model(agent)
    installed = vars(model).get("forward")
    if isinstance(installed, AcceleratedDiffusion):
        del model.forward, model.__getstate__
        if installed.replaced_forward is not None:
            model.forward = installed.replaced_forward


def _own_forward(model: nn.Module) -> Callable | None:
    """Return the `forward` that a diffusion model carries besides its class's, ours aside."""
    forward = vars(model).get("forward")
    return forward.replaced_forward if isinstance(forward, AcceleratedDiffusion) else forward


def _state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a diffusion model for copies and pickles, without what `install` set."""
    state, forward = type(model).__getstate__(model), _own_forward(model)
    state = {
        name: value for name, value in state.items() if name not in ("forward", "__getstate__")
    }
    return state if forward is None else {**state, "forward": forward}


def _diffusion_model(agent: nn.Module) -> nn.Module:
    try:
        return agent.diffusion_model
    except AttributeError:
        raise InputError(
            f"agent must be a DiffusionWMAgent of the released code, got a {type(agent).__name__}, "
            f"which has no attribute 'diffusion_model'"
        ) from None
