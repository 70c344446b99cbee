"""Real data: environments, and the replay buffer that training windows are drawn from."""

from polygrad_fast.data.environment import (
    ActionScaler,
    ResumableEnvironment,
    check_spaces,
    make_environment,
)
from polygrad_fast.data.replay import ReplayBuffer, Windows

__all__ = [
    "ActionScaler",
    "ReplayBuffer",
    "ResumableEnvironment",
    "Windows",
    "check_spaces",
    "make_environment",
]
