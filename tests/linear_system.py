"""A small system with known answers, and a policy, for tests of world models."""

from dataclasses import replace

import torch

import polygrad_fast as pg
from polygrad_fast.data.replay import Windows

S, A, H = 2, 1, 5
LOW, HIGH = -1.0, 1.0
MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5])


def step(observations, actions):
    """o' = M o + N clip(a); reward o[0] + 2 clip(a); terminal where o[1] is above 0."""
    clipped = actions.clamp(LOW, HIGH)
    moved = observations @ torch.tensor([[0.9, 0.1], [-0.2, 0.8]]).T
    moved = moved + clipped @ torch.tensor([[0.3, -0.1]])
    rewards = observations[..., 0] + 2 * clipped[..., 0]
    return moved, rewards, (observations[..., 1] > 0).float()


def make_windows(batch: int, seed: int) -> Windows:
    g = torch.Generator().manual_seed(seed)
    observation = MEAN + STD * torch.randn(batch, S, generator=g)
    ended = torch.zeros(batch, dtype=torch.bool)
    action, reward = torch.zeros(batch, A), torch.zeros(batch)
    columns = []
    for _ in range(H):
        action = torch.where(ended[:, None], action, 1.5 * torch.randn(batch, A, generator=g))
        moved, reward, terminal = step(observation, action)
        reward, terminal = reward.masked_fill(ended, 0.0), terminal.masked_fill(ended, 1.0)
        columns.append((observation, action, reward, terminal))
        ended = ended | (terminal > 0)
        observation = torch.where(ended[:, None], observation, moved)
    return Windows(*(torch.stack(part, dim=1) for part in zip(*columns, strict=True)))


def with_junk_after_ends(windows: Windows) -> tuple[Windows, torch.Tensor]:
    """Return the windows with other numbers after terminal steps, and where these are, bool
    [B, H]."""
    ended = windows.terminals.cumsum(1) > 1
    assert ended.any()
    junk = replace(
        windows,
        observations=windows.observations.masked_fill(ended[..., None], 77.0),
        rewards=windows.rewards.masked_fill(ended, 55.0),
    )
    return junk, ended


def make_normalizer() -> pg.Normalizer:
    """Moments of the system's windows, about."""
    return pg.Normalizer.from_moments(
        observations=(MEAN, STD),
        actions=(torch.tensor([0.2]), torch.tensor([0.7])),
        rewards=(0.5, 3.0),
        terminals=(0.1, 0.3),
    )


def policy(observations):
    return 0.3 * observations[..., :1], torch.full_like(observations[..., :1], 0.8)
