"""Checkpoints of the released agent: `step-N-ac.pt` and `step-N-diffusion.pt`, read and written."""

from __future__ import annotations

import io
import numbers
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polygrad_fast.agent import PolyGRAD
from polygrad_fast.arguments import as_integer, as_path
from polygrad_fast.compat.weights import (
    build_actor_critic,
    check_state_dict,
    export_actor_critic,
    export_denoiser,
    load_denoiser,
    load_policy,
    load_value_function,
    part,
)
from polygrad_fast.config import A2CConfig
from polygrad_fast.denoisers import ResidualMLPDenoiser, TransformerDenoiser
from polygrad_fast.diffusion.ddpm import TABLES, NoiseSchedule
from polygrad_fast.errors import CheckpointError, InputError, first_line
from polygrad_fast.learners.a2c import ActorCritic
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy, ValueFunction
from polygrad_fast.runs.files import write_bytes_atomic
from polygrad_fast.sampling.folding import why_foreign

_FILE = re.compile(r"step-(\d+)-(ac|diffusion)\.pt")


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """What a checkpoint of the released agent holds, on the CPU.

    It holds no moments of the normalizer, no optimizer states, no guidance scale, no learned actor
    learning rate, no replay buffer, and of the denoiser only the averaged weights.
    """

    step: int
    denoiser: ResidualMLPDenoiser | TransformerDenoiser
    schedule: NoiseSchedule
    policy: GaussianPolicy
    value_function: ValueFunction
    target_value_function: ValueFunction

    def actor_critic(self, normalizer: Normalizer, config: A2CConfig | None = None) -> ActorCritic:
        """Return an actor-critic that trains these networks in place, with fresh optimizers.

        Args:
            normalizer: moments of the data, which the checkpoint lacks.
            config: default `A2CConfig()`, the released settings.
        """
        actor_critic = build_actor_critic(self.policy, self.value_function, normalizer, config)
        actor_critic.target_value_function.load_state_dict(self.target_value_function.state_dict())
        return actor_critic


def load_checkpoint(
    directory: str | Path,
    step: int | str = "latest",
    min_std: float = 0.1,
    normed_inputs: bool = False,
    normalizer: Normalizer | None = None,
    num_heads: int = 4,
) -> ReleasedCheckpoint:
    """Load what `DiffusionWMAgent.save` wrote, with `torch.load(weights_only=True)`.

    Networks and their sizes are told from names and shapes. The arguments besides the first two are
    settings of the released configuration that its weights do not tell.

    Args:
        directory: holds step-N-ac.pt and step-N-diffusion.pt.
        step: N, also as digits, or "latest": the largest N with both files.
        min_std, normed_inputs: the released options `min_std` and `ac_use_normed_inputs`.
        normalizer: moments of the data; needed with normed_inputs=True.
        num_heads: attention heads of a transformer (released: 4).

    Raises:
        CheckpointError: a file is missing or damaged, or holds anything but tensors of finite
            floating point numbers, or tables that are not K numbers each.
        InputError: the weights are of another network, or an argument is of another type.
    """
    directory = as_path(directory, "directory")
    step = _find_step(directory, step)
    actor_critic, diffusion = (
        _read(directory / f"step-{step}-{kind}.pt") for kind in ("ac", "diffusion")
    )
    missing = {"logstd._bias"} - actor_critic.keys() or set(TABLES) - diffusion.keys()
    if missing:
        raise CheckpointError(
            f"{directory} at step {step} must be a checkpoint of the released agent, got one "
            f"without {min(missing)!r}"
        )
    _check_tables(directory / f"step-{step}-diffusion.pt", diffusion)
    policy = load_policy(
        part(actor_critic, "actor."),
        actor_critic["logstd._bias"],
        min_std,
        normalizer,
        normed_inputs,
    )
    observation_dim, action_dim = policy.observation_dim, policy.action_dim
    return ReleasedCheckpoint(
        step=step,
        denoiser=load_denoiser(
            diffusion, observation_dim, action_dim, _horizon(diffusion, observation_dim), num_heads
        ),
        schedule=NoiseSchedule(**{name: diffusion[name].float() for name in TABLES}),
        policy=policy,
        value_function=load_value_function(part(actor_critic, "critic.")),
        target_value_function=load_value_function(part(actor_critic, "critic_target.")),
    )


