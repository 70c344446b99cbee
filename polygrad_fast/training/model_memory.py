"""Memory that the networks of each world model need, as numbers that follow from their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from polygrad_fast.config import TrainConfig
from polygrad_fast.sampling.folded_networks import ROWS_PER_THREAD
from polygrad_fast.sampling.torch_step import POLICY_ROWS_PER_THREAD

FLOAT = 4
SCHEDULE_BYTES = 1500
"""Per diffusion step: tables and the engine's constants, as Python numbers."""


def denoiser_parameters(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    """Return the number of parameters of the configured denoiser, as Python integers of any
    size."""
    c = config.denoiser.resolved(config.horizon)
    width, layers, horizon = c.hidden_dim, c.num_layers, config.horizon
    num_steps = config.schedule.num_train_timesteps
    state_dim = observation_dim + 2
    if c.kind == "transformer":
        embedded = (
            num_steps * width if c.step_conditioning == "learned" else 2 * width * (width + 1)
        )
        blocks = layers * (12 * width + 13) * width
        ends = (state_dim + action_dim + 1) * width + (width + 1) * state_dim
        return ends + blocks + embedded + horizon * width
    if c.kind == "rollout":
        return _one_step_parameters(width, layers, observation_dim, action_dim)
    in_dim, out_dim = horizon * (state_dim + action_dim), horizon * state_dim
    output = (width + 1) * out_dim
    if c.step_conditioning == "layer":
        return (in_dim + 1) * width + layers * (width + 1 + num_steps) * width + output
    embed = max(in_dim, 128)
    inputs = (in_dim + 1) * embed + (18 + embed + 1) * embed + (embed + 1) * width
    return inputs + layers * (width + 3) * width + 2 * width + output


def autoregressive_parameters(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    """Return the number of parameters of the configured one-step network."""
    a = config.autoregressive
    return _one_step_parameters(a.hidden_dim, a.num_layers, observation_dim, action_dim)


def ensemble_parameters(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    """Return the number of parameters of the configured ensemble."""
    e, outputs = config.ensemble, 2 * (observation_dim + 1) + 1
    inputs = observation_dim + action_dim
    ends = (inputs + 1) * e.hidden_dim + (e.hidden_dim + 1) * outputs
    member = ends + (e.num_layers - 1) * (e.hidden_dim + 1) * e.hidden_dim
    return e.num_members * member + 2 * (observation_dim + 1)


def _one_step_parameters(width: int, layers: int, observation_dim: int, action_dim: int) -> int:
    ends = (observation_dim + action_dim + 1) * width + (width + 1) * (observation_dim + 2)
    return ends + (layers - 1) * (width + 1) * width


def transformer_parameters(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    """Return the number of parameters of the configured autoregressive transformer."""
    t = config.transformer
    width = t.hidden_dim
    ends = (observation_dim + action_dim + 1) * width + (width + 1) * (observation_dim + 2)
    return ends + (t.context + 2) * width + t.num_layers * (12 * width + 13) * width


def autoregressive_diffusion_parameters(
    config: TrainConfig, observation_dim: int, action_dim: int
) -> int:
    """Return the number of parameters of the configured denoiser of transitions."""
    d, state_dim = config.autoregressive_diffusion, observation_dim + 2
    width = d.hidden_dim
    inputs = (state_dim + observation_dim + action_dim + 1) * width + (18 + width + 1) * width
    return inputs + d.num_layers * (width + 3) * width + 2 * width + (width + 1) * state_dim


def _autoregressive_sampling(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    batch: int,
    device_type: str,
    threads: int,
) -> int:
    # each step's results and the stacked ones, unnormalized too, and one step's activations
    results = batch * config.horizon * 3 * (observation_dim + 2 + action_dim)
    return results + 4 * batch * max(config.autoregressive.hidden_dim, config.policy.hidden_dim)


def _ensemble_sampling(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    batch: int,
    device_type: str,
    threads: int,
) -> int:
    # as of a one-step network, with the elites' inputs, moments and noise beside it
    results = batch * config.horizon * 3 * (observation_dim + 2 + action_dim)
    widest = max(config.ensemble.hidden_dim, config.policy.hidden_dim)
    gathered = config.ensemble.num_elites / config.ensemble.num_members
    weights = round(gathered * ensemble_parameters(config, observation_dim, action_dim))
    return results + batch * (4 * widest + 8 * (observation_dim + 2)) + weights


def _transformer_sampling(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    batch: int,
    device_type: str,
    threads: int,
) -> int:
    results = batch * config.horizon * 5 * (observation_dim + 2 + action_dim)
    t = config.transformer
    tokens = batch * min(config.horizon, t.context)
    return results + max(12 * tokens * t.hidden_dim, 4 * batch * config.policy.hidden_dim)


def _autoregressive_diffusion_sampling(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    batch: int,
    device_type: str,
    threads: int,
) -> int:
    results = batch * config.horizon * 5 * (observation_dim + 2 + action_dim)
    widest = max(config.autoregressive_diffusion.hidden_dim, config.policy.hidden_dim)
    return results + batch * (4 * widest + 12 * (observation_dim + 2))


def _diffusion_sampling(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    batch: int,
    device_type: str,
    threads: int,
) -> int:
    c = config.denoiser.resolved(config.horizon)
    state_dim, horizon = observation_dim + 2, config.horizon
    pair = state_dim + action_dim
    on_gpu = device_type == "cuda"
    # workspace, result and its unnormalized copy, or the copies a file is written from
    floats = batch * horizon * (4 * state_dim + 3 * action_dim + 4 * pair)
    if on_gpu:  # the normals of a step, and the results' copies outside the graph
        floats += 2 * batch * horizon * pair
    whole = on_gpu or config.engine == "reference"
    rows = horizon if c.kind == "transformer" else 1  # of activations per trajectory
    if c.kind == "transformer":
        per_row = 12 * c.hidden_dim
    elif c.kind == "rollout":
        per_row = 4 * c.hidden_dim + horizon * (5 * state_dim + action_dim)
    else:
        per_row = 4 * c.hidden_dim + (4 * max(horizon * pair, 128) if whole else 0)
    part = batch if whole else min(batch, max(1, ROWS_PER_THREAD // rows) * threads)
    floats += part * rows * per_row
    part = batch * horizon if whole else min(batch * horizon, POLICY_ROWS_PER_THREAD * threads)
    return floats + part * 4 * config.policy.hidden_dim


def _autoregressive_update(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    a = config.autoregressive
    return a.batch_size * config.horizon * 3 * a.num_layers * a.hidden_dim


def _ensemble_update(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    e = config.ensemble
    per_row = 3 * e.num_layers * e.hidden_dim + 16 * (observation_dim + 2)
    return e.num_members * e.batch_size * config.horizon * per_row


def _transformer_update(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    t = config.transformer
    tokens = t.batch_size * min(config.horizon, t.context)
    return tokens * (17 * t.num_layers + 12) * t.hidden_dim


def _autoregressive_diffusion_update(
    config: TrainConfig, observation_dim: int, action_dim: int
) -> int:
    d = config.autoregressive_diffusion
    per_row = (3 * d.num_layers + 6) * d.hidden_dim + 20 * (observation_dim + 2)
    return d.batch_size * config.horizon * per_row


def _diffusion_update(config: TrainConfig, observation_dim: int, action_dim: int) -> int:
    horizon, pair = config.horizon, observation_dim + 2 + action_dim
    d = config.denoiser.resolved(horizon)
    if d.kind == "transformer":
        return d.batch_size * horizon * (17 * d.num_layers + 12) * d.hidden_dim
    if d.kind == "rollout":
        per_step = 3 * d.num_layers * d.hidden_dim + 6 * pair
        return d.batch_size * horizon * per_step
    kept = 2 if d.step_conditioning == "input" else 1
    embed = max(horizon * pair, 128) if d.step_conditioning == "input" else 0
    return d.batch_size * ((kept * d.num_layers + 6) * d.hidden_dim + 6 * embed)


def _diffusion_steps(config: TrainConfig) -> int:
    d = config.denoiser.resolved(config.horizon)
    rows = 2 if d.step_conditioning == "input" else 1 + d.num_layers
    if d.kind == "transformer":
        rows = 1 + config.horizon
    table = d.hidden_dim * rows
    return config.schedule.num_train_timesteps * (SCHEDULE_BYTES + 2 * FLOAT * table)


class ModelMemory(NamedTuple):
    """What one world model needs, counted of a configuration and of S and A."""

    options: str
    """Its group of options."""
    parameters: Callable[[TrainConfig, int, int], int]
    """Of its network."""
    update: Callable[[TrainConfig, int, int], int]
    """Numbers that one update holds besides weights and windows."""
    sampling: Callable[[TrainConfig, int, int, int, str, int], int]
    """Numbers besides weights, also of trajectories, type of device and threads."""
    steps: Callable[[TrainConfig], int]
    """Bytes of what there is per diffusion step."""


MODEL_MEMORY = {
    "trajectory_diffusion": ModelMemory(
        "denoiser", denoiser_parameters, _diffusion_update, _diffusion_sampling, _diffusion_steps
    ),
    "autoregressive": ModelMemory(
        "autoregressive",
        autoregressive_parameters,
        _autoregressive_update,
        _autoregressive_sampling,
        lambda config: 0,
    ),
    "ensemble": ModelMemory(
        "ensemble",
        ensemble_parameters,
        _ensemble_update,
        _ensemble_sampling,
        lambda config: 0,
    ),
    "transformer": ModelMemory(
        "transformer",
        transformer_parameters,
        _transformer_update,
        _transformer_sampling,
        lambda config: 0,
    ),
    "autoregressive_diffusion": ModelMemory(
        "autoregressive_diffusion",
        autoregressive_diffusion_parameters,
        _autoregressive_diffusion_update,
        _autoregressive_diffusion_sampling,
        lambda config: 0,
    ),
}
"""By the name of the world model."""
