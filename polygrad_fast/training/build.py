"""The parts of Algorithm 3, put together."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import torch
from torch import nn

from polygrad_fast.config import TrainConfig
from polygrad_fast.data import ActionScaler, ReplayBuffer, ResumableEnvironment, check_spaces
from polygrad_fast.learners import build_learner, build_policy
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.ranks import Ranks
from polygrad_fast.runs.random_streams import RandomStreams
from polygrad_fast.training.actor import Actor
from polygrad_fast.training.collector import Collector
from polygrad_fast.training.imagination import ImaginationTraining
from polygrad_fast.world_models import build_world_model


def build_training(
    config: TrainConfig,
    environments: Sequence[gymnasium.Env],
    seed: int,
    device: torch.device,
    ranks: Ranks,
    denoiser: nn.Module | None = None,
    policy: nn.Module | None = None,
) -> ImaginationTraining:
    """Return a new training, with networks that the seed initializes.

    Args:
        config: resolved.
        environments: this process's, to train on; all are alike.
        seed: of all random numbers; also seeds the global generators.
        device: of networks and data.
        ranks: the processes that train together.
        denoiser, policy: the user's own instead of the configured ones.

    Raises:
        InputError: one of the user's own cannot be used, or an option does not fit it.
    """
    dims = check_spaces(environments[0])
    streams = RandomStreams(seed, device, ranks.index)
    scaler = ActionScaler(environments[0].action_space, config.rescale_actions)
    seeds = streams.environment_seeds(config.num_envs)[ranks.index :: ranks.number]
    resumable = [
        ResumableEnvironment(env, seed) for env, seed in zip(environments, seeds, strict=True)
    ]
    replay = ReplayBuffer(config.replay_capacity, config.horizon, *dims, device, config.num_envs)
    normalizer = Normalizer(*dims).to(device)
    bounds = scaler.low, scaler.high
    # before the policy: the networks' initial weights come from one stream
    world_model = build_world_model(config, normalizer, bounds, device, denoiser)
    policy = build_policy(config, normalizer, device, policy)
    learner = build_learner(config, policy, normalizer, device, world_model.dynamics())
    world_model.prepare(policy)
    actor = Actor(policy, normalizer, scaler, device)
    collector = Collector(
        resumable,
        scaler,
        actor,
        streams.acting,
        config.learning_starts // ranks.number,
        config.env_processes,
    )
    return ImaginationTraining(
        config, collector, scaler, actor, replay, normalizer, world_model, learner, streams, ranks
    )