def export_checkpoint(
    source: PolyGRAD | ReleasedCheckpoint, directory: str | Path, step: int | None = None
) -> tuple[Path, Path]:
    """Write step-N-ac.pt and step-N-diffusion.pt so that `DiffusionWMAgent.load` reads them.

    Each file appears complete or not at all. The released agent must be built with the same sizes,
    `min_std`, `ac_use_normed_inputs`, `predict_epsilon` and number of diffusion steps.

    Args:
        source: an agent of this library (its averaged denoiser is written, as in the released
            code), or the parts of one.
        directory: is made where there is none; files of the same step are replaced.
        step: N >= 0; None: the source's own.

    Returns:
        Paths of the actor-critic's and the diffusion model's file.

    Raises:
        InputError: weights that would mean something else to the released code, or a step that is
            no number of steps.
    """
    directory = as_path(directory, "directory")
    if isinstance(source, ReleasedCheckpoint):
        parts = source
    elif isinstance(source, PolyGRAD):
        _check_agent(source)
        parts = ReleasedCheckpoint(
            step=source.num_timesteps,
            denoiser=source.denoiser,
            schedule=source.world_model.schedule,  # of training, also where fewer steps are sampled
            **source.training.learner.modules(),
        )
    else:
        raise InputError(
            f"source must be a PolyGRAD agent or a ReleasedCheckpoint, got {type(source).__name__}"
        )
    step = as_integer(parts.step if step is None else step, "step", 0)
    for name, module in (("denoiser", parts.denoiser), ("policy", parts.policy)):
        foreign = why_foreign(module)
        if foreign is not None:
            raise InputError(
                f"the {name} must be one of this library's as its constructor makes it for the "
                f"released code to use its weights, got one that {foreign}"
            )
    weights = export_denoiser(parts.denoiser.state_dict(), parts.denoiser)
    diffusion = {name: getattr(parts.schedule, name) for name in TABLES}
    noise_variance = 1.0 - parts.schedule.alphas_cumprod
    diffusion |= {
        "sqrt_alphas_cumprod": parts.schedule.alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": noise_variance.sqrt(),
        "log_one_minus_alphas_cumprod": noise_variance.log(),
    }
    diffusion |= {f"model.{name}": tensor for name, tensor in weights.items()}
    actor_critic = export_actor_critic(
        parts.policy, parts.value_function, parts.target_value_function
    )
    paths = tuple(directory / f"step-{step}-{kind}.pt" for kind in ("ac", "diffusion"))
    for path, state_dict in zip(paths, (actor_critic, diffusion), strict=True):
        data = io.BytesIO()
        torch.save({name: tensor.detach().cpu() for name, tensor in state_dict.items()}, data)
        write_bytes_atomic(path, data.getvalue())
    return paths


def _check_agent(agent: PolyGRAD) -> None:
    """Raise InputError where the released code would use the agent's weights in another way."""
    config = agent.config
    for name, got, wanted in (
        ("config.world_model", config.world_model, "trajectory_diffusion"),
        ("config.sampler.scale_actions", config.sampler.scale_actions, True),
        ("config.sampler.denoiser_actions", config.sampler.denoiser_actions, "raw"),
    ):
        if got != wanted:
            raise InputError(
                f"{name} must be {wanted!r} for the released code to use the agent's weights, got "
                f"{got!r}"
            )
    scaler = agent.action_scaler
    if scaler.rescaled and not np.array_equal(scaler.to_environment(scaler.high), scaler.high):
        raise InputError(
            "config.rescale_actions must be False for the released code to use the agent's "
            "weights, got True and an environment with other bounds than [-1, 1]"
        )


def _find_step(directory: Path, step: int | str) -> int:
    """Return the step asked for, both of whose files are there."""
    if not (_is_integer(step) or isinstance(step, str)):
        raise InputError(f"step must be an integer or 'latest', got {step!r}")
    if isinstance(step, str) and step.isdecimal():
        step = int(step)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} must be a directory with step-N-ac.pt, got none")
    kinds: dict[int, set[str]] = {}
    for path in directory.iterdir():
        if match := _FILE.fullmatch(path.name):
            kinds.setdefault(int(match[1]), set()).add(match[2])
    complete = sorted(found for found, parts in kinds.items() if len(parts) == 2)
    if step == "latest" and complete:
        return complete[-1]
    if step not in complete:
        raise CheckpointError(
            f"{directory} must hold step-N-ac.pt and step-N-diffusion.pt with N = {step}, got "
            f"those of {complete}"
        )
    return int(step)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, all of finite floating point numbers."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        state_dict = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} must hold nothing but tensors, got what could run code, or a damaged file"
        ) from error
    except Exception as error:
        reason = first_line(error).partition(". ")[0]
        raise CheckpointError(f"{path} cannot be read, it is damaged: {reason}") from error
    try:
        check_state_dict(state_dict, "one of the released agent's networks")
    except InputError as error:
        raise CheckpointError(f"{path} is no checkpoint of the released agent: {error}") from error
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name!r} must hold floating point numbers, got {tensor.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name!r} must hold finite numbers, got NaN or infinity")
    return state_dict


def _check_tables(path: Path, diffusion: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless every table has one number per diffusion step."""
    wanted = (diffusion["betas"].numel(),)
    for name in TABLES:
        shape = tuple(diffusion[name].shape)
        if shape != wanted or wanted == (0,):
            raise CheckpointError(
                f"{path}: {name!r} must hold one number for each of the {wanted[0]} diffusion "
                f"steps of 'betas', got the shape {shape}"
            )


def _horizon(diffusion: dict[str, Tensor], observation_dim: int) -> int:
    """Return H by the denoiser's shapes; 1 where it is not one of the released two."""
    if "model.transformer.wpe.weight" in diffusion:
        return diffusion["model.transformer.wpe.weight"].shape[0]
    output = diffusion.get("model.residual_mlp.final_linear.bias", torch.empty(0))
    return max(1, len(output) // (observation_dim + 2))
