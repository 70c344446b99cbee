"""The environments that a policy is trained on."""

from __future__ import annotations

import gymnasium

from polygrad_fast.data.environment import environment_name
from polygrad_fast.data.environment_copy import check_independent, copy_environment
from polygrad_fast.data.environment_process import ProcessEnvironment
from polygrad_fast.errors import InputError
from polygrad_fast.evaluation.environments import (
    EnvironmentSource,
    build_environment,
    check_new,
    check_same_spaces,
)


def training_environments(
    first: gymnasium.Env, source: EnvironmentSource, number: int, in_processes: bool
) -> list[gymnasium.Env]:
    """Return environments that are alike: with an id or a function, each is made anew; an
    environment object is copied as it is now.

    Args:
        first: made from `source`; one of them, unless they are in processes.
        source: what it was made from.
        number: at least 1.
        in_processes: each in a process of its own, which begins when it is first used.

    Raises:
        InputError: an object that cannot be copied, or is to be in a process; a function that
            returns the same environment twice, or one with other spaces.
    """
    if in_processes:
        if isinstance(source, gymnasium.Env):
            raise InputError(
                f"env_processes=True needs an environment id or a function that makes the "
                f"environment, got a {environment_name(source)}"
            )
        return [ProcessEnvironment(source, first) for _ in range(number)]
    environments = [first]
    if number > 1 and isinstance(source, gymnasium.Env):
        check_independent(source)
    while len(environments) < number:
        if isinstance(source, gymnasium.Env):
            environment = copy_environment(source)
        else:
            environment = build_environment(source)
            check_new(environment, environments)
        check_same_spaces(environment, first, "training")
        environments.append(environment)
    return environments
