"""Memory that training and sampling need, estimated before anything is allocated.

The estimates count tensors: those that stay (replay buffer, weights and their copies, optimizers,
the sampler's buffers) and those that come and go (in a denoiser update, an A2C update, a checkpoint
being written), which are added up, because the allocator keeps what was freed; and a fixed amount
for code. The replay buffer counts as full, and so does the copy of it that a checkpoint writes.
Environments are not counted. Nine configurations on a CPU, of presets and of sizes up to 5 GB, took
0.7 to 1.1 times the estimate, the copy of a full buffer left out, which no such short run writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polygrad_fast.config import TrainConfig
from polygrad_fast.errors import InputError
from polygrad_fast.learners.explicit_mlp import BLOCK_SIZE
from polygrad_fast.training.model_memory import FLOAT, MODEL_MEMORY

OVERHEAD = 250 * 2**20
"""Code that PyTorch loads on first use, and the slack of the allocator."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the host's memory, and of the GPU's where that is the device."""

    host: int = 0
    device: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.host + other.host, self.device + other.device)


def sampling_memory(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    num_trajectories: int,
    device_type: str,
    threads: int,
) -> Memory:
    """Estimate what the world model needs besides weights, to imagine `num_trajectories` at
    once."""
    count = MODEL_MEMORY[config.world_model].sampling
    floats = count(config, observation_dim, action_dim, num_trajectories, device_type, threads)
    picks = 40 * num_trajectories  # of the replay buffer's windows, 64-bit
    return _on(device_type, FLOAT * floats + picks)


def construction_memory(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    device_type: str = "cpu",
    threads: int = 1,
) -> Memory:
    """Estimate what an agent allocates before it trains: replay buffer, weights, schedule.

    Args are those of `training_memory`.
    """
    replay, weights, policy, steps = _lasting(config, observation_dim, action_dim, device_type)
    return replay + steps + _on(device_type, FLOAT * (2 * weights + 3 * policy))


