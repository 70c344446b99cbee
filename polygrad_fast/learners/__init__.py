"""What learns a policy: one file each, behind the interfaces in `base`."""

from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.learners.base import Learner, OfflineLearner
from polygrad_fast.learners.build import build_learner, build_policy
from polygrad_fast.learners.iql import IQL
from polygrad_fast.learners.td3_bc import TD3BC

__all__ = [
    "IQL",
    "TD3BC",
    "ActorCritic",
    "Learner",
    "OfflineLearner",
    "build_learner",
    "build_policy",
]
