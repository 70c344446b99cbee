"""Networks of the offline agents: two hidden layers with ReLU.

N rows, S observation, A action. Kernels begin as the released code's (flax): normal, truncated at 2
standard deviations, of standard deviation 1 / sqrt(inputs); biases 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polygrad_fast.errors import InputError
from polygrad_fast.initialization import lecun_normal_

STD_OFFSET = 1e-3
"""Added to the standard deviation of observations before dividing by it."""


def relu_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, generator: torch.Generator | None = None
) -> nn.Sequential:
    """Return 2 x [Linear, ReLU] and a final Linear, from [..., in_dim] to [..., out_dim]."""
    linears = [
        nn.Linear(inputs, outputs)
        for inputs, outputs in (
            (in_dim, hidden_dim),
            (hidden_dim, hidden_dim),
            (hidden_dim, out_dim),
        )
    ]
    for linear in linears:
        lecun_normal_(linear.weight, linear.in_features, generator)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(
        linears[0], nn.ReLU(inplace=True), linears[1], nn.ReLU(inplace=True), linears[2]
    )


class BoundedPolicy(nn.Module):
    """bias + scale tanh(MLP(s)), with scale (high - low) / 2 and bias (high + low) / 2.

    Args:
        observation_dim: S.
        low, high: the actions' bounds, [A] finite numbers each.
        hidden_dim: width of the hidden layers.
        observation_moments: mean and standard deviation [S] of the observations, for a network that
            reads (s - mean) / (std + 1e-3); None: one that reads them as they are.
        generator: of the first weights.

    Raises:
        InputError: bounds that are not finite, of different lengths or in the wrong order, or
            moments of another length.
    """

    def __init__(
        self,
        observation_dim: int,
        low: Sequence[float] | Tensor,
        high: Sequence[float] | Tensor,
        hidden_dim: int = 256,
        observation_moments: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        low, high = (torch.as_tensor(b, dtype=torch.float32).clone() for b in (low, high))
        finite = torch.isfinite(low).all() and torch.isfinite(high).all()
        if low.ndim != 1 or low.shape != high.shape or not finite or not (low < high).all():
            raise InputError(
                f"the actions' bounds must be finite and of one length, low below high, got low "
                f"{low.tolist()} and high {high.tolist()}"
            )
        self.observation_dim, self.action_dim = observation_dim, len(low)
        self.normalizes = observation_moments is not None
        mean, std = observation_moments or (torch.zeros(observation_dim),) * 2
        for name, moment in (("mean", mean), ("std", std)):
            if tuple(moment.shape) != (observation_dim,):
                raise InputError(
                    f"the observations' {name} must have shape [{observation_dim}], got "
                    f"{list(moment.shape)}"
                )
        self.network = relu_mlp(observation_dim, hidden_dim, self.action_dim, generator)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("observation_mean", mean.to(torch.float32).clone())
        self.register_buffer("observation_std", std.to(torch.float32).clone())

    def normalize(self, observations: Tensor) -> Tensor:
        """Return observations [..., S] as the networks read them."""
        if not self.normalizes:
            return observations
        return (observations - self.observation_mean) / (self.observation_std + STD_OFFSET)

    def squash(self, inputs: Tensor) -> Tensor:
        """Return actions [..., A] within the bounds, at what `normalize` returned."""
        scale, bias = (self.high - self.low) / 2, (self.high + self.low) / 2
        return torch.addcmul(bias, scale, torch.tanh(self.network(inputs)))


class DeterministicPolicy(BoundedPolicy):
    """a = bias + scale tanh(MLP(s)); the arguments are those of `BoundedPolicy`."""

    def forward(self, observations: Tensor) -> Tensor:
        """Return raw actions [..., A] at raw observations [..., S]."""
        return self.squash(self.normalize(observations))

    def score_parameters(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the Gaussian whose score guides a sampler at raw
        observations [..., S]: the action and 1 (Policy-Guided Diffusion), [..., A] each."""
        action = self(observations)
        return action, torch.ones_like(action)


class BoundedGaussianPolicy(BoundedPolicy):
    """N(bias + scale tanh(MLP(s)), exp(log_std)), raw actions, not squashed or clipped.

    Args:
        log_std_min, log_std_max: the free parameter `log_std` [A], 0 at first, is clipped to them.

    The others are those of `BoundedPolicy`.
    """

    def __init__(
        self,
        observation_dim: int,
        low: Sequence[float] | Tensor,
        high: Sequence[float] | Tensor,
        hidden_dim: int = 256,
        observation_moments: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
    ):
        super().__init__(observation_dim, low, high, hidden_dim, observation_moments, generator)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.log_std = nn.Parameter(torch.zeros(self.action_dim))

    @property
    def std(self) -> Tensor:
        """Standard deviation [A] of the raw actions, the same at every state."""
        return self.log_std.clamp(self.log_std_min, self.log_std_max).exp()

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of raw actions, [..., A] each, at raw observations
        [..., S]."""
        return self.distribution(self.normalize(observations))

    def distribution(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same at what `normalize` returned."""
        mean = self.squash(inputs)
        return mean, self.std.expand_as(mean)

    def score_parameters(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, [..., A] each, at raw observations [..., S]."""
        return self(observations)


class TwinCritics(nn.Module):
    """Two critics Q(s, a) in one batched product per layer.

    Parameters are `kernels` [2, inputs, outputs] and `biases` [2, 1, outputs], three each.

    Args:
        pair_dim: S + A.
        hidden_dim: width of the hidden layers.
        generator: of the first weights.
    """

    def __init__(
        self, pair_dim: int, hidden_dim: int = 256, generator: torch.Generator | None = None
    ):
        super().__init__()
        sizes = ((pair_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, 1))
        self.kernels = nn.ParameterList(torch.empty(2, *size) for size in sizes)
        self.biases = nn.ParameterList(torch.zeros(2, 1, outputs) for _, outputs in sizes)
        for kernel, (inputs, _) in zip(self.kernels, sizes, strict=True):
            lecun_normal_(kernel, inputs, generator)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return both critics' values [2, N] at observations, as networks read them, and raw
        actions side by side, [N, S + A]."""
        hidden = pairs.expand(2, *pairs.shape)
        for kernel, bias in zip(self.kernels[:-1], self.biases[:-1], strict=True):
            hidden = torch.relu_(torch.baddbmm(bias, hidden, kernel))
        return torch.baddbmm(self.biases[-1], hidden, self.kernels[-1]).squeeze(-1)

    def first(self, pairs: Tensor) -> Tensor:
        """Return the first critic's values [N], differentiable in `pairs` but not in the
        weights."""
        hidden = pairs
        for k, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            hidden = torch.addmm(bias[0].detach(), hidden, kernel[0].detach())
            if k < len(self.kernels) - 1:
                hidden = torch.relu_(hidden)
        return hidden.squeeze(-1)
