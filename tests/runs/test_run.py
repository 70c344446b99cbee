"""What a run writes, and what it refuses to write."""

import math

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.runs.checkpoint import load_checkpoint
from polygrad_fast.runs.checkpoint_manager import CheckpointManager
from polygrad_fast.runs.run import Run


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "a": torch.ones(2),
        "count": torch.zeros((), dtype=torch.int64),
        "b": torch.tensor(value),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path, value):
    manager = CheckpointManager(tmp_path)
    run = Run({"env_id": "Pendulum-v1"}, manager)
    run.save(1, weights(0.5), {})
    run.save_best(1, weights(0.5))
    for save in (lambda: run.save(2, weights(value), {}), lambda: run.save_best(2, weights(value))):
        with pytest.raises(pg.NonFiniteError, match="^the weight b is not finite$"):
            save()
    for found in (manager.latest(), manager.best()):
        kept, _, metadata = load_checkpoint(found)
        assert kept["b"] == 0.5 and metadata["num_timesteps"] == 1
