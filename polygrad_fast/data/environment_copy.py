"""Copies of environment objects, attribute by attribute."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random
import sys
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import EzPickle

from polygrad_fast.data.environment import environment_name, layers
from polygrad_fast.errors import InputError

_CHECKED_STEPS = 25


def copy_environment(env: gymnasium.Env) -> gymnasium.Env:
    """Copy an environment with its wrappers, physics, generators and running episode.

    Every attribute is copied, also where `copy.deepcopy` would build the environment anew from its
    constructor's arguments and lose what was changed since (`gymnasium.utils.EzPickle`). Functions
    are copied with what they hold, views of arrays stay views, a MuJoCo `MjData` belongs to the
    copied model. Classes, modules and read-only arrays are shared. The original is only read.

    Raises:
        InputError: something cannot be copied, as a socket, a file, a lock, a generator, a renderer
            in use or a view of a simulator's memory; the message names it.
    """
    try:
        return _copied(env)
    except Exception as error:  # the classes of the attributes raise what they like
        raise _refusal(env, f"{_guilty_attribute(env)}({_sentence(error)})") from error


def check_independent(env: gymnasium.Env) -> None:
    """Check that two copies of an environment do not influence one another.

    A handle of a simulator that lives outside Python is copied as a number, and the copies share
    the simulator. So one copy is played by itself, then side by side with another: it must see the
    same. Nothing is concluded where it sees different things by itself. The original is not
    stepped, and the global random generators keep their states.

    Raises:
        InputError: the copies influence one another, or one cannot be played.
    """
    first, second = copy_environment(env), copy_environment(env)
    try:
        alone = _play([first])
        independent = _play([first]) != alone or _play([first, second]) == alone
    except Exception as error:  # of the environment's own code
        raise _refusal(env, f"playing a copy raised {_sentence(error)}") from error
    if not independent:
        raise _refusal(env, "its copies influence one another, as if they shared a simulator")


def _refusal(env: gymnasium.Env, reason: str) -> InputError:
    return InputError(
        f"{environment_name(env)} cannot be copied for evaluation: {reason}; give eval_env=, an "
        f"environment to evaluate on, or a function that makes the environment"
    )


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def _guilty_attribute(env: gymnasium.Env) -> str:
    """Return "Layer.attribute " for the first attribute that alone cannot be copied, or ""."""
    all_layers = list(layers(env))
    for layer in reversed(all_layers):
        for name, value in getattr(layer, "__dict__", {}).items():
            if any(value is other for other in all_layers):
                continue
            try:
                _copied(value)
            except Exception:
                return f"{type(layer).__name__}.{name} "
    return ""


def _copied(thing: Any) -> Any:
    data = io.BytesIO()
    copier = _Copier(data, protocol=pickle.HIGHEST_PROTOCOL)
    copier.dump(thing)
    data.seek(0)
    return _Builder(data, copier.shared).load()


class _Shared:
    """What copies hold as it is."""

    def __init__(self, value: Any):
        self.value = value


class _Copier(pickle.Pickler):
    """Describe an object for `_Builder`, which runs in the same process: what is to be shared is
    passed by reference, and a class's pickling hooks are bypassed where they would lose state."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.shared: list[Any] = []

    def persistent_id(self, thing: Any) -> int | None:
        if isinstance(thing, _Shared):
            thing = thing.value
        elif not _is_shared(thing):
            return None
        self.shared.append(thing)
        return len(self.shared) - 1

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, np.ndarray):
            return _reduce_array(thing)
        if isinstance(thing, types.FunctionType):
            start = (thing.__code__, _Shared(thing.__globals__), thing.__name__, None)
            state = (thing.__defaults__, thing.__kwdefaults__, thing.__qualname__, thing.__dict__)
            arguments = (*start, thing.__closure__)
            return types.FunctionType, arguments, state, None, None, _fill_function
        if isinstance(thing, types.CellType):
            try:
                state = (thing.cell_contents,)
            except ValueError:  # not assigned yet
                state = None
            return types.CellType, (), state, None, None, _fill_cell
        if isinstance(thing, types.MethodType):
            return types.MethodType, (thing.__func__, thing.__self__)
        if type(thing) is weakref.ref and thing() is not None:
            return weakref.ref, (thing(),)
        mujoco = sys.modules.get("mujoco")
        if mujoco is not None and type(thing) is getattr(mujoco, "MjData", None):
            return _copy_mujoco_data, (thing.model, _Shared(thing))
        if hasattr(type(thing), "__deepcopy__"):
            return _same, (_Shared(copy.deepcopy(thing)),)
        if isinstance(thing, (gymnasium.Env, EzPickle)):
            return _new, (type(thing),), object.__getstate__(thing), None, None, _fill
        return NotImplemented


