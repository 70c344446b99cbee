"""An untrained agent whose replay buffer has been filled by random actions."""

import dataclasses

import pytest

import polygrad_fast as pg


@pytest.fixture(scope="module")
def agent() -> pg.PolyGRAD:
    config = pg.TrainConfig.from_preset("quick")
    config = dataclasses.replace(
        config,
        world_model="autoregressive",
        autoregressive=dataclasses.replace(config.autoregressive, pretrain_updates=0),
        learning_starts=600,
        eval_interval=10**6,
        eval_episodes=1,
    )
    return pg.PolyGRAD("Hopper-v5", seed=0, device="cpu", config=config).learn(600)
