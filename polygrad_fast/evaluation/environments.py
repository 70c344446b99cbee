"""The environments that a policy is evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from polygrad_fast.data.environment import check_spaces, environment_name, make_environment
from polygrad_fast.data.environment_copy import check_independent, copy_environment
from polygrad_fast.data.environment_process import EnvironmentProcess, ProcessEnvironment
from polygrad_fast.errors import InputError

EnvironmentSource = str | gymnasium.Env | Callable[[], gymnasium.Env]
MAX_ENVIRONMENTS = 16
"""Environments that play evaluation episodes side by side."""


def build_environment(source: EnvironmentSource, render_mode: str | None = None) -> gymnasium.Env:
    """Make an environment from an id or a function; an environment is returned as it is.

    Raises:
        InputError: those of `make_environment`, or a function that returns something else.
    """
    if not callable(source) or isinstance(source, gymnasium.Env):
        return make_environment(source, render_mode)
    made = source()
    if not isinstance(made, gymnasium.Env):
        raise InputError(
            f"the environment function must return a gymnasium.Env, got {type(made).__name__}"
        )
    return made


def check_new(environment: gymnasium.Env, known: Sequence[gymnasium.Env]) -> None:
    """Raise InputError where a function has returned one of the known environments again."""
    if any(environment.unwrapped is other.unwrapped for other in known):
        raise InputError(
            f"the environment function must return a new environment at each call, got the same "
            f"{environment_name(environment)} twice"
        )


def check_same_spaces(environment: gymnasium.Env, first: gymnasium.Env, purpose: str) -> None:
    """Raise InputError unless an environment has the dimensions and the actions of the first one
    trained on."""
    wanted, got = check_spaces(first), check_spaces(environment)
    if got != wanted:
        raise InputError(
            f"the {purpose} environment must have (observation, action) dimensions {wanted} as "
            f"{environment_name(first)}, got {got} of {environment_name(environment)}"
        )
    ours, theirs = first.action_space, environment.action_space
    if not (np.array_equal(ours.low, theirs.low) and np.array_equal(ours.high, theirs.high)):
        raise InputError(
            f"the {purpose} environment must have the action space {ours} as "
            f"{environment_name(first)}, got {theirs} of {environment_name(environment)}"
        )


class EvaluationEnvironments:
    """Environments to evaluate on: made as the one trained on is, copies of it, or others.

    An id or a function makes every environment anew. An environment trained on is copied as it is
    at construction: what is changed in it later is not seen in evaluations. An environment given
    for evaluation is used itself, alone, and its episodes are played one after the other.

    Args:
        training: the environment trained on.
        source: what it was made from.
        given: `eval_env`, what evaluation environments are made from instead; None: `source`.
        num_processes: where evaluations play, the environments spread over them; 0: here. What is
            played is the same.

    Raises:
        InputError: `training` cannot be copied, an evaluation environment is the training
            environment or has other spaces, or an object is to be played in other processes.
    """

    def __init__(
        self,
        training: gymnasium.Env,
        source: EnvironmentSource,
        given: EnvironmentSource | None = None,
        num_processes: int = 0,
    ):
        self._training = training
        self._source = source if given is None else given
        self._pristine = self._alone = None
        self._processes = [EnvironmentProcess() for _ in range(num_processes)]
        if self._processes and isinstance(self._source, gymnasium.Env):
            raise InputError(
                f"eval_processes must be 0 for an environment object "
                f"({environment_name(self._source)}), which cannot be handed over: give an id or a "
                f"function that makes the environment"
            )
        if given is not None and isinstance(given, gymnasium.Env):
            self._alone = given
        elif isinstance(self._source, gymnasium.Env):
            self._pristine = copy_environment(self._source)
            # a window for each of the copies is not what the user asked for
            if self._pristine.unwrapped.render_mode == "human":
                self._pristine.unwrapped.render_mode = None
            check_independent(self._pristine)
        self._made = [self.make()]
        self._remote: list[gymnasium.Env] = []

    def take(self, num_episodes: int) -> list[gymnasium.Env]:
        """Return the environments that play `num_episodes` episodes, the same each time."""
        wanted = 1 if self._alone is not None else min(num_episodes, MAX_ENVIRONMENTS)
        if self._processes:
            for i in range(len(self._remote), wanted):
                process = self._processes[i % len(self._processes)]
                self._remote.append(ProcessEnvironment(self._source, self._made[0], process))
            return self._remote[:wanted]
        while len(self._made) < wanted:
            self._made.append(self.make())
        return self._made[:wanted]

    def make(self, render_mode: str | None = None) -> gymnasium.Env:
        """Return another environment, or the given one where evaluation uses that.

        Raises:
            InputError: it cannot be made, or not with this `render_mode`: that of an environment
                object, or of a function's environment, is its own.
        """
        if self._alone is not None:
            environment = self._alone
        elif self._pristine is not None:
            environment = copy_environment(self._pristine)
        else:
            environment = build_environment(self._source, render_mode)
            check_new(environment, [self._training, *getattr(self, "_made", [])])
        self._check_spaces(environment)
        made_so = isinstance(self._source, str) or environment.render_mode == render_mode
        if render_mode is not None and not made_so:
            raise InputError(
                f"{environment_name(environment)} must be made with render_mode {render_mode!r} "
                f"to be rendered, got {environment.render_mode!r}"
            )
        return environment

    def describe(self) -> dict[str, Any]:
        """Return what is kept of the source in a checkpoint: id, and whether it was given by it."""
        if isinstance(self._source, str):
            return {"id": self._source, "given_by_id": True}
        return {"id": environment_name(self._made[0]), "given_by_id": False}

    def is_given(self, environment: gymnasium.Env) -> bool:
        """Return whether an environment of `make` is the user's own, not to be closed."""
        return environment is self._alone

    def _check_spaces(self, environment: gymnasium.Env) -> None:
        if environment.unwrapped is self._training.unwrapped:
            raise InputError(
                f"eval_env must be another environment than the one trained on, got that "
                f"{environment_name(environment)} itself"
            )
        check_same_spaces(environment, self._training, "evaluation")
