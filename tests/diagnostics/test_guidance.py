"""Tuning the guidance scale outside of training."""

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.diagnostics.guidance import tune_guidance
from polygrad_fast.world_models.guidance import GuidanceTuner


class Spreading:
    """Imagines actions that spread `wanted / scale` times as far as the policy's, and a last one
    that is far off."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.tuner = GuidanceTuner(pg.config.GuidanceConfig(initial=0.05, learning_rate=0.3))

    def imagine(self, observations, policy, generator):
        states = observations[:, None].expand(-1, 4, -1)
        mean, std = policy(states)
        noise = torch.randn(mean.shape, generator=generator)
        actions = mean + std * noise * (self.tuner.value.item() / self.wanted) ** -0.5
        actions[:, -1] += 100.0
        flags = torch.zeros(states.shape[:2])
        return pg.TrajectoryBatch(states, actions, flags, flags)

    def feedback(self, metrics):
        std, mean_abs = (metrics[f"action_{name}"].item() for name in ("std", "mean_abs"))
        assert mean_abs == pytest.approx(std, rel=0.2)
        return {"scale": self.tuner.update(metrics["action_std"])}


@pytest.mark.parametrize("wanted", [0.02, 0.4])
def test_the_scale_is_moved_until_actions_spread_as_the_policys(wanted):
    policy = pg.GaussianPolicy(3, 2, 8, 1, init_std=0.3)
    model = Spreading(wanted)
    seen = []

    def draw(generator):
        seen.append(torch.randn(200, 3, generator=generator))
        return seen[-1]

    tune_guidance(model, policy, draw, torch.Generator().manual_seed(0), 60)
    assert model.tuner.value.item() == pytest.approx(wanted, rel=0.1)
    assert len(seen) == 60 and not torch.equal(seen[0], seen[1])
