"""What learns a policy from trajectories: one file each, behind the interface in `base`."""

from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.learners.base import Learner
from polygrad_fast.learners.build import build_learner, build_policy

__all__ = ["ActorCritic", "Learner", "build_learner", "build_policy"]
