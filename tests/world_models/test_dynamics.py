"""The dynamics that pathwise gradients differentiate are those by which a world model imagines."""

import pytest
import torch

import polygrad_fast as pg
from cases import changed
from polygrad_fast.learners.passes import actor_passes

SIZES = {"autoregressive__hidden_dim": 16, "denoiser__hidden_dim": 16, "dtype": "float32"}


def make_agent(world_model, **options):
    config = changed(pg.TrainConfig.from_preset("laptop"), world_model=world_model, **SIZES)
    return pg.PolyGRAD("Pendulum-v1", device="cpu", config=changed(config, **options))


@pytest.mark.parametrize("name", ["autoregressive", "trajectory_diffusion"])
def test_slopes_are_those_of_what_is_imagined(name):
    """Of the next observation in the one before, by finite differences through `imagine`."""
    agent = make_agent(name)
    model, normalizer, policy = agent.world_model, agent.normalizer, agent.policy
    network = model.trainer.ema_model
    network = getattr(network, "step", network)
    network.difference_scale.fill_(0.3)
    network.network[-1].bias[-1] = -14.0  # nothing ends
    g = torch.Generator().manual_seed(0)
    starts, slope = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)

    def imagined(observations):
        noise = torch.Generator().manual_seed(1)
        return model.imagine(observations, policy, noise, normalized=True)

    batch = imagined(starts)
    actions = normalizer.unnormalize(batch.actions, "actions")[:, 0]
    linearized = model.dynamics().linearize(
        starts, actions, batch.observations[:, 1], batch.rewards[:, 0]
    )
    assert (linearized.logits < -10).all()
    zeros = torch.zeros(5)
    found, in_actions = linearized.pull_back(slice(0, 5), slope, zeros, zeros)
    passes = actor_passes(policy, normalizer, None)
    found += passes.reaction(starts.unsqueeze(0), actions.unsqueeze(0))(0, in_actions)
    step = 2e-2 * torch.eye(3)
    ends = [[imagined(starts + sign * e).observations[:, 1] for sign in (1, -1)] for e in step]
    wanted = [((up - down) / 4e-2 * slope).sum(-1) for up, down in ends]
    torch.testing.assert_close(found, torch.stack(wanted, -1), rtol=0.02, atol=5e-3)
    assert in_actions.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ensemble", "transformer", "autoregressive_diffusion"])
def test_other_models_have_none_and_learn_by_the_score_function(name):
    agent = make_agent(name)
    assert agent.world_model.dynamics() is None
    assert agent.training.learner.config.gradient_estimator == "score"


def test_diffusion_has_none_without_a_rollout_that_settles():
    for options in (
        {"denoiser__kind": "residual_mlp"},
        {"sampler": pg.SamplerConfig.official(scale_actions=False)},
    ):
        assert make_agent("trajectory_diffusion", **options).world_model.dynamics() is None
    agent = make_agent("trajectory_diffusion")
    assert agent.training.learner.config.gradient_estimator == "pathwise"
    agent.world_model.denoiser.step.network[1] = torch.nn.ReLU()
    assert agent.world_model.dynamics() is None, "the passes written out are of SiLU"
