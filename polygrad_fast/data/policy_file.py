"""Policies in one small file that says how they were trained, played without their library."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from polygrad_fast.errors import InputError, first_line
from polygrad_fast.runs.files import write_bytes_atomic

ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}
LOG_STD_RANGE = (-20.0, 2.0)
"""Where the logarithm of a standard deviation is kept, as Stable-Baselines3's SAC keeps it."""
_KEY = "polygrad_fast.policy"


@dataclass(frozen=True)
class PolicyFacts:
    """What a policy file says of its policy, beside the weights."""

    env_id: str
    algorithm: str
    """And its package with version."""
    activation: str
    """Of the hidden layers, one of `ACTIVATIONS`."""
    squashed: bool
    """Whether actions are tanh of the Gaussian's draws, then scaled to the bounds, as SAC's are;
    else they are the draws, clipped to the bounds."""
    env_steps: int
    """Of the training, up to these weights."""
    seed: int
    """Of the training."""
    recipe: str
    """Command that trains it once more, on the same machine and with the same packages."""
    mean_return: float
    """Of whole episodes of the stored weights' mean, on seeds that neither training nor selection
    saw."""
    std_return: float
    episodes: int
    evaluation_seed: int
    versions: dict[str, str | None]
    """Of the training, see `runs.versions`."""

    @property
    def trained_by(self) -> str:
        """What the recipe of a dataset says of the training."""
        return f"{self.algorithm}: {self.recipe}"


@dataclass(frozen=True)
class StoredPolicy:
    """A Gaussian policy with an MLP for its mean.

    Args:
        layers: weights [out, in] and biases [out], from the observation to the mean [A].
        log_std: weight [A, W] on the last hidden layer, or None where it is the same at every
            observation, and bias [A].
        bounds: lowest and highest action, [A] each.
        facts: what the file says of it.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    log_std: tuple[np.ndarray | None, np.ndarray]
    bounds: tuple[np.ndarray, np.ndarray]
    facts: PolicyFacts

    @property
    def dims(self) -> tuple[int, int]:
        """S and A."""
        return self.layers[0][0].shape[1], len(self.layers[-1][1])

    def act(
        self, observations: np.ndarray, generator: np.random.Generator | None = None
    ) -> np.ndarray:
        """Return actions [.., A] within the bounds at observations [.., S]: the mean, or a draw
        where a generator is given."""
        hidden = np.asarray(observations, dtype=np.float32)
        for weight, bias in self.layers[:-1]:
            hidden = ACTIVATIONS[self.facts.activation](hidden @ weight.T + bias)
        weight, bias = self.layers[-1]
        actions = hidden @ weight.T + bias
        if generator is not None:
            weight, log_std = self.log_std
            if weight is not None:
                log_std = hidden @ weight.T + log_std
            normals = generator.standard_normal(actions.shape, dtype=np.float32)
            actions = actions + np.exp(np.clip(log_std, *LOG_STD_RANGE)) * normals
        low, high = self.bounds
        if self.facts.squashed:
            actions = low + (high - low) * (np.tanh(actions) + 1) / 2
        return np.clip(actions, low, high)


def save_policy(policy: StoredPolicy, path: Path) -> None:
    """Write a policy as safetensors, its weights in half precision, its facts as JSON in the
    metadata."""
    tensors = dict(zip(("action_low", "action_high"), policy.bounds, strict=True))
    for i, (weight, bias) in enumerate(policy.layers):
        tensors |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
    weight, tensors["log_std.bias"] = policy.log_std
    if weight is not None:
        tensors["log_std.weight"] = weight
    half = {name: np.ascontiguousarray(tensor, np.float16) for name, tensor in tensors.items()}
    facts = json.dumps(dataclasses.asdict(policy.facts), sort_keys=True)
    write_bytes_atomic(path, safetensors.numpy.save(half, {_KEY: facts}))


def load_policy(
    path: Path, env_id: str | None = None, dims: tuple[int, int] | None = None
) -> StoredPolicy:
    """Return the policy that `save_policy` wrote; reading runs no code of the file.

    Args:
        path: the file.
        env_id: environment it must be of; None: any.
        dims: S and A that it must have; None: any.

    Raises:
        InputError: no such file, damaged, without the facts, or of another environment.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            stored = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
    except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a policy file: {first_line(error)}") from None
    if stored is None:
        raise InputError(f"{path} must be a policy file, got safetensors that describe no policy")
    try:
        facts = _facts(json.loads(stored))
        policy = _policy(tensors, facts)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is a damaged policy file: {type(error).__name__} {first_line(error)}"
        ) from None
    if env_id not in (None, facts.env_id):
        raise InputError(f"{path} must be a policy of {env_id}, got one of {facts.env_id}")
    if dims not in (None, policy.dims):
        raise InputError(
            f"{path} must be a policy with (observation, action) dimensions {dims}, got "
            f"{policy.dims}"
        )
    return policy


def _facts(stored: dict[str, Any]) -> PolicyFacts:
    facts = PolicyFacts(**stored)
    if facts.activation not in ACTIVATIONS:
        raise ValueError(f"activation {facts.activation!r}")
    known = isinstance(facts.mean_return, float) and math.isfinite(facts.mean_return)
    if not (isinstance(facts.squashed, bool) and known):
        raise ValueError(f"squashed {facts.squashed!r}, mean_return {facts.mean_return!r}")
    return facts


def _policy(tensors: dict[str, np.ndarray], facts: PolicyFacts) -> StoredPolicy:
    """Return the policy of a file's tensors; ValueError unless their shapes fit each other."""
    count = sum(name.startswith("layers.") for name in tensors) // 2
    layers = tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"])
                   for i in range(count))  # fmt: skip
    log_std = tensors.get("log_std.weight"), tensors["log_std.bias"]
    bounds = tensors["action_low"], tensors["action_high"]
    if not layers:
        raise ValueError("no layers")
    widths = [layers[0][0].shape[-1], *(len(bias) for _, bias in layers)]
    shapes = [(weight.shape, bias.shape) for weight, bias in layers]
    wanted = [((to,), (to, of)) for of, to in zip(widths, widths[1:], strict=False)]
    if shapes != [(weight, bias) for bias, weight in wanted]:
        raise ValueError(f"layers of shapes {shapes}")
    actions = widths[-1]
    fits = all(part.shape == (actions,) for part in (log_std[1], *bounds))
    if not fits or (log_std[0] is not None and log_std[0].shape != (actions, widths[-2])):
        raise ValueError(f"log_std and bounds that are not of {actions} actions")
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("weights that are not finite")
    return StoredPolicy(layers, log_std, bounds, facts)
