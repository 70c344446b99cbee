"""D4RL's environments and scores (arXiv 2004.07219): 0 is a random policy, 100 the expert."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from polygrad_fast.errors import InputError

REFERENCE_RETURNS = {
    "HalfCheetah-v2": (-280.178953, 12135.0),
    "Walker2d-v2": (1.629008, 4592.3),
    "Hopper-v2": (-20.272305, 3234.3),
    "maze2d-umaze-v1": (23.85, 161.86),
    "maze2d-medium-v1": (13.13, 277.39),
    "maze2d-large-v1": (6.7, 273.99),
}
"""Mean returns of a random and of an expert policy, by the environment the datasets are of."""
_FAMILIES = {name.lower().rpartition("-")[0]: name for name in REFERENCE_RETURNS}
_LOCOMOTION = re.compile(r"(halfcheetah|walker2d|hopper)(-[a-z-]+)?-v(\d+)")
_MAZE = re.compile(r"maze2d-(umaze|medium|large)(-sparse)?-v(\d+)")


def d4rl_environment(name: str) -> str | None:
    """Return the environment of a D4RL dataset, as "Hopper-v2", or None if it is another's.

    Args:
        name: dataset or file name, as "hopper-medium-v2" or "hopper_medium-v2".
    """
    found = _parse(name)
    return found[0] if found is not None and found[0].endswith(f"-v{found[1]}") else None


def d4rl_score(name: str, returns: Any) -> Any:
    """Return 100 (return - random) / (expert - random), with D4RL's reference returns.

    Whether it may be compared with published scores says `score_caveat`.

    Args:
        name: environment or D4RL dataset, as "Hopper-v2", "hopper-medium-v2", "Hopper-v5".
        returns: a number or an array, undiscounted.

    Raises:
        InputError: D4RL has no reference returns for it.
    """
    found = _parse(name)
    if found is None:
        raise InputError(score_caveat(name))
    low, high = REFERENCE_RETURNS[found[0]]
    if isinstance(returns, np.ndarray):
        returns = returns.astype(np.float64)
    return 100.0 * (returns - low) / (high - low)


def has_d4rl_score(name: str) -> bool:
    """Whether D4RL has reference returns for an environment or dataset, of any version."""
    return _parse(name) is not None


def score_caveat(name: str) -> str | None:
    """Return, in a sentence, why a score of this environment is not to be compared with published
    D4RL scores; None where it is."""
    found = _parse(name)
    if found is None:
        return (
            f"{name} has no D4RL score: D4RL's reference returns here are those of "
            f"{', '.join(REFERENCE_RETURNS)}"
        )
    family, version = found
    wanted = int(family.rpartition("-v")[2])
    if version == wanted:
        return None
    if "maze2d" in family or version < wanted:
        return f"{name} is another version than {family}, so scores of the two are not comparable"
    base = family.rpartition("-")[0]
    if version >= 5:
        return (
            f"{name} is not {family}, which D4RL's scores are of: version 5 changed rewards, "
            f"terminations or the model of some environments and runs on another MuJoCo, so scores "
            f"of the two are not comparable"
        )
    return (
        f"{name} runs on another MuJoCo than {family}, which D4RL's scores are of: scores of "
        f"{base} are close to published ones, but not the same"
    )


def _parse(name: str) -> tuple[str, int] | None:
    """Return D4RL's environment and the version asked for."""
    name = name.rpartition(":")[2].lower().replace("_", "-")
    if match := _LOCOMOTION.fullmatch(name):
        return _FAMILIES[match[1]], int(match[3])
    if match := _MAZE.fullmatch(name):
        return f"maze2d-{match[1]}-v1", int(match[3])
    return None
