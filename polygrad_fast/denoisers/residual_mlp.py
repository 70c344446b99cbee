"""Residual MLP denoiser over the flattened trajectory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.denoisers.step_embedding import RandomFourierFeatures, check_inputs, step_mlp
from polygrad_fast.errors import InputError
from polygrad_fast.structure import structure


class ResidualBlock(nn.Module):
    """x -> x + Linear(ReLU(LayerNorm(x))): [B, W] -> [B, W]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.relu(self.norm(x)))


class StepConditionedBlock(nn.Module):
    """x -> Linear(ReLU(x)) + x + embed(i) (paper, appendix A): [B, W], [B] -> [B, W]."""

    def __init__(self, dim: int, num_train_timesteps: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.step_embedding = nn.Embedding(num_train_timesteps, dim)
        nn.init.normal_(self.step_embedding.weight, std=0.02)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.linear(torch.relu(x)) + x + self.step_embedding(timesteps)


class ResidualMLPDenoiser(nn.Module):
    """eps_theta over a flattened trajectory of H (state, action) pairs.

    Args:
        observation_dim, action_dim, horizon: S, A and H.
        hidden_dim: width (paper: 1024 for H = 10, 2048 above).
        num_layers: residual blocks.
        embed_dim: lower bound of the input embedding's width (released code: max(H (S + 2 + A),
            128)).
        step_conditioning: "input" adds an MLP embedding of the step to the input, with LayerNorm
            in the blocks (released code); "layer" adds a learned embedding of the step in every
            block, without LayerNorm (paper, appendix A).
        num_train_timesteps: K; only "layer" needs it, one embedding row per step.

    Raises:
        InputError: a size that is no integer of at least 1, or another step_conditioning.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        horizon: int,
        hidden_dim: int = 1024,
        num_layers: int = 6,
        embed_dim: int = 128,
        step_conditioning: str = "input",
        num_train_timesteps: int = 128,
    ):
        super().__init__()
        for name, value in (
            ("observation_dim", observation_dim),
            ("action_dim", action_dim),
            ("horizon", horizon),
            ("hidden_dim", hidden_dim),
            ("num_layers", num_layers),
        ):
            as_integer(value, name, 1)
        self.observation_dim, self.action_dim, self.horizon = observation_dim, action_dim, horizon
        self.hidden_dim, self.num_layers = hidden_dim, num_layers
        self.step_conditioning = step_conditioning
        self.num_embedded_steps = num_train_timesteps if step_conditioning == "layer" else None
        self.state_dim = observation_dim + 2
        in_dim, out_dim = horizon * (self.state_dim + action_dim), horizon * self.state_dim
        if step_conditioning == "input":
            embed_dim = max(in_dim, embed_dim)
            self.proj = nn.Linear(in_dim, embed_dim)
            self.step_mlp = step_mlp(RandomFourierFeatures(16), 17, embed_dim)
            self.input = nn.Linear(embed_dim, hidden_dim)
            self.blocks = nn.ModuleList(ResidualBlock(hidden_dim) for _ in range(num_layers))
            self.norm = nn.LayerNorm(hidden_dim)
        elif step_conditioning == "layer":
            self.input = nn.Linear(in_dim, hidden_dim)
            self.blocks = nn.ModuleList(
                StepConditionedBlock(hidden_dim, num_train_timesteps) for _ in range(num_layers)
            )
        else:
            raise InputError(
                f"step_conditioning must be 'input' or 'layer', got {step_conditioning!r}"
            )
        self.output = nn.Linear(hidden_dim, out_dim)
        self.built = structure(self)

    def forward(self, trajectory: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Predict noise or clean states [B, H, D], normalized; see `polygrad_fast.Denoiser`.

        Raises:
            InputError: another shape or dtype than [B, H, D], [B, H, A] and 0-based steps [B].
        """
        check_inputs(self, trajectory, actions, timesteps)
        x = torch.cat([trajectory, actions], dim=-1).flatten(1)
        if self.step_conditioning == "input":
            x = self.input(self.proj(x) + self.step_mlp(timesteps))
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        else:
            x = self.input(x)
            for block in self.blocks:
                x = block(x, timesteps)
        return self.output(torch.relu(x)).view(trajectory.shape)
