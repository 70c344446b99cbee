"""An environment in a process of its own, which steps while this process does something else."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle
import gymnasium
import numpy as np

from polygrad_fast.data.environment import environment_name, make_environment
from polygrad_fast.errors import InputError

_SECONDS_TO_END = 5.0


class EnvironmentProcess:
    """A new Python that makes environments and steps them.

    It begins when it is first asked for something, and ends with this process, also where this one
    is killed.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._asked: deque[object] = deque()  # who waits for the answers to come, in order
        self._answers: dict[object, tuple] = {}

    def send(self, sender: object, message: tuple) -> None:
        """Ask for something; the answer is the sender's.

        Raises:
            InputError: the process has ended by itself.
        """
        if self._process is None:
            self._begin()
        try:
            pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        self._asked.append(sender)

    def receive(self, sender: object) -> tuple:
        """Wait for the answer to what a sender has asked: result, error, its traceback.

        Raises:
            InputError: the process has ended by itself.
        """
        while sender not in self._answers:
            try:
                answer = pickle.load(self._process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise self._gone() from None
            self._answers[self._asked.popleft()] = answer
        return self._answers.pop(sender)

    def close(self) -> None:
        """End the process; what is asked next begins another one."""
        if self._process is not None:
            self._end()
            self._process = None
            self._asked.clear()
            self._answers.clear()

    def _begin(self) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from {__name__} import serve_environments\n"
            f"serve_environments()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._end = weakref.finalize(self, _end, self._process)

    def _gone(self) -> InputError:
        process = self._process
        self.close()
        return InputError(
            f"the environment's process ended by itself, with exit code {process.returncode}"
        )


class ProcessEnvironment(gymnasium.Env):
    """Resets and steps an environment in another process; its `info` is empty.

    Args:
        source: what the process makes the environment from: an id, with its registration here, or a
            function without arguments.
        like: such an environment, for its spaces and its name.
        process: where it is to be, with others; None: in one of its own.

    Raises:
        InputError: `source` cannot be handed to another process.
    """

    def __init__(
        self,
        source: str | Callable[[], gymnasium.Env],
        like: gymnasium.Env,
        process: EnvironmentProcess | None = None,
    ):
        self.observation_space = copy.deepcopy(like.observation_space)
        self.action_space = copy.deepcopy(like.action_space)
        self.spec, self.name = like.spec, environment_name(like)
        self.process = EnvironmentProcess() if process is None else process
        self._stepping = False
        try:
            self._order = cloudpickle.dumps((source, _registrations(source)))
        except Exception as error:  # of whatever the function holds
            raise InputError(
                f"{self.name} cannot be made in another process: {type(error).__name__}: {error}"
            ) from error

    def start(self, action: np.ndarray) -> None:
        """Begin a step, which the next `step` waits for and returns."""
        self._send("step", action)
        self._stepping = True

    def step(self, action: np.ndarray) -> tuple:
        """Return what the step that `start` began gives, or that of this action."""
        if not self._stepping:
            self.start(action)
        self._stepping = False
        return self._receive()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Reset the environment; a step that was begun is forgotten."""
        if self._stepping:
            self._stepping = False
            with contextlib.suppress(Exception):
                self._receive()
        self._send("reset", seed, options, self._order)
        return self._receive()

    def close(self) -> None:
        """End the process; a reset begins another one."""
        self.process.close()

    def _send(self, name: str, *arguments: Any) -> None:
        with self._named():
            self.process.send(id(self), (id(self), name, arguments))

    def _receive(self) -> Any:
        with self._named():
            result, error, trace = self.process.receive(id(self))
        if error is not None:
            error.add_note(f"in the process of {self.name}:\n{trace}")
            raise error
        return result

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None


def start_step(env: gymnasium.Env, action: np.ndarray) -> None:
    """Begin a step of an environment in another process, which its `step` with the same action
    waits for; nothing where it is in this one."""
    if isinstance(env, ProcessEnvironment):
        env.start(action)


def _end(process: subprocess.Popen) -> None:
    """Close a process's input, at which it ends, and wait for that."""
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what is not written goes with the process
            stream.close()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _registrations(source: str | Callable[[], gymnasium.Env]) -> dict[str, Any]:
    """Return what gymnasium knows here of an id, which another process may not."""
    if not isinstance(source, str) or source not in gymnasium.registry:
        return {}
    return {source: gymnasium.registry[source]}


def serve_environments() -> None:
    """Make environments and do what the other process asks, until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the environments print
    environments: dict[int, gymnasium.Env] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            number, name, arguments = pickle.load(asked)
            try:
                if name == "reset":
                    *arguments, order = arguments
                    if number not in environments:
                        environments[number] = _make(order)
                answer = _do(environments[number], name, arguments), None, ""
            except Exception as error:  # of the environment
                answer = None, _portable(error), traceback.format_exc()
            answers.write(_pickled(answer))
            answers.flush()


def _make(order: bytes) -> gymnasium.Env:
    source, registrations = cloudpickle.loads(order)
    for name, spec in registrations.items():
        gymnasium.registry.setdefault(name, spec)
    return make_environment(source) if isinstance(source, str) else source()


def _do(env: gymnasium.Env, name: str, arguments: Sequence[Any]) -> Any:
    """Return what an environment's `reset` or `step` returns, without its info."""
    if name == "reset":
        seed, options = arguments
        returned = env.reset(seed=seed, options=options)
    else:
        returned = env.step(*arguments)
    return (*returned[:-1], {}) if isinstance(returned, tuple) and returned else returned


def _pickled(answer: tuple) -> bytes:
    try:
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # of what the environment returned
        sentence = f"what the environment returned cannot be sent: {error}"
        return pickle.dumps((None, InputError(sentence), ""))


def _portable(error: Exception) -> Exception:
    """Return an error that can be raised in another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class may need arguments that it does not keep
        return RuntimeError(f"{type(error).__name__}: {error}")
