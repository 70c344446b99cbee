"""Does the critic know what follows? Its values beside the returns of whole episodes, and of
imagined ones."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import Tensor

from polygrad_fast.data import ActionScaler
from polygrad_fast.data.environment import (
    environment_name,
    reset_environment,
    step_environment,
)
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.protocols import policy_moments
from polygrad_fast.world_models import WorldModel

NUM_STEPS = 4000
"""Environment steps that are played, the last episode's to its end; an episode that is longer is
broken off."""
NUM_IMAGINED = 256
"""At most so many of the states returns are imagined from."""
FARTHEST = 100.0
"""Standard deviations; a model has diverged where it imagines an observation beyond, before an
end."""
MAX_DIVERGED = 0.1
"""Largest share of imagined trajectories that may have diverged."""
MAX_UNKNOWN = 0.1
"""Largest weight gamma^k that the value standing in for what was not played may have in a
return."""


@dataclass(frozen=True)
class CriticError:
    """The values learning bootstraps by (`ActorCritic.target_values`) of the states of whole
    episodes, beside their discounted returns.

    Both gradients of a `GradientReport` rest on the same critic (but for its next move, which they
    are ahead): what is wrong with it shows here only. After a time limit, which is no end, a value
    stands in for what would have followed, and draws the returns towards the values a little;
    states from which its weight is above `MAX_UNKNOWN` are left out, and where none is left, for
    all episodes are short, the numbers are None.

    Where values are not the returns, what is imagined from some of the same states tells whether
    the world model hopes or fears (it is with the values) or the critic does (it is with the
    returns), as one that learns too slowly.
    """

    value: float | None
    """Mean over the states, in the unit of the rewards that the critic learns from."""
    discounted_return: float | None
    """Mean over the states, in the same unit."""
    correlation: float | None
    """Of the two over the states; chance in the returns keeps it below 1. None where either is the
    same everywhere."""
    imagined_return: float | None
    """Mean of the discounted returns, in the same unit, imagined from `NUM_IMAGINED` of the states,
    trajectory after trajectory, each from where the last one came to. A value stands in for what
    follows, with a weight of up to `MAX_UNKNOWN`. None where the model diverges on the way, or
    there are no states."""
    num_states: int
    num_episodes: int
    """In which these states lie; states of one episode tell much the same."""


def critic_error(
    environment: gymnasium.Env,
    world_model: WorldModel,
    learner: ActorCritic,
    action_scaler: ActionScaler,
    seed: int,
) -> CriticError:
    """Play whole episodes with actions drawn from the policy, imagine some, and compare.

    Args:
        environment: is reset and stepped, and left as it then is.
        world_model: imagines.
        learner: of policy, normalizer and target critic; nothing of it changes.
        seed: of episodes and actions.

    Raises:
        InputError: the environment returns something unusable.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = np.random.default_rng(seed)
    states, values, returns, played = [], [], [], 0
    while played < NUM_STEPS:
        episode = _play(environment, learner, action_scaler, int(seeds.integers(2**31)), generator)
        played += len(episode.rewards)
        found = learner.target_values(episode.observations).cpu().double().numpy()
        rewards = learner.critic_rewards(episode.rewards).cpu().double().numpy()
        gamma, following = learner.config.gamma, 0.0 if episode.terminated else found[-1]
        discounted = np.empty(len(rewards))
        for t in reversed(range(len(rewards))):
            discounted[t] = following = rewards[t] + gamma * following
        # the weight of what follows the last step, in a return from k steps before
        weights = np.full(len(rewards), gamma, dtype=float).cumprod()[::-1]
        known = (weights <= MAX_UNKNOWN) | episode.terminated
        observations = episode.observations[:-1]
        states.append(observations[torch.from_numpy(known).to(observations.device)])
        values.append(found[:-1][known])
        returns.append(discounted[known])
    num_episodes = sum(len(part) > 0 for part in values)
    imagined = imagined_return(world_model, learner, torch.cat(states), seed)
    values, returns = np.concatenate(values), np.concatenate(returns)
    varies = len(values) > 1 and np.ptp(values) > 0 and np.ptp(returns) > 0
    return CriticError(
        value=float(values.mean()) if len(values) else None,
        discounted_return=float(returns.mean()) if len(values) else None,
        correlation=float(np.corrcoef(values, returns)[0, 1]) if varies else None,
        imagined_return=imagined,
        num_states=len(values),
        num_episodes=num_episodes,
    )


