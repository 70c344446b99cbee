"""An ensemble of one-step networks that know how uncertain they are (PETS, arXiv 1805.12114; MBPO,
arXiv 1906.08253).

M members, E of them elites, N rows, S observation, A action; everything is normalized.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.denoisers.one_step import measure_scale
from polygrad_fast.denoisers.shown_range import ShownRange
from polygrad_fast.initialization import lecun_normal_

MAX_LOG_VARIANCE, MIN_LOG_VARIANCE = 0.5, -10.0
"""What the learned bounds begin as."""
_HASH_BITS, _ODD = 24, (0x9E3779B97F4A7C15, 0x3F58476D1CE4E5B9)


class Prediction(NamedTuple):
    """What members predict of each row.

    `mean` and `log_variance` are of the S differences o' - o, in units of `difference_scale`, and
    of the reward.
    """

    mean: Tensor  # [M, N, S + 1]
    log_variance: Tensor  # [M, N, S + 1]
    logits: Tensor  # [M, N], of the terminal flag


class Steps(NamedTuple):
    """N steps of an environment."""

    observations: Tensor  # [N, S]
    actions: Tensor  # [N, A]
    differences: Tensor  # [N, S], next observation less this one; any number where not `goes_on`
    rewards: Tensor  # [N]
    terminals: Tensor  # [N], 0 or 1
    goes_on: Tensor  # [N], 0 or 1: whether the difference is known and counts
    is_real: Tensor  # [N], 0 or 1: whether the step counts


class EnsembleNetwork(nn.Module):
    """M networks with SiLU, computed together: one batched matrix product per layer.

    Log variances lie softly within bounds that are learned, one pair per output for all members.

    Args:
        observation_dim, action_dim: S and A.
        num_members, num_elites: M and E; the elites are the members with the least error on
            held-out steps, see `note_held_out`.
        hidden_dim, num_layers: width and number of hidden layers.
        generator: of the first weights; default torch's.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        num_members: int,
        num_elites: int,
        hidden_dim: int,
        num_layers: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.num_members, self.num_elites = num_members, num_elites
        sizes = [observation_dim + action_dim, *[hidden_dim] * num_layers]
        sizes.append(2 * (observation_dim + 1) + 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
            weight = torch.empty(num_members, inputs, outputs)
            lecun_normal_(weight, inputs, generator)
            self.weights.append(weight)
            self.biases.append(torch.zeros(num_members, 1, outputs))
        bounds = torch.ones(observation_dim + 1)
        self.max_log_variance = nn.Parameter(MAX_LOG_VARIANCE * bounds)
        self.min_log_variance = nn.Parameter(MIN_LOG_VARIANCE * bounds)
        self.register_buffer("difference_scale", torch.zeros(observation_dim))
        self.range = ShownRange(observation_dim)
        self.register_buffer("held_out_errors", torch.zeros(num_members))
        self.register_buffer("held_out_count", torch.zeros(()))
        self.noted = {
            "difference_scale": "first",
            "held_out_errors": "mean",
            "held_out_count": "mean",
        }

    def forward(
        self, observations: Tensor, actions: Tensor, members: Tensor | None = None
    ) -> Prediction:
        """Predict what follows.

        Args:
            observations, actions: [N, S] and [N, A], the same for all members, or [M, N, S] and
                [M, N, A].
            members: int64 [M'], which of them predict; None: all.
        """
        hidden = torch.cat([observations, actions], dim=-1)
        if hidden.ndim == 2:
            number = self.num_members if members is None else len(members)
            hidden = hidden.expand(number, *hidden.shape)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if members is not None:
                weight, bias = weight[members], bias[members]
            hidden = torch.baddbmm(bias, hidden, weight)
            hidden = F.silu(hidden) if i < last else hidden
        mean, log_variance, logits = hidden.split(
            [self.observation_dim + 1, self.observation_dim + 1, 1], dim=-1
        )
        highest, lowest = self.max_log_variance, self.min_log_variance
        log_variance = highest - F.softplus(highest - log_variance)
        log_variance = lowest + F.softplus(log_variance - lowest)
        return Prediction(mean, log_variance, logits.squeeze(-1))

    @property
    def elites(self) -> Tensor:
        """Numbers of the elites, int64 [E]."""
        return self.held_out_errors.topk(self.num_elites, largest=False).indices

    def draw(
        self, observations: Tensor, actions: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw what follows from observations [B, S] and actions [B, A].

        Each row is predicted by an elite of its own, drawn anew in every call; all elites get
        equally many rows, so that the cost is that of one network.

        Returns:
            Differences [B, S], rewards [B], both with the predicted noise, and terminal logits [B].
        """
        rows, device = len(observations), observations.device
        per_elite = math.ceil(rows / self.num_elites)
        draws = device if generator is None else generator.device
        places = torch.randperm(self.num_elites * per_elite, generator=generator, device=draws)
        places = places[:rows].to(device)
        inputs = torch.cat([observations, actions], dim=-1)
        grouped = inputs.new_zeros(self.num_elites * per_elite, inputs.shape[-1])
        grouped[places] = inputs
        grouped = grouped.view(self.num_elites, per_elite, -1)
        found = self(
            grouped[..., : self.observation_dim],
            grouped[..., self.observation_dim :],
            self.elites,
        )
        mean, log_variance, logits = (part.flatten(0, 1)[places] for part in found)
        noise = torch.randn(mean.shape, generator=generator, device=draws).to(device)
        drawn = mean + (0.5 * log_variance).exp() * noise
        return drawn[:, :-1] * self.difference_scale, drawn[:, -1], logits

    @torch.no_grad()
    def note_held_out(self, errors: Tensor, count: Tensor, decay: float) -> None:
        """Move each member's mean error on held-out steps.

        Args:
            errors: sums of squared errors of the members over `count` steps, [M].
            decay: of what was noted before.
        """
        self.held_out_errors.mul_(decay).add_(errors)
        self.held_out_count.mul_(decay).add_(count)

    @property
    def elite_error(self) -> Tensor:
        """Mean squared error of the elites on held-out steps, a scalar; 0 where there was none."""
        return self.held_out_errors[self.elites].mean() / self.held_out_count.clamp(min=1e-6)


def is_held_out(observations: Tensor, actions: Tensor, fraction: float) -> Tensor:
    """Return which steps are never trained on: bool [N], the same for the same raw numbers (float32
    [N, S] and [N, A]) whenever and wherever they come, by a hash of their bits."""
    bits = torch.cat([observations, actions], dim=-1).contiguous().view(torch.int32)
    odd = [(2 * i + 1) * _ODD[0] % 2**63 | 1 for i in range(bits.shape[1])]
    mixed = (bits.to(torch.int64) * torch.tensor(odd, device=bits.device)).sum(-1)
    for _ in range(2):  # so that low and high bits reach all others; products wrap around
        mixed = (mixed ^ ((mixed >> 29) & (2**35 - 1))) * _ODD[1]
    return (mixed >> 20) & (2**_HASH_BITS - 1) < fraction * 2**_HASH_BITS


def ensemble_losses(
    network: EnsembleNetwork,
    steps: Steps,
    counts: Tensor,
    held_out: Tensor,
    decay: float,
) -> dict[str, Tensor]:
    """Return the members' losses, summed over them, and note their errors on held-out steps.

    The negative log likelihood of differences and rewards without its constant, mean of
    (m - y)^2 / v + log v, and the binary cross-entropy of the terminal flag, as in
    `one_step_losses`.

    Args:
        network: its unit of differences is set if it has none, and the range of the steps is noted.
        steps: normalized.
        counts: how often each member sees each step, [M, N] (a bootstrap's).
        held_out: bool [N], the steps that none sees.
        decay: of earlier errors on held-out steps.

    Returns:
        Scalars: "observation_loss", "reward_loss", "terminal_loss".
    """
    measure_scale(network.difference_scale, steps.differences, steps.goes_on.unsqueeze(-1))
    following = steps.observations + steps.differences * steps.goes_on.unsqueeze(-1)
    for observations in (steps.observations, following):
        network.range.note(observations, steps.rewards, steps.is_real)
    found = network(steps.observations, steps.actions)
    wanted = torch.cat(
        [steps.differences / network.difference_scale, steps.rewards.unsqueeze(-1)], dim=-1
    )
    squared = (found.mean - wanted).square()
    likelihood = squared * (-found.log_variance).exp() + found.log_variance
    flags = steps.terminals.expand_as(found.logits)
    entropy = F.binary_cross_entropy_with_logits(found.logits, flags, reduction="none")
    seen = counts * ~held_out
    _note_errors(network, squared.detach(), steps, held_out, decay)
    return {
        "observation_loss": _mean_per_member(likelihood[..., :-1].mean(-1), seen * steps.goes_on),
        "reward_loss": _mean_per_member(likelihood[..., -1], seen * steps.is_real),
        "terminal_loss": _mean_per_member(entropy, seen * steps.is_real),
    }


def regularization(network: EnsembleNetwork, bound_weight: float, weight_decay: float) -> Tensor:
    """Return what pulls the bounds of log variances together and all weights to 0, a scalar."""
    bounds = network.max_log_variance.sum() - network.min_log_variance.sum()
    squares = sum(weight.square().sum() for weight in network.weights)
    return bound_weight * bounds + 0.5 * weight_decay * squares


def _note_errors(
    network: EnsembleNetwork, squared: Tensor, steps: Steps, held_out: Tensor, decay: float
) -> None:
    outputs = squared.shape[-1]
    observations = squared[..., :-1].sum(-1) * steps.goes_on
    errors = (observations + squared[..., -1]) / outputs
    counted = held_out & (steps.goes_on > 0)
    network.note_held_out((errors * counted).sum(-1), counted.sum(), decay)


def _mean_per_member(values: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over members of their weighted means, [M, N] each."""
    return ((values * weights).sum(-1) / weights.sum(-1).clamp(min=1.0)).sum()
