"""Environment steps with all updates due after them, on an imitated GPU and on a real one."""

from __future__ import annotations

import fake_cuda
import pytest
import torch

import polygrad_fast as pg
from cases import tiny_config

STEPS = 8
world_models = pytest.mark.parametrize("world_model", ["trajectory_diffusion", "autoregressive"])


def replaying_agent(world_model: str) -> pg.PolyGRAD:
    """An agent whose updates are replays already, and whose episode ends within the next steps."""
    options = dict(engine="torch", dtype="float32", policy_delay_steps=0, replay_capacity=100)
    config = tiny_config(world_model=world_model, learning_starts=184, **options)
    agent = pg.PolyGRAD("Pendulum-v1", device="cuda", config=config)
    while agent.num_timesteps < 196:  # six policy updates, of which three are eager
        agent.step()
    return agent


def take_steps(agent: pg.PolyGRAD) -> None:
    for _ in range(STEPS):
        agent.step()
    assert agent.replay.num_episodes == 1 and agent.replay.num_steps == 100  # it is full


@world_models
def test_the_host_waits_for_nothing_but_the_policys_copy(world_model):
    """For that of the policy update before, once per update."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here")
    with fake_cuda.installed() as gpu:
        agent = replaying_agent(world_model)
        gpu.syncs.clear()
        take_steps(agent)
        assert gpu.syncs == {"Event.synchronize": STEPS // 2}


@pytest.mark.gpu
@world_models
def test_whole_updates_do_not_synchronize(world_model):
    agent = replaying_agent(world_model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(agent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
