"""A denoiser of single transitions, conditioned on the observation and the action."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers.residual_mlp import ResidualBlock
from polygrad_fast.denoisers.shown_range import ShownRange
from polygrad_fast.denoisers.step_embedding import RandomFourierFeatures, step_mlp


class TransitionDenoiser(nn.Module):
    """EDM's F_theta of one step: SynthER's residual MLP (arXiv 2303.06614) with observation and
    action concatenated to its input (Rigter et al., appendix C.3).

    A transition is [o' - o | reward | flag], D = S + 2, the flag -1 or 1. Everything is normalized;
    differences are in units of `difference_scale` [S], as those of `OneStepNetwork`.

    Args:
        observation_dim, action_dim: S and A.
        hidden_dim, num_layers: width and residual blocks (1024 and 6 in SynthER).
    """

    def __init__(
        self, observation_dim: int, action_dim: int, hidden_dim: int = 1024, num_layers: int = 6
    ):
        super().__init__()
        self.observation_dim, self.action_dim = observation_dim, action_dim
        state_dim = observation_dim + 2
        self.input = nn.Linear(state_dim + observation_dim + action_dim, hidden_dim)
        self.noise_mlp = step_mlp(RandomFourierFeatures(16), 17, hidden_dim)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, state_dim)
        self.register_buffer("difference_scale", torch.zeros(observation_dim))
        self.noted = {"difference_scale": "first"}
        self.range = ShownRange(observation_dim)

    def forward(
        self, transitions: Tensor, c_noise: Tensor, observations: Tensor, actions: Tensor
    ) -> Tensor:
        """Return F_theta(c_in x, c_noise | o, a): [N, D], [N], [N, S], [N, A] -> [N, D]."""
        x = self.input(torch.cat([transitions, observations, actions], dim=-1))
        x = x + self.noise_mlp(c_noise)
        for block in self.blocks:
            x = block(x)
        return self.output(torch.relu(self.norm(x)))
