"""Folded networks compute what the networks compute."""

import copy

import pytest
import torch

import polygrad_fast as pg
from polygrad_fast.sampling.folding import fold_policy_input, fold_residual_mlp

S, A, H, K = 3, 2, 4, 6


def evaluate(folded, x: torch.Tensor, k: int) -> torch.Tensor:
    """Run a folded MLP in float64: [B, H (D + A)] -> [B, H D]."""
    x = x @ folded.input_weight.double().T + folded.input_rows[k].double()
    for layer in folded.layers:
        h = layer.norm(x) if layer.norm else x
        row = layer.rows[k if len(layer.rows) > 1 else 0]
        x = x + torch.relu(h) @ layer.weight.double().T + row.double()
    x = folded.norm(x) if folded.norm else x
    return torch.relu(x) @ folded.output.weight.double().T + folded.output.bias.double()


@pytest.mark.parametrize("conditioning", ["input", "layer"])
@pytest.mark.parametrize("timesteps", [range(K), (0, 3, 5), (2,)])
def test_residual_mlp(conditioning, timesteps):
    torch.manual_seed(0)
    net = pg.ResidualMLPDenoiser(
        S, A, H, 16, 2, step_conditioning=conditioning, num_train_timesteps=K
    ).double()
    x, u = torch.randn(5, H, S + 2).double(), torch.randn(5, H, A).double()
    flat = torch.cat([x, u], dim=-1).flatten(1)
    with torch.no_grad():
        folded = fold_residual_mlp(net, torch.tensor(timesteps))
        assert len(folded.input_rows) == len(timesteps)
        for k, timestep in enumerate(timesteps):
            wanted = net(x, u, torch.full((5,), timestep)).flatten(1)
            torch.testing.assert_close(evaluate(folded, flat, k), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normed_inputs", [False, True])
def test_policy_input(normed_inputs):
    torch.manual_seed(0)
    mean, std = torch.tensor([100.0, 0.0, -5.0]), torch.tensor([0.01, 1.0, 30.0])
    normalizer = pg.Normalizer.from_moments(
        observations=(mean, std), actions=(torch.zeros(A), torch.ones(A))
    )
    policy = pg.GaussianPolicy(S, A, 8, normed_inputs=normed_inputs, normalizer=normalizer)
    x = torch.randn(5, S).double()
    with torch.no_grad():
        weight, bias = fold_policy_input(policy, normalizer)
        seen = x if normed_inputs else copy.deepcopy(normalizer).double().unnormalize(
            x, "observations"
        )  # fmt: skip
        wanted = copy.deepcopy(policy.network[0]).double()(seen)
    torch.testing.assert_close(x @ weight.double().T + bias.double(), wanted, rtol=0, atol=1e-9)
