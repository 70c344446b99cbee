"""Real data: environments, the replay buffer that training windows are drawn from, and datasets."""

from polygrad_fast.data.actions import ActionScaler
from polygrad_fast.data.environment import check_spaces, make_environment
from polygrad_fast.data.load import load_dataset
from polygrad_fast.data.offline_dataset import OfflineDataset
from polygrad_fast.data.replay import ReplayBuffer, Windows
from polygrad_fast.data.resumable import ResumableEnvironment
from polygrad_fast.data.windows import TrajectoryWindows

__all__ = [
    "ActionScaler",
    "OfflineDataset",
    "ReplayBuffer",
    "ResumableEnvironment",
    "TrajectoryWindows",
    "Windows",
    "check_spaces",
    "load_dataset",
    "make_environment",
]