@torch.no_grad()
def imagined_return(
    world_model: WorldModel, learner: ActorCritic, states: Tensor, seed: int
) -> float | None:
    """Return the mean discounted return, in the unit of the critic's rewards, of what is imagined
    from `NUM_IMAGINED` of these states.

    A trajectory begins where the last one came to, until all have ended, the value that stands in
    for the rest weighs at most `MAX_UNKNOWN`, or `NUM_STEPS` are over.

    Args:
        states: normalized [N, S].
        seed: of the choice of states, and of imagination.

    Returns:
        None where there are no states, where more than `MAX_DIVERGED` of the trajectories come
        farther than `FARTHEST` before they end (fewer are left out), or where so many steps are not
        enough.
    """
    generator = torch.Generator(states.device).manual_seed(seed)
    gamma, policy = learner.config.gamma, learner.policy
    chosen = torch.randperm(len(states), generator=generator, device=states.device)
    states = states[chosen[:NUM_IMAGINED]]
    total = states.new_zeros(len(states))
    usable = torch.ones(len(states), dtype=torch.bool, device=states.device)
    goes_on, discount, steps = usable.clone(), 1.0, 0
    while discount > MAX_UNKNOWN and steps < NUM_STEPS and (usable & goes_on).any():
        batch = world_model.imagine(states, policy, generator, normalized=True)
        flags = learner.normalizer.unnormalize(batch.terminals, "terminals") > 0.5
        rewards = learner.critic_rewards(batch.rewards)
        near = (batch.observations.abs() <= FARTHEST).all(-1) & rewards.isfinite()  # NaN is not
        for t in range(rewards.shape[1] - 1):
            usable &= near[:, t] | ~goes_on
            total += torch.where(goes_on & usable, discount * rewards[:, t], 0.0)
            goes_on = goes_on & ~flags[:, t]
            discount, steps = discount * gamma, steps + 1
        usable &= near[:, -1] | ~goes_on
        states = torch.where((goes_on & usable).unsqueeze(-1), batch.observations[:, -1], 0.0)
    if usable.double().sum() < max(1, (1.0 - MAX_DIVERGED) * len(states)):
        return None
    if discount > MAX_UNKNOWN and (usable & goes_on).any():
        return None
    total += torch.where(goes_on, discount * learner.target_values(states), 0.0)
    return total[usable].double().mean().item()


@dataclass(frozen=True)
class _Episode:
    observations: Tensor  # normalized [T + 1, S]
    rewards: Tensor  # normalized [T]
    terminated: bool


@torch.no_grad()
def _play(
    environment: gymnasium.Env,
    learner: ActorCritic,
    action_scaler: ActionScaler,
    seed: int,
    generator: torch.Generator,
) -> _Episode:
    """Return an episode, at most `NUM_STEPS` long."""
    policy, normalizer = learner.policy, learner.normalizer
    device, size = normalizer.observations_mean.device, normalizer.observation_dim
    place = f"{environment_name(environment)}, an episode for the critic"
    observations = [reset_environment(environment, seed, size, place)]
    rewards: list[float] = []
    terminated = truncated = False
    while not (terminated or truncated) and len(rewards) < NUM_STEPS:
        shown = torch.from_numpy(observations[-1]).to(device).unsqueeze(0)
        mean, std = (m.cpu() for m in policy_moments(policy, normalizer, shown, normalized=False))
        action = mean + std * torch.randn(mean.shape, generator=generator)
        taken = action_scaler.to_environment(action[0].numpy())
        step = step_environment(environment, taken, size, place)
        observation, reward, terminated, truncated = step
        observations.append(observation)
        rewards.append(reward)
    return _Episode(
        normalizer.normalize(torch.from_numpy(np.stack(observations)).to(device), "observations"),
        normalizer.normalize(torch.tensor(rewards, device=device), "rewards"),
        terminated,
    )
