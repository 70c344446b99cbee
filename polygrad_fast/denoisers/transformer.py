"""Causal transformer denoiser over (state, action) pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.denoisers.step_embedding import SinusoidalFeatures, check_inputs, step_mlp
from polygrad_fast.errors import InputError
from polygrad_fast.structure import structure


class TransformerBlock(nn.Module):
    """Pre-LayerNorm causal attention, GELU MLP of four times the width: [B, H, E] -> [B, H, E]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.mlp_input = nn.Linear(dim, 4 * dim)
        self.mlp_output = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_output(F.gelu(self.mlp_input(self.norm_2(x))))


def init_transformer(module: nn.Module, blocks: nn.ModuleList) -> None:
    """Draw all weights of a module of `TransformerBlock`s as GPT-2's: standard deviation 0.02, of
    residual projections less with more blocks."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
    for block in blocks:
        for linear in (block.attention_output, block.mlp_output):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * len(blocks)))


class TransformerDenoiser(nn.Module):
    """eps_theta with one token per (state, action) pair (paper, appendix A, table 3).

    Args:
        observation_dim, action_dim, horizon: S, A and H (the context length).
        hidden_dim: embedding width, a multiple of num_heads (paper: 312).
        num_layers, num_heads: 6 blocks, 4 heads in the paper.
        step_conditioning: "input" embeds the diffusion step by sinusoidal features and an MLP
            (released code); "learned" by a table with one row per step (paper).
        num_train_timesteps: K; only "learned" needs it.

    Raises:
        InputError: a size that cannot be, or another step_conditioning.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        horizon: int,
        hidden_dim: int = 312,
        num_layers: int = 6,
        num_heads: int = 4,
        step_conditioning: str = "input",
        num_train_timesteps: int = 128,
    ):
        super().__init__()
        for name, value in (
            ("observation_dim", observation_dim),
            ("action_dim", action_dim),
            ("horizon", horizon),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
        ):
            as_integer(value, name, 1)
        if hidden_dim < 4 or hidden_dim % 2 or hidden_dim % num_heads:
            raise InputError(
                f"hidden_dim must be even, at least 4 and a multiple of num_heads, got "
                f"{hidden_dim} and num_heads {num_heads}"
            )
        self.observation_dim, self.action_dim, self.horizon = observation_dim, action_dim, horizon
        self.hidden_dim, self.num_layers, self.num_heads = hidden_dim, num_layers, num_heads
        self.step_conditioning = step_conditioning
        self.num_embedded_steps = num_train_timesteps if step_conditioning == "learned" else None
        self.state_dim = observation_dim + 2
        self.input = nn.Linear(self.state_dim + action_dim, hidden_dim)
        self.position_embedding = nn.Embedding(horizon, hidden_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_dim, num_heads) for _ in range(num_layers)
        )
        self.output = nn.Linear(hidden_dim, self.state_dim)
        if step_conditioning == "input":
            self.step_mlp = step_mlp(SinusoidalFeatures(hidden_dim), hidden_dim, hidden_dim)
        elif step_conditioning == "learned":
            self.step_mlp = nn.Embedding(num_train_timesteps, hidden_dim)
        else:
            raise InputError(
                f"step_conditioning must be 'input' or 'learned', got {step_conditioning!r}"
            )
        init_transformer(self, self.blocks)
        self.built = structure(self)

    def forward(self, trajectory: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Predict noise or clean states [B, H, D], normalized; see `polygrad_fast.Denoiser`.

        Raises:
            InputError: another shape or dtype than [B, H, D], [B, H, A] and 0-based steps [B].
        """
        check_inputs(self, trajectory, actions, timesteps)
        x = self.input(torch.cat([trajectory, actions], dim=-1))
        x = x + self.position_embedding.weight + self.step_mlp(timesteps).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return self.output(x)
