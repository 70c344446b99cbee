"""Gaussian policy with one learned log standard deviation, and the value function."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError
from polygrad_fast.structure import structure

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def mlp(in_dim: int, hidden_dim: int, num_layers: int, out_dim: int) -> nn.Sequential:
    """Return num_layers x [Linear, LayerNorm, ELU] and a final Linear, Dreamer's trunk as released.

    It maps [..., in_dim] to [..., out_dim]; LayerNorm's epsilon is 1e-3.
    """
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim, eps=1e-3), nn.ELU()]
        in_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim))


class GaussianPolicy(nn.Module):
    """pi(a | s) = N(tanh(MLP(s)), exp(log_std) + min_std), raw actions (paper, appendix A).

    Args:
        observation_dim, action_dim: S and A.
        hidden_dim, num_layers: the trunk's width and depth.
        init_std: standard deviation at the start, > min_std.
        min_std: its lower bound, >= 0.
        normed_inputs: whether the network reads normalized observations; `normalizer` must then be
            given for calls with raw ones.
        normalizer: shared, not owned: its buffers are not part of this module's state.

    Raises:
        InputError: standard deviations in another order, or no normalizer where one is needed.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        num_layers: int = 2,
        init_std: float = 1.0,
        min_std: float = 0.1,
        normed_inputs: bool = False,
        normalizer: nn.Module | None = None,
    ):
        super().__init__()
        if not init_std > min_std >= 0:
            raise InputError(
                f"init_std must be above min_std, and that at least 0, got init_std {init_std} and "
                f"min_std {min_std}"
            )
        if normed_inputs and normalizer is None:
            raise InputError("normalizer must be given with normed_inputs=True, got None")
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.min_std = min_std
        self.normed_inputs = normed_inputs
        object.__setattr__(self, "normalizer", normalizer)
        self.network = mlp(observation_dim, hidden_dim, num_layers, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(init_std - min_std)))
        self.built = structure(self, frozenset({"min_std", "normed_inputs", "normalizer"}))

    @property
    def std(self) -> Tensor:
        """Standard deviation [A] of the raw actions, the same at every state."""
        return self.log_std.exp() + self.min_std

    def with_std(self, std: float) -> GaussianPolicy:
        """Return a copy whose standard deviation is another one at every state and in every action;
        means and normalizer are this policy's.

        Raises:
            InputError: std is not a positive finite number.
        """
        if not (isinstance(std, (int, float)) and 0 < std < math.inf):
            raise InputError(f"std must be a positive finite number, got {std!r}")
        changed = copy.deepcopy(self, {id(self.normalizer): self.normalizer})
        changed.min_std = 0.0
        with torch.no_grad():
            changed.log_std.fill_(math.log(std))
        return changed

    @torch.no_grad()
    def on_raw_observations(self) -> GaussianPolicy:
        """Return a copy that is the same function of raw observations and has no normalizer: the
        moments are folded into the first layer, as they now are."""
        copied = copy.deepcopy(self, {id(self.normalizer): None})
        if self.normed_inputs:
            first, copied.normed_inputs = copied.network[0], False
            first.weight /= self.normalizer.observations_scale
            first.bias -= first.weight @ self.normalizer.observations_mean
        return copied

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the raw actions, [..., A] each, at raw observations
        [..., S].

        Raises:
            InputError: observations of another last axis.
        """
        if observations.shape[-1:] != (self.observation_dim,):
            raise InputError(
                f"observations must be of shape [..., {self.observation_dim}], got "
                f"{tuple(observations.shape)}"
            )
        if self.normed_inputs:
            observations = self.normalizer.normalize(observations, "observations")
        return self.distribution(observations)

    def distribution(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `forward`, [..., A] each, at observations [..., S] in the space that
        the network reads: normalized with `normed_inputs`, else raw."""
        return self.squash(self.network(inputs))

    def squash(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation for the network's outputs [..., A]."""
        mean = torch.tanh(outputs)
        return mean, self.std.expand_as(mean)


class ValueFunction(nn.Module):
    """V(s), the policy's trunk with one output: [..., S] -> [...].

    Args:
        observation_dim: S.
        hidden_dim, num_layers: the trunk's width and depth.
    """

    def __init__(self, observation_dim: int, hidden_dim: int = 256, num_layers: int = 2):
        super().__init__()
        self.network = mlp(observation_dim, hidden_dim, num_layers, 1)
        self.built = structure(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return values at observations in the space the critic was trained on."""
        return self.network(inputs).squeeze(-1)


def log_prob(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(actions; mean, std), summed over the action axis: [..., A] -> [...]."""
    z = (actions - mean) / std
    return (-0.5 * z.square() - std.log() - LOG_SQRT_2PI).sum(-1)


def score(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return grad_a log N(a; mean, std) = (mean - a) / std^2, [..., A] (Algorithm 2, line 10)."""
    return (mean - actions) / std.square()


def entropy(std: Tensor) -> Tensor:
    """Return the differential entropy of a diagonal Gaussian, in nats: [..., A] -> [...]."""
    return (0.5 + LOG_SQRT_2PI + std.log()).sum(-1)
