"""A policy of this library that does what the policy of a file does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from polygrad_fast.data.policy_file import StoredPolicy
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.offline.task import OfflineTask
from polygrad_fast.policy import GaussianPolicy

HIDDEN_DIM = 64
UPDATES = 2000
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
"""At the start; it falls to 0."""


class Imitation(NamedTuple):
    """A policy on raw observations, and the share of the variance of the other one's means that its
    own explain, over the same observations."""

    policy: GaussianPolicy
    r2: float


def imitate(stored: StoredPolicy, task: OfflineTask) -> Imitation:
    """Fit the mean of a policy to a file's at the observations of a dataset.

    World models then imagine under the kind of policy that they imagine fastest with, as in
    training. Its standard deviation is that of the file's actions, clipped to the bounds as the
    environment takes them, about their means, in each action.
    """
    raw = task.dataset.observations
    means = task.scaler.from_environment(stored.act(raw))
    drawn = task.scaler.from_environment(stored.act(raw, np.random.default_rng(0)))
    std = torch.from_numpy((drawn - means).std(axis=0)).clamp(min=1e-3)
    observations, wanted = torch.from_numpy(raw.copy()), torch.from_numpy(means)
    normalizer = Normalizer(*stored.dims)
    moments = observations.mean(dim=0), observations.std(dim=0)
    normalizer.update({"observations": moments}, {"observations": 1e-3})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = GaussianPolicy(
            *stored.dims, HIDDEN_DIM, min_std=0.0, normed_inputs=True, normalizer=normalizer
        )
        optimizer = torch.optim.Adam(policy.network.parameters(), lr=LEARNING_RATE, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, UPDATES)
        for _ in range(UPDATES):
            rows = torch.randint(len(observations), (BATCH_SIZE,))
            loss = (policy(observations[rows])[0] - wanted[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        policy.log_std.copy_(std.log())
        errors = policy(observations)[0] - wanted
    r2 = 1 - errors.square().mean() / (wanted - wanted.mean(dim=0)).square().mean()
    return Imitation(policy.on_raw_observations(), r2.item())


def as_lists(policy: GaussianPolicy) -> dict[str, list]:
    """Return a policy's weights as JSON can express them."""
    return {name: tensor.tolist() for name, tensor in policy.state_dict().items()}


def imitation_of(
    weights: Mapping[str, list], observation_dim: int, action_dim: int
) -> GaussianPolicy:
    """Return the policy of an imitation, of which `as_lists` gave the weights."""
    policy = GaussianPolicy(observation_dim, action_dim, HIDDEN_DIM, min_std=0.0)
    policy.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    return policy
