"""What acts in the training environments, which take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from polygrad_fast.data import ActionScaler, ResumableEnvironment
from polygrad_fast.errors import CheckpointError
from polygrad_fast.profiling import annotate
from polygrad_fast.training.actor import Actor


class Transition(NamedTuple):
    """One environment step; the action is the policy's, in its own units."""

    observation: np.ndarray
    action: np.ndarray
    reward: float
    terminated: bool
    truncated: bool

    @property
    def over(self) -> bool:
        """Whether its episode has ended."""
        return bool(self.terminated or self.truncated)


class Collector:
    """Takes one environment step at a time, step n in environment n mod N.

    An environment whose episode has ended is reset before its next step: no step is spent on that,
    and no transition leads from one episode into another.

    With `ahead`, each environment steps in its own process while this one does something else:
    directly after step n its next one, n + N, is drawn and begun. Its action then comes from the
    policy as it was before the updates that are due after the steps n to n + N - 1; without
    `ahead` each action comes from the policy of the moment.

    Args:
        environments: N of them.
        action_scaler, actor, generator: what draws the actions.
        random_steps: steps from the first on whose actions come from the action space instead.
        ahead: the environments can begin a step (`ProcessEnvironment`).

    Attributes:
        environments, ahead: as given.
    """

    def __init__(
        self,
        environments: Sequence[ResumableEnvironment],
        action_scaler: ActionScaler,
        actor: Actor,
        generator: torch.Generator,
        random_steps: int,
        ahead: bool = False,
    ):
        self.environments = list(environments)
        self._scaler, self._actor, self._generator = action_scaler, actor, generator
        self._random_steps, self.ahead = random_steps, ahead
        self._actions: list[np.ndarray | None] = [None] * len(self.environments)
        """Drawn, but not taken yet."""
        self._kept: list[dict[str, Any]] | None = None  # states to restore before the next step

    def restore(self) -> list[int]:
        """Make the environments what they were at the checkpoint, or before an error in one; return
        those that could not be restored, whose episodes have been left."""
        if self._kept is None:
            return []
        left = []
        for i, (environment, state) in enumerate(zip(self.environments, self._kept, strict=True)):
            if not environment.load_state_dict(state):
                left.append(i)
                self._actions[i] = None  # was drawn for another observation
        self._kept = None  # only now: after an error they are restored again
        return left

    def turn(self, step: int) -> ResumableEnvironment:
        """Return the environment that takes an environment step, counted from 0."""
        return self.environments[step % len(self.environments)]

    def prepare(self, step: int) -> None:
        """Begin an episode if none is running in the environment that takes an environment step."""
        environment = self.turn(step)
        if not environment.running:
            with annotate("env_reset"):
                environment.reset()

    def draw(self, step: int) -> None:
        """Draw the action of a prepared step, unless it is drawn already.

        Raises:
            InputError, NonFiniteError: as `Actor.sample`.
        """
        i = step % len(self.environments)
        if self._actions[i] is not None:
            return
        environment = self.environments[i]
        with annotate("act"):
            if step < self._random_steps:
                action = self._scaler.from_environment(environment.sample_action())
            else:
                action = self._actor.sample(environment.observation, self._generator)
        self._actions[i] = action

    def take(self, step: int) -> Transition:
        """Take a step whose action is drawn; after an error it can be taken again.

        Raises:
            InputError: the environment returned something unusable.
        """
        i = step % len(self.environments)
        environment, action = self.environments[i], self._actions[i]
        observation = environment.observation
        with annotate("env_step"):
            _, *outcome = environment.step(self._scaler.to_environment(action))
        self._actions[i] = None
        return Transition(observation, action, *outcome)

    def begin(self, step: int) -> None:
        """Begin a drawn step in its process."""
        environment, action = self.turn(step), self._actions[step % len(self.environments)]
        environment.start(self._scaler.to_environment(action))

    def keep(self) -> None:
        """Let the next step begin from the environments as they are now, whatever happens to
        them."""
        if self._kept is None:
            self._kept = [environment.state_dict() for environment in self.environments]

    def state_dict(self) -> dict[str, Any]:
        """Return the environments' states, and the actions that are drawn but not taken yet."""
        states = self._kept or [environment.state_dict() for environment in self.environments]
        actions = [None if a is None else torch.from_numpy(a.copy()) for a in self._actions]
        return {"environments": states, "actions": actions}

    @staticmethod
    def joined_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the states of several processes' environments as that of all, which take turns."""
        return {
            name: [entry for turn in zip(*(s[name] for s in states), strict=True) for entry in turn]
            for name in ("environments", "actions")
        }

    def load_state_dict(self, state: Mapping[str, Any], index: int = 0, number: int = 1) -> None:
        """Restore the part of `joined_states` that is one of several processes', or what was
        written for one environment before; the environments follow with the next step.

        Args:
            state: of all environments.
            index, number: the process, and how many there are now.

        Raises:
            CheckpointError: it is of another number of environments.
        """
        if "environments" not in state:
            state = {"environments": [state["environment"]], "actions": [state.get("action")]}
        wanted, got = number * len(self.environments), len(state["environments"])
        if got != wanted:
            raise CheckpointError(f"the checkpoint must be of {wanted} environments, got {got}")
        actions = state["actions"][index::number]
        self._actions = [None if a is None else a.numpy().copy() for a in actions]
        self._kept = state["environments"][index::number]