def training_memory(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    device_type: str = "cpu",
    threads: int = 1,
) -> Memory:
    """Estimate the largest memory of a training run of this configuration.

    Args:
        config: resolved or not.
        observation_dim, action_dim: S and A.
        device_type: "cpu", "cuda" or another.
        threads: PyTorch's on the CPU.

    Returns:
        Bytes; on a CPU all of the host.
    """
    p, horizon = config.policy, config.horizon
    pair = observation_dim + 2 + action_dim
    replay, weights, policy, steps = _lasting(config, observation_dim, action_dim, device_type)
    # network, average, gradient, two moments of Adam, the sampler's copy; for the policy also the
    # line search's copies, a value function and its target
    networks = _on(device_type, FLOAT * (6 * weights + 14 * policy))

    windows = config.world_model_training.batch_size * horizon * pair * 10
    update = MODEL_MEMORY[config.world_model].update(config, observation_dim, action_dim)
    model_update = _on(device_type, FLOAT * (windows + update))
    sampling = sampling_memory(
        config, observation_dim, action_dim, config.imagined_batch_size, device_type, threads
    )
    steps_imagined = config.imagined_batch_size * horizon
    # on a CPU the built-in networks' activations are of one block of rows
    rows = (
        steps_imagined
        if device_type == "cuda"
        else min(steps_imagined, BLOCK_SIZE // p.hidden_dim + 1)
    )
    activations = rows * (6 * p.num_layers + 3) * p.hidden_dim
    a2c_update = _on(device_type, FLOAT * (activations + steps_imagined * (6 * pair + 30)))
    written = config.replay_capacity * (FLOAT * pair + 32) + 4 * FLOAT * (weights + 3 * policy)
    checkpoint = Memory(written)
    passing = model_update + a2c_update + checkpoint
    return replay + networks + steps + sampling + passing + Memory(OVERHEAD)


def _on(device_type: str, size: int) -> Memory:
    return Memory(device=size) if device_type == "cuda" else Memory(size)


def _lasting(
    config: TrainConfig, observation_dim: int, action_dim: int, device_type: str
) -> tuple[Memory, int, int, Memory]:
    """Return the replay buffer's memory, the parameters of world model and policy, and the memory
    of what there is per diffusion step."""
    p, model = config.policy, MODEL_MEMORY[config.world_model]
    row = FLOAT * (observation_dim + 2 + action_dim) + 16
    replay = _on(device_type, config.replay_capacity * row) + Memory(config.replay_capacity)
    trunk = (observation_dim + (p.num_layers - 1) * p.hidden_dim + 4 * p.num_layers) * p.hidden_dim
    policy = trunk + (action_dim + 1) * p.hidden_dim
    weights = model.parameters(config, observation_dim, action_dim)
    return replay, weights, policy, _on(device_type, model.steps(config))


def check_training_memory(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    device: torch.device,
    trains: bool = True,
    held: int = 0,
) -> None:
    """Refuse a configuration that needs more memory than is available.

    Args:
        config, observation_dim, action_dim, device: what to train on.
        trains: False: only what an agent that is loaded and acts allocates.
        held: bytes of it that the process has on the device already.

    Raises:
        InputError: naming the option that most of it is for, the estimate and what is available.
    """

    def estimate(config: TrainConfig) -> Memory:
        threads = config.cpu_threads or torch.get_num_threads()
        function = training_memory if trains else construction_memory
        return function(config, observation_dim, action_dim, device.type, threads)

    needed, held_on = estimate(config), "device" if device.type == "cuda" else "host"
    for kind, available in available_memory(device).items():
        size = getattr(needed, kind)
        if size > available + (held if kind == held_on else 0):
            name, value = _dominant(config, lambda changed, k=kind: getattr(estimate(changed), k))
            raise InputError(_sentence(name, value, size, available, kind))


def check_sampling_memory(
    config: TrainConfig,
    observation_dim: int,
    action_dim: int,
    num_trajectories: int,
    device: torch.device,
) -> None:
    """Refuse to imagine more trajectories at once than the available memory holds.

    Raises:
        InputError: naming their number, the estimate and what is available.
    """
    threads = torch.get_num_threads()
    needed = sampling_memory(
        config, observation_dim, action_dim, num_trajectories, device.type, threads
    )
    for kind, available in available_memory(device).items():
        if getattr(needed, kind) > available:
            size = getattr(needed, kind)
            raise InputError(_sentence("num_trajectories", num_trajectories, size, available, kind))


def available_memory(device: torch.device) -> dict[str, int]:
    """Return the bytes available on the "host", and on the "device" if that is a GPU; what cannot
    be told on this system is left out."""
    available = {}
    host = available_host_memory()
    if host is not None:
        available["host"] = host
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available["device"] = torch.cuda.mem_get_info(device)[0] + cached
    return available


def available_host_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes that this process may still use on Linux: what the machine has available,
    and what each control group around the process leaves (versions 1 and 2; memory of files that
    the kernel can drop counts as free). None elsewhere."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        groups = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except (OSError, ValueError, IndexError):
        return None
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                found += _left_in_group(group, *names)
    return max(0, min(found)) if found else None


def _left_in_group(group: Path, limit: str, usage: str, droppable: str) -> list[int]:
    """Return what one control group leaves, or nothing where it has no limit."""
    try:
        allowed = int((group / limit).read_text())
        used = int((group / usage).read_text())
        statistics = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= next((int(value) for name, value in statistics if name == droppable), 0)
    except (OSError, ValueError):  # "max", or a group that this container does not see
        return []
    return [allowed - used]


def _dominant(config: TrainConfig, size: Callable[[TrainConfig], int]) -> tuple[str, Any]:
    """Return the option, and its value, that takes most memory beyond its default; where none does,
    the one that saves most when halved."""
    model = MODEL_MEMORY[config.world_model].options
    names = (*_OPTIONS, *(f"{model}.{option}" for option in _MODEL_OPTIONS))
    options = {name: _get(config, name) for name in names}
    sizes = {
        name: size(_set(config, name, min(value, _get(_DEFAULT, name))))
        for name, value in options.items()
    }
    name = min(sizes, key=sizes.get)
    if sizes[name] == size(config):
        halves = {n: size(_set(config, n, max(value // 2, 1))) for n, value in options.items()}
        name = min(halves, key=halves.get)
    return name, options[name]


_DEFAULT = TrainConfig(denoiser=TrainConfig().denoiser.resolved(10))
_OPTIONS = (
    "replay_capacity",
    "imagined_batch_size",
    "horizon",
    "policy.hidden_dim",
    "policy.num_layers",
    "schedule.num_train_timesteps",
)
_MODEL_OPTIONS = ("hidden_dim", "num_layers", "batch_size")


def _get(config: TrainConfig, name: str) -> int:
    group, _, option = name.rpartition(".")
    owner = getattr(config, group) if group else config
    if group == "denoiser":
        owner = owner.resolved(config.horizon)
    return getattr(owner, option)


def _set(config: TrainConfig, name: str, value: int) -> TrainConfig:
    group, _, option = name.rpartition(".")
    if not group:
        # the horizon's minimum is 2, and a width that follows from the horizon stays
        kept = dataclasses.replace(config, denoiser=config.denoiser.resolved(config.horizon))
        return replace(kept, **{option: max(value, 2)})
    owner = getattr(config, group)
    return replace(config, **{group: replace(owner, **{option: value})})


def _sentence(name: str, value: int, needed: int, available: int, kind: str) -> str:
    where = " on the GPU" if kind == "device" else ""
    return (
        f"{name} {value:,} needs about {_readable(needed)} of memory{where}, "
        f"{_readable(available)} are available"
    )


def _readable(size: int) -> str:
    """Return a number of bytes as two digits and a decimal unit."""
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    power = min((len(str(size)) - 1) // 3, len(units) - 1)
    number = size / 1000**power
    return f"{number:,.0f} {units[power]}" if number >= 10 else f"{number:.1f} {units[power]}"
