"""Options of the agents that learn from a dataset: TD3+BC and IQL."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

from polygrad_fast.config.options import Options, replace_options


@dataclass(frozen=True)
class OfflineAgentConfig(Options):
    """What TD3+BC and IQL share. The defaults are those of the released code of Policy-Guided
    Diffusion, which differ from the agents' own papers where an option says so."""

    hidden_dim: int = 256
    """Width of both hidden layers of every network."""
    gamma: float = 0.99
    polyak: float = 0.005
    """Share of the weights in a target's update."""
    target_update: Literal["before", "after"] = "before"
    """Targets move at the beginning of an update, at the first one to a copy (released code), or at
    its end (the papers)."""
    learning_rate: float = 3e-4
    learning_rate_schedule: Literal["constant", "cosine", "exponential"] = "constant"
    """Of all networks. "cosine": to 0 over `total_updates`; "exponential": in the first tenth of
    them linearly up from a tenth, then down to a tenth."""
    total_updates: int = 1_000_000
    """T of the learning rate's schedule."""
    adam_eps: float = 1e-5
    """1e-8 in the papers."""
    normalize_observations: bool = False
    """Networks read (s - mean) / (std + 1e-3), moments of the real data."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "hidden_dim", "total_updates")
        self._check_positive("learning_rate", "adam_eps")
        for name in ("gamma", "polyak"):
            self._check(0 <= getattr(self, name) <= 1, name, "in [0, 1]")

    def learning_rate_at(self, update: int) -> float:
        """Return the learning rate of update 0, 1, ..; beyond `total_updates` it is the last
        one's."""
        update = min(update, self.total_updates)
        if self.learning_rate_schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + cos(pi * update / self.total_updates))
        if self.learning_rate_schedule == "exponential":
            warm_up = self.total_updates // 10
            if update < warm_up:
                return self.learning_rate * (0.1 + 0.9 * update / warm_up)
            share = (update - warm_up) / (self.total_updates - warm_up)
            return self.learning_rate * 0.1**share
        return self.learning_rate


@dataclass(frozen=True)
class TD3BCConfig(OfflineAgentConfig):
    """TD3+BC (arXiv 2106.06860). Build one with `released()` or `original()`."""

    alpha: float = 2.5
    """Weight of the value against the cloning of actions: lambda = alpha / mean |Q|."""
    policy_noise: float = 0.2
    """Standard deviation of the noise on the target's actions."""
    noise_clip: float = 0.5
    action_max: float = 1.0
    """The target's actions are clipped to [-action_max, action_max], whatever the bounds are."""
    order: Literal["actor_first", "critic_first"] = "actor_first"
    """Within an update; "actor_first" in the released code, "critic_first" in the paper."""
    critic_updates: int = 2
    """Critic steps per update, on its one batch; 1 in the paper."""
    actor_interval: int = 1
    """Updates per actor step; 2 in the paper, which moves targets then too."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._check_at_least(1, "critic_updates", "actor_interval")
        self._check_at_least(0, "alpha", "policy_noise", "noise_clip")
        self._check_positive("action_max")

    @classmethod
    def released(cls, **overrides: Any) -> TD3BCConfig:
        """Return the settings of the released code of Policy-Guided Diffusion, with keyword
        overrides."""
        return replace_options(cls(), overrides)

    @classmethod
    def original(cls, **overrides: Any) -> TD3BCConfig:
        """Return the settings of the TD3+BC paper, with keyword overrides."""
        config = cls(
            target_update="after",
            adam_eps=1e-8,
            normalize_observations=True,
            order="critic_first",
            critic_updates=1,
            actor_interval=2,
        )
        return replace_options(config, overrides)


@dataclass(frozen=True)
class IQLConfig(OfflineAgentConfig):
    """Implicit Q-learning (arXiv 2110.06169). The defaults are those of the released code of
    Policy-Guided Diffusion."""

    expectile: float = 0.7
    beta: float = 3.0
    """Inverse temperature of the advantages' weights, exp(beta advantage)."""
    max_weight: float = 100.0
    """Upper bound of these weights."""
    log_std_min: float = -20.0
    log_std_max: float = 2.0

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self._check(0 < self.expectile < 1, "expectile", "in (0, 1)")
        self._check_at_least(0, "beta")
        self._check_positive("max_weight")
        self._check(self.log_std_min < self.log_std_max, "log_std_min", f"below {self.log_std_max}")

    @classmethod
    def released(cls, **overrides: Any) -> IQLConfig:
        """Return the settings of the released code of Policy-Guided Diffusion, with keyword
        overrides."""
        return replace_options(cls(), overrides)
