"""Many trajectories sampled in batches, which an interruption does not lose."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from polygrad_fast.arguments import as_integer, as_path
from polygrad_fast.errors import CheckpointError, NonFiniteError
from polygrad_fast.runs.files import replacing, write_json_atomic
from polygrad_fast.sampling.edm_sampler import EDMSampler
from polygrad_fast.sampling.heun import Guidance

DESCRIPTION = "generation.json"


def generate(
    sampler: EDMSampler,
    num_trajectories: int,
    length: int,
    seed: int,
    folder: str | Path | None = None,
    batch_size: int = 256,
    guidance: Guidance | None = None,
    progress: bool = True,
) -> Tensor:
    """Sample trajectories in batches, each from a random stream of its own.

    With `folder` every batch is a file there as soon as it is sampled, whole or not at all; a call
    with the same arguments samples what is missing and returns what an uninterrupted one returns
    (on one machine, to the bit: a batch depends on `seed` and its number only).

    Args:
        sampler: whose denoiser's current weights are used.
        num_trajectories, length: how many, of how many rows (policy-guided diffusion: 2^14).
        seed: at least 0.
        folder: for `generation.json`, which says what is sampled, and `batch_00000.npz`, ..
            (array "trajectories"); made where it is missing.
        batch_size: trajectories sampled together; it changes which random numbers they get.
        guidance: see `EDMSampler.sample`.
        progress: show a progress bar.

    Returns:
        Normalized trajectories, float32 [num_trajectories, length, D] on the CPU.

    Raises:
        InputError: a number out of range.
        CheckpointError: the folder holds trajectories of other arguments, weights or guidance, or a
            damaged file.
        NonFiniteError: a sampled number is NaN or infinite; the batch is not stored.
    """
    total = as_integer(num_trajectories, "num_trajectories", 1)
    batch_size = as_integer(batch_size, "batch_size", 1)
    seed = as_integer(seed, "seed", 0)
    if folder is not None:
        folder = as_path(folder, "folder")
        _claim(folder, _describe(sampler, total, length, seed, batch_size, guidance))
    starts = range(0, total, batch_size)
    batches = []
    with tqdm(total=total, disable=not progress, unit="trajectory", dynamic_ncols=True) as bar:
        for number, start in enumerate(starts):
            count = min(batch_size, total - start)
            path = folder / f"batch_{number:05d}.npz" if folder is not None else None
            if path is not None and path.exists():
                batch = _read(path, count, length)
            else:
                generator = batch_generator(seed, number, sampler.device)
                batch = sampler.sample(count, length, generator, guidance=guidance)
                batch = batch.trajectories.to("cpu", torch.float32)
                if not torch.isfinite(batch).all():
                    raise NonFiniteError(
                        f"batch {number} of the sampled trajectories holds NaN or infinity; "
                        f"{start} trajectories before it are "
                        f"{'stored in ' + str(folder) if folder is not None else 'lost'}"
                    )
                if path is not None:
                    with replacing(path) as temporary, open(temporary, "wb") as file:
                        np.savez(file, trajectories=batch.numpy())
            batches.append(batch)
            bar.update(count)
    return torch.cat(batches)


def batch_generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Return the random stream of one batch, independent of the others'."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def fingerprint(module: nn.Module) -> str:
    """Return a hash of a module's weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        array = value.detach().to("cpu").contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _describe(
    sampler: EDMSampler,
    total: int,
    length: int,
    seed: int,
    batch_size: int,
    guidance: Guidance | None,
) -> dict[str, Any]:
    """Return what the trajectories depend on, as JSON has it."""
    described = {
        "num_trajectories": total,
        "length": int(length),
        "seed": seed,
        "batch_size": batch_size,
        "sampler": asdict(sampler.config),
        "engine": sampler.engine,
        "dtype": sampler.dtype,
        "device": sampler.device.type,
        "denoiser": fingerprint(sampler.denoiser),
        "guidance": None if guidance is None else type(guidance).__name__,
    }
    config = getattr(guidance, "config", None)
    if is_dataclass(config):
        described["guidance_config"] = asdict(config)
    for name in ("policy", "normalizer"):
        module = getattr(guidance, name, None)
        if isinstance(module, nn.Module):
            described[name] = fingerprint(module)
    return described


def _claim(folder: Path, described: dict[str, Any]) -> None:
    """Write what is sampled to a new folder, or check that it is what an old one holds."""
    path = folder / DESCRIPTION
    if not path.exists():
        write_json_atomic(path, described)
        return
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be JSON, got {error}") from None
    for name in {**described, **stored}:
        if stored.get(name) != described.get(name):
            raise CheckpointError(
                f"{folder} holds trajectories of another {name}, {stored.get(name)!r}, got "
                f"{described.get(name)!r}; wanted the same arguments and weights, or a new folder"
            )


def _read(path: Path, count: int, length: int) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            batch = torch.from_numpy(arrays["trajectories"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} must hold sampled trajectories, got {type(error).__name__}: {error}; delete "
            f"it to sample them again"
        ) from None
    if tuple(batch.shape[:2]) != (count, length):
        raise CheckpointError(
            f"{path} must hold {count} trajectories of {length} rows, got shape "
            f"{tuple(batch.shape)}"
        )
    return batch
