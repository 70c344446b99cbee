"""A transformer that predicts what follows from the steps so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers.shown_range import ShownRange
from polygrad_fast.denoisers.transformer import TransformerBlock, init_transformer
from polygrad_fast.errors import InputError


class TransformerDynamics(nn.Module):
    """Predict o' - o, reward and the logit of the terminal flag of every step from this step and
    those before: the blocks of `TransformerDenoiser`, one token per observation and action.

    Everything is normalized. Differences are in units of `difference_scale` [S], as those of
    `OneStepNetwork`.

    Args:
        observation_dim, action_dim: S and A.
        context: the most steps T that it reads (15 in the paper).
        hidden_dim, num_layers, num_heads: width, blocks and attention heads.

    Raises:
        InputError: hidden_dim is no multiple of num_heads.
    """

    process_noise = False

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        context: int = 15,
        hidden_dim: int = 312,
        num_layers: int = 6,
        num_heads: int = 4,
    ):
        super().__init__()
        if hidden_dim % num_heads:
            raise InputError(
                f"hidden_dim must be a multiple of num_heads, got {hidden_dim} and num_heads "
                f"{num_heads}"
            )
        self.observation_dim, self.action_dim, self.context = observation_dim, action_dim, context
        self.input = nn.Linear(observation_dim + action_dim, hidden_dim)
        self.position_embedding = nn.Embedding(context, hidden_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_dim, num_heads) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, observation_dim + 2)
        self.register_buffer("difference_scale", torch.zeros(observation_dim))
        self.noted = {"difference_scale": "first"}
        self.range = ShownRange(observation_dim)
        init_transformer(self, self.blocks)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, T, S] and [B, T, A], T at most `context`, to differences in their own units
        [B, T, S], rewards [B, T] and terminal logits [B, T].

        Raises:
            InputError: more steps than the context holds.
        """
        steps = observations.shape[1]
        if steps > self.context:
            raise InputError(f"observations must be of at most {self.context} steps, got {steps}")
        x = self.input(torch.cat([observations, actions], dim=-1))
        x = x + self.position_embedding.weight[:steps]
        for block in self.blocks:
            x = block(x)
        output = self.output(self.norm(x))
        return output[..., :-2], output[..., -2], output[..., -1]
