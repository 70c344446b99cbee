"""One network for the step of an environment: what follows from an observation and an action."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.denoisers.shown_range import ShownRange
from polygrad_fast.structure import structure
from polygrad_fast.terminals import alive_steps

MIN_DIFFERENCE_SCALE = 1e-2
"""Smallest unit of a predicted difference, in normalized observations: entries that hardly move."""
RESIDUAL_DECAY = 0.999
"""Of earlier squared errors, per update."""


class OneStepNetwork(nn.Module):
    """Predict o' - o, reward and the logit of the terminal flag from one observation and action.

    Everything is normalized. Differences are predicted in units of `difference_scale` [S], their
    standard deviation in the first batch that `one_step_losses` gets; until then it is 0, so that
    nothing moves.

    Args:
        observation_dim, action_dim: S and A.
        hidden_dim, num_layers: width and number of hidden layers.
        process_noise: also measure how far the data scatter around the predictions, as
            `residual_scale`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dim: int,
        num_layers: int,
        process_noise: bool = False,
    ):
        super().__init__()
        self.observation_dim, self.action_dim = observation_dim, action_dim
        layers: list[nn.Module] = []
        width = observation_dim + action_dim
        for _ in range(num_layers):
            layers += [nn.Linear(width, hidden_dim), nn.SiLU()]
            width = hidden_dim
        self.network = nn.Sequential(*layers, nn.Linear(width, observation_dim + 2))
        self.register_buffer("difference_scale", torch.zeros(observation_dim))
        self.noted = {"difference_scale": "first"}
        self.range = ShownRange(observation_dim)
        self.process_noise = process_noise
        if process_noise:
            self.register_buffer("residual_squares", torch.zeros(observation_dim + 1))
            self.register_buffer("residual_weight", torch.zeros(()))
            self.noted |= {"residual_squares": "mean", "residual_weight": "first"}
        self.built = structure(self)

    @property
    def residual_scale(self) -> Tensor:
        """Root mean square [S + 1] of the errors of the differences, in their own units, and of the
        reward, over the last thousands of updates; with `process_noise` only. 0 before training."""
        return (self.residual_squares / self.residual_weight.clamp(min=1e-8)).sqrt()

    @torch.no_grad()
    def note_residuals(self, squares: Tensor) -> None:
        """Count the mean squared errors [S + 1] of a batch."""
        self.residual_squares.lerp_(squares, 1.0 - RESIDUAL_DECAY)
        self.residual_weight.lerp_(torch.ones_like(self.residual_weight), 1.0 - RESIDUAL_DECAY)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [..., S] and [..., A] to differences in their own units [..., S], rewards [...] and
        terminal logits [...]."""
        output = self.network(torch.cat([observations, actions], dim=-1))
        return output[..., :-2], output[..., -2], output[..., -1]


def one_step_losses(
    network: OneStepNetwork,
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    flags: Tensor,
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the losses of every step of windows, three scalars by name.

    Squared error of differences (in units of their deviation) and of the reward, and binary
    cross-entropy of the terminal flag; a window's padding carries no weight, and a terminal step
    none for its difference, which is not in the data.

    Args:
        network: what it predicts is compared; its unit of differences is set if it has none, the
            range of what the windows show is noted, and residuals if it measures them.
        observations, actions, rewards: normalized [B, H, S], [B, H, A] and [B, H].
        flags: terminals [B, H], 0 or 1.
        evaluate: computes what the network does; None: the network itself.
    """
    wanted = observations[:, 1:] - observations[:, :-1]
    is_real = alive_steps(flags).float()
    goes_on = (is_real * (1.0 - flags))[:, :-1]
    measure_scale(network.difference_scale, wanted, goes_on.unsqueeze(-1))
    network.range.note(observations, rewards, is_real)
    differences, predicted, logits = (evaluate or network)(observations, actions)
    error = differences[:, :-1] - wanted / network.difference_scale
    entropy = F.binary_cross_entropy_with_logits(logits, flags, reduction="none")
    squares, reward_loss = error.square(), _weighted_mean((predicted - rewards).square(), is_real)
    if network.process_noise:
        of_differences = [_weighted_mean(entry, goes_on) for entry in squares.unbind(-1)]
        network.note_residuals(torch.stack([*of_differences, reward_loss]))
    return {
        "observation_loss": _weighted_mean(squares.mean(-1), goes_on),
        "reward_loss": reward_loss,
        "terminal_loss": _weighted_mean(entropy, is_real),
    }


@torch.no_grad()
def measure_scale(scale: Tensor, differences: Tensor, weights: Tensor) -> None:
    """Set the unit of differences [..., S], weighted by [..., 1], once, from the first batch: it
    may not move later."""
    rows = tuple(range(differences.ndim - 1))
    mean = (differences * weights).sum(rows) / weights.sum().clamp(min=1.0)
    variance = ((differences - mean).square() * weights).sum(rows) / weights.sum().clamp(1.0)
    measured = variance.sqrt().clamp(min=MIN_DIFFERENCE_SCALE)
    scale.copy_(torch.where(scale > 0, scale, measured))


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1.0)
