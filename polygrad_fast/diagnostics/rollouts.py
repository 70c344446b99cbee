"""Trajectories imagined from starts, and what the simulator says to starts and imagined steps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from polygrad_fast.data import ActionScaler
from polygrad_fast.diagnostics.simulator import Simulator
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.protocols import policy_moments
from polygrad_fast.sampling import TrajectoryBatch
from polygrad_fast.terminals import alive_steps
from polygrad_fast.world_models import WorldModel


def imagine(
    world_model: WorldModel,
    policy: Any,
    observations: Tensor,
    generator: torch.Generator,
    batch_size: int,
    horizon: int | None = None,
    progress: bool = False,
) -> TrajectoryBatch:
    """Imagine a normalized trajectory from each normalized observation [B, S].

    Args:
        generator: on the observations' device.
        batch_size: trajectories imagined at a time.
        horizon: as in `WorldModel.imagine`.
        progress: show a progress bar.

    Raises:
        NonFiniteError: something imagined is not finite.
    """
    parts = []
    with tqdm(
        total=len(observations),
        desc="imagining",
        unit="trajectory",
        leave=False,
        dynamic_ncols=True,
        disable=not progress,
    ) as bar:
        for part in observations.split(batch_size):
            batch = world_model.imagine(part, policy, generator, normalized=True, horizon=horizon)
            batch.check_finite()
            parts.append(batch)
            bar.update(len(part))
    return TrajectoryBatch.joined(parts)


@torch.no_grad()
def simulate(
    simulator: Simulator,
    policy: Any,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    observations: Tensor,
    horizon: int,
    generator: torch.Generator,
) -> TrajectoryBatch:
    """Play the policy for `horizon` steps from each observation, with actions drawn from it.

    Past a terminal step a trajectory is padded as the replay buffer's windows are: last observation
    and action, reward 0, terminal 1.

    Args:
        observations: raw [B, S], at least one.
        generator: of the actions, on the CPU.

    Returns:
        A normalized batch, as `WorldModel.imagine(..., normalized=True)` returns it.

    Raises:
        InputError: the simulation blew up.
    """
    device = observations.device
    current = observations.cpu().clone()
    states = []
    for observation in current.numpy():
        simulator.set(observation)
        states.append(simulator.state())
    ended = np.zeros(len(current), dtype=bool)
    action = torch.zeros(len(current), normalizer.action_dim)
    steps = []
    for t in range(horizon):
        observation = current.clone()
        moments = policy_moments(policy, normalizer, observation.to(device), normalized=False)
        mean, std = (moment.cpu() for moment in moments)
        drawn = mean + std * torch.randn(mean.shape, generator=generator)
        action = torch.where(torch.from_numpy(ended).unsqueeze(1), action, drawn)
        reward = torch.zeros(len(current))
        taken = action_scaler.to_environment(action.numpy())
        for i in np.flatnonzero(~ended):
            simulator.restore(states[i])
            following, reward[i], ended[i] = simulator.step(taken[i])
            if np.isnan(following).any():
                raise InputError(
                    f"{simulator.name} blew up in step {t + 1} from a start in the replay buffer, "
                    f"wanted finite observations and rewards; the action was {taken[i].tolist()}"
                )
            if not ended[i]:
                states[i] = simulator.state()
                current[i] = torch.from_numpy(following)
        steps.append((observation, action, reward, torch.from_numpy(ended).float()))
    names = ("observations", "actions", "rewards", "terminals")
    batch = (torch.stack(part, dim=1).to(device) for part in zip(*steps, strict=True))
    pairs = zip(names, batch, strict=True)
    return TrajectoryBatch(**{name: normalizer.normalize(part, name) for name, part in pairs})


@dataclass(frozen=True)
class Transitions:
    """N single steps, normalized: what was imagined, and what the simulator does instead.

    The steps of imagined trajectories up to the first terminal one, but for the last of the
    horizon, whose next observation is not imagined.
    """

    observations: Tensor  # [N, S]
    actions: Tensor  # [N, A]
    rewards: Tensor  # [N], imagined
    terminals: Tensor  # [N], imagined, 0/1
    next_observations: Tensor  # [N, S], imagined; without meaning after a terminal step

    def of(self, chosen: Tensor) -> Transitions:
        """Return the chosen ones, bool [N]."""
        return Transitions(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def as_trajectories(self) -> dict[str, Tensor]:
        """Return them as trajectories of two steps, whose advantages are those at lambda 0; as the
        learner takes them."""
        return {
            "observations": torch.stack([self.observations, self.next_observations], dim=1),
            "actions": self.actions.unsqueeze(1).expand(-1, 2, -1),
            "rewards": self.rewards.unsqueeze(1).expand(-1, 2),
            "terminals": self.terminals.unsqueeze(1).expand(-1, 2),
        }


def transitions(batch: TrajectoryBatch, terminals: Tensor) -> Transitions:
    """Return the single steps of normalized trajectories with the flags 0/1 [B, H]."""
    alive = alive_steps(terminals)[:, :-1]
    return Transitions(
        batch.observations[:, :-1][alive],
        batch.actions[:, :-1][alive],
        batch.rewards[:, :-1][alive],
        terminals[:, :-1][alive],
        batch.observations[:, 1:][alive],
    )


def simulator_outcomes(
    simulator: Simulator,
    normalizer: Normalizer,
    action_scaler: ActionScaler,
    imagined: Transitions,
) -> Transitions:
    """Return imagined states and actions with the simulator's outcomes.

    From a state far from all real ones a simulation may blow up: outcomes are then NaN.
    """
    device = imagined.observations.device
    observations = normalizer.unnormalize(imagined.observations, "observations").cpu().numpy()
    actions = normalizer.unnormalize(imagined.actions, "actions").cpu().numpy()
    results = []
    for observation, action in zip(
        observations, action_scaler.to_environment(actions), strict=True
    ):
        simulator.set(observation)
        results.append(simulator.step(action))
    following, rewards, terminals = (
        torch.from_numpy(np.asarray(part, dtype=np.float32)).to(device)
        for part in zip(*results, strict=True)
    )
    return Transitions(
        imagined.observations,
        imagined.actions,
        normalizer.normalize(rewards, "rewards"),
        terminals,
        normalizer.normalize(following, "observations"),
    )
