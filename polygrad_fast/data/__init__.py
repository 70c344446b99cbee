"""Real data: environments, and the replay buffer that training windows are drawn from."""

from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.data.environment import check_spaces, make_environment
from polygrad_fast.data.replay import ReplayBuffer, Windows
from polygrad_fast.data.resumable import ResumableEnvironment

__all__ = [
    "ActionScaler",
    "ReplayBuffer",
    "ResumableEnvironment",
    "Windows",
    "check_spaces",
    "make_environment",
]