class _Builder(pickle.Unpickler):
    """Build the copy that `_Copier` describes."""

    def __init__(self, data: io.BytesIO, shared: list[Any]):
        super().__init__(data)
        self._shared = shared

    def persistent_load(self, index: int) -> Any:
        return self._shared[index]


def _is_shared(thing: Any) -> bool:
    """Return whether a copy may hold the thing itself, because it does not change."""
    if isinstance(thing, (type, types.ModuleType, types.CodeType)):
        return True
    if isinstance(thing, types.BuiltinFunctionType):
        return isinstance(thing.__self__, (types.ModuleType, types.NoneType))
    if isinstance(thing, types.FunctionType):
        holds = (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__)
        return not any(holds)
    if isinstance(thing, np.ndarray):
        owner = _owner(thing)
        fixed = not (thing.flags.writeable or owner.flags.writeable or thing.dtype.hasobject)
        return fixed and isinstance(owner.base, (types.NoneType, bytes))
    return False


def _owner(array: np.ndarray) -> np.ndarray:
    """Return the array that an array is a view of, or itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _reduce_array(array: np.ndarray) -> Any:
    owner = _owner(array)
    if not isinstance(owner.base, (types.NoneType, bytes, bytearray, memoryview)):
        raise TypeError("an array that is a view of a simulator's memory would lose it")
    contiguous = owner.flags.c_contiguous or owner.flags.f_contiguous
    plain = type(array) is type(owner) is np.ndarray and array.size > 0 and contiguous
    if owner is array or not plain or array.dtype.hasobject or owner.dtype.hasobject:
        return NotImplemented
    start, owner_start = (a.__array_interface__["data"][0] for a in (array, owner))
    place = (array.shape, array.dtype, start - owner_start, array.strides)
    return _view, (owner, *place, array.flags.writeable)


def _view(owner, shape, dtype, offset, strides, writeable) -> np.ndarray:
    array = np.ndarray(shape, dtype, owner.ravel(order="K"), offset, strides)
    array.flags.writeable = writeable
    return array


def _fill_function(function: types.FunctionType, state: tuple) -> None:
    function.__defaults__, function.__kwdefaults__, function.__qualname__, attributes = state
    function.__dict__.update(attributes)


def _fill_cell(cell: types.CellType, state: tuple) -> None:
    (cell.cell_contents,) = state


def _new(kind: type) -> Any:
    return object.__new__(kind)


def _fill(thing: Any, state: Any) -> None:
    """Set the attributes of `object.__getstate__`: a dictionary, or one and that of the slots."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    thing.__dict__.update(attributes or {})
    for name, value in (slots or {}).items():
        object.__setattr__(thing, name, value)


def _same(thing: Any) -> Any:
    return thing


def _copy_mujoco_data(model: Any, data: Any) -> Any:
    import mujoco

    copied = mujoco.MjData(model)
    mujoco.mj_copyData(copied, model, data)
    return copied


@contextlib.contextmanager
def _global_generators(states: list[Any]) -> Iterator[None]:
    """Run the block with the global generators of python, numpy and torch in these states.

    `states` is updated to those after the block; the generators are put back as they were.
    """
    before = _global_states()
    _set_global_states(states)
    try:
        yield
    finally:
        states[:] = _global_states()
        _set_global_states(before)


def _global_states() -> list[Any]:
    return [random.getstate(), np.random.get_state(), torch.get_rng_state()]


def _set_global_states(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def _play(environments: Sequence[gymnasium.Env]) -> list[bytes]:
    """Play the environments side by side and return what the first one saw.

    Each plays at most one episode, with the same actions, a seed of its own and global generators
    of its own.
    """
    seen, space = [], environments[0].action_space
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    low = np.where(np.isfinite(low), low, np.minimum(high, 0.0) - 1.0)
    high = np.where(np.isfinite(high), high, np.maximum(low, 0.0) + 1.0)
    generator = np.random.default_rng(0)
    streams = [_global_states() for _ in environments]
    running = list(enumerate(environments))
    for place, env in running:
        with _global_generators(streams[place]):
            observation, _ = env.reset(seed=place)
        if place == 0:
            seen.append(np.asarray(observation).tobytes())
    for _ in range(_CHECKED_STEPS):
        action = generator.uniform(low, high).astype(space.dtype)
        for place, env in list(running):
            with _global_generators(streams[place]):
                observation, *outcome, _ = env.step(action.copy())
            if place == 0:
                seen.append(np.asarray(observation).tobytes() + repr(outcome).encode())
            if any(outcome[1:]):
                running.remove((place, env))
    return seen
