"""The policy and the learner that a configuration asks for."""

from __future__ import annotations

import torch
from torch import nn

from polygrad_fast.config import TrainConfig
from polygrad_fast.denoisers.dynamics import Dynamics
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
from polygrad_fast.protocols import check_policy


def build_policy(
    config: TrainConfig,
    normalizer: Normalizer,
    device: torch.device,
    own: nn.Module | None = None,
) -> nn.Module:
    """Return a policy for the normalizer's dimensions: a new one, or the user's own.

    Raises:
        InputError: the user's own cannot act, imagine or be trained.
    """
    if own is not None:
        if isinstance(own, nn.Module):
            own.to(device)
        shapes = (), (3,), (2, config.horizon)  # as it acts, evaluates and imagines
        check_policy(own, normalizer, shapes, device, trained=True)
        return own
    c = config.policy
    return GaussianPolicy(
        normalizer.observation_dim,
        normalizer.action_dim,
        c.hidden_dim,
        c.num_layers,
        c.init_std,
        c.min_std,
        c.normed_inputs,
        normalizer,
    ).to(device)


def build_learner(
    config: TrainConfig,
    policy: nn.Module,
    normalizer: Normalizer,
    device: torch.device,
    dynamics: Dynamics | None = None,
) -> ActorCritic:
    """Return the actor-critic that trains a policy, with a new value function, on a device; with
    the dynamics of the world model, if it has some.

    Raises:
        InputError: an option does not fit the policy or the world model.
    """
    c = config.policy
    value_function = ValueFunction(normalizer.observation_dim, c.hidden_dim, c.num_layers)
    learner = ActorCritic(
        policy, value_function.to(device), normalizer, config.a2c, c.normed_inputs, dynamics
    )
    if config.normalizer.preserve_functions:
        learner.first_layers()  # refused now or never
    return learner
