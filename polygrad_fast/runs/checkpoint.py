"""One checkpoint: a directory that survives a kill, a full disk and a damaged file.

It holds::

    weights.safetensors   the networks, readable without this package
    state.pt              trainer state (optimisers, counters, replay), loads with weights_only=True
    metadata.json         what the caller says about it
    manifest.json         size and sha256 of the files above

It is written as a temporary sibling, flushed to the disk and renamed into place (`runs.files`), so
a directory under the final name is always complete.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from polygrad_fast.errors import CheckpointError, first_line
from polygrad_fast.runs.files import (
    fsync_directory,
    locate,
    make_temporary,
    move_into_place,
    naming,
    remove_temporaries,
)

WEIGHTS, STATE, METADATA, MANIFEST = (
    "weights.safetensors",
    "state.pt",
    "metadata.json",
    "manifest.json",
)
FORMAT_VERSION = 1


def save_checkpoint(
    directory: str | Path,
    weights: dict[str, Tensor],
    state: dict | None,
    metadata: dict,
    sequence: int = 0,
) -> Path:
    """Write a checkpoint that appears at `directory` complete or not at all.

    An older checkpoint at `directory` is replaced; until the new one is complete on the disk it
    stays untouched. What a killed save to `directory` left is removed. Copies tensors to the CPU,
    so it synchronises with a GPU.

    Args:
        directory: where to write; absent, empty, or an older checkpoint.
        weights: flat map from name to tensor, of any device and layout; tensors may share memory.
        state: nested dict, list and tuple of str, int, float, bool, None and tensors; None writes
            none.
        metadata: anything JSON can express.
        sequence: number of the save within its run, for the manifest.

    Returns:
        `directory`.

    Raises:
        TypeError: `weights`, `state` or `metadata` hold something else; nothing was written.
        CheckpointError: `directory` exists and is no checkpoint; nothing was written.
        OSError: the disk is full or not writable, or another process began to save to `directory`
            meanwhile; an older checkpoint is as it was, or the other process's.
    """
    directory = Path(directory)
    weights = _portable_weights(weights)
    if state is not None:
        state = _portable_state(state, "state")
    try:
        metadata_bytes = (json.dumps(metadata, indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata cannot be written as JSON: {error}") from error
    _refuse_foreign(directory)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with naming(directory):
        remove_temporaries(directory.parent, directory.name)
        temporary = make_temporary(directory)
    files: dict[str, dict[str, Any]] = {}

    def write(name: str, content: Callable[[Any], Any]) -> None:
        with naming(directory / name):
            files[name] = _write(temporary / name, content)

    try:
        write(WEIGHTS, lambda file: file.write(safetensors.torch.save(weights, {"format": "pt"})))
        write(METADATA, lambda file: file.write(metadata_bytes))
        if state is not None:
            write(STATE, lambda file: torch.save(state, file))
        manifest = {"format_version": FORMAT_VERSION, "sequence": sequence, "files": files.copy()}
        manifest_bytes = (json.dumps(manifest, indent=2) + "\n").encode()
        write(MANIFEST, lambda file: file.write(manifest_bytes))
        with naming(directory):
            fsync_directory(temporary)
            move_into_place(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(directory.parent)
    return directory


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict | None, dict]:
    """Read a checkpoint onto the CPU after comparing every file with the manifest.

    Returns:
        weights, state (None if it was saved without), metadata.

    Raises:
        CheckpointError: missing, incomplete or damaged; one sentence naming the path and what is
            wrong.
    """
    directory = locate(Path(directory))
    files = verify(directory)
    try:
        weights = safetensors.torch.load_file(directory / WEIGHTS)
        state = None
        if STATE in files:
            state = torch.load(directory / STATE, map_location="cpu", weights_only=True)
        metadata = json.loads((directory / METADATA).read_bytes())
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {directory} cannot be read: {first_line(error)}"
        ) from error
    return weights, state, metadata


def read_metadata(directory: str | Path) -> dict:
    """Return what `load_checkpoint` returns last, without reading weights and state.

    Raises:
        CheckpointError: missing or unreadable.
    """
    directory = locate(Path(directory))
    read_manifest(directory)
    try:
        return json.loads((directory / METADATA).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory}: cannot read {METADATA}: {error}") from error


def read_manifest(directory: Path) -> dict:
    """Return a checkpoint's manifest after comparing the sizes of its files, not their content.

    Raises:
        CheckpointError: missing, incomplete, or of another format.
    """
    if not directory.exists():
        raise CheckpointError(f"checkpoint {directory} does not exist")
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory}: cannot read {MANIFEST}: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {directory}: format_version must be {FORMAT_VERSION}, got {version}"
        )
    try:
        entries = {
            name: (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()
        }
        int(manifest["sequence"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {directory}: {MANIFEST} is damaged: {error!r}"
        ) from error
    if not {WEIGHTS, METADATA} <= entries.keys() <= {WEIGHTS, METADATA, STATE}:
        raise CheckpointError(
            f"checkpoint {directory}: {MANIFEST} must list {WEIGHTS}, {METADATA} and perhaps "
            f"{STATE}, got {sorted(entries)}"
        )
    for name, (size, _) in entries.items():
        try:
            got = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {directory}: {name} is missing ({error.strerror})"
            ) from None
        if got != size:
            raise CheckpointError(
                f"checkpoint {directory}: {name} must have {size} bytes, got {got}"
            )
    return manifest


def verify(directory: Path) -> dict:
    """Compare every file with the manifest by size and checksum; return the manifest's files.

    Raises:
        CheckpointError: missing, incomplete, damaged, or of another format.
    """
    files = read_manifest(directory)["files"]
    for name, entry in files.items():
        try:
            with open(directory / name, "rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {directory}: cannot read {name}: {error.strerror}"
            ) from error
        if got != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint {directory}: {name} must have the checksum "
                f"{entry['sha256'][:12]}..., got {got[:12]}...: it was changed or damaged"
            )
    return files


def _portable_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU: safetensors takes neither shared memory nor strides."""
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"weights must map names (str) to Tensors, got {name!r} with a "
                f"{type(tensor).__name__}"
            )
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def _portable_state(value: Any, key_path: str) -> Any:
    """Return `value` with its tensors on the CPU; TypeError if weights_only=True rejects a part.

    Types are compared exactly: a numpy float is a float to isinstance, but not to the loader.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int, float, bool, type(None)):
                raise TypeError(
                    f"the keys of {key_path} must be str, int, float, bool or None, got {key!r} "
                    f"of type {type(key).__name__}"
                )
        return {key: _portable_state(item, f"{key_path}[{key!r}]") for key, item in value.items()}
    if kind in (list, tuple):
        return kind(_portable_state(item, f"{key_path}[{i}]") for i, item in enumerate(value))
    if kind in (Tensor, torch.nn.Parameter):
        tensor = value.detach().cpu()
        # torch.save writes the whole memory behind a view: cut a slice of a large buffer out first.
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return tensor
    if kind in (str, int, float, bool, type(None)):
        return value
    raise TypeError(
        f"{key_path} must be a dict, list, tuple, str, int, float, bool, None or Tensor, got a "
        f"{kind.__module__}.{kind.__qualname__}"
    )


def _refuse_foreign(directory: Path) -> None:
    """Raise CheckpointError unless saving would replace nothing, or a checkpoint."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} must be a new directory or a checkpoint, got a file")
    foreign = set(os.listdir(directory)) - {WEIGHTS, STATE, METADATA, MANIFEST}
    if foreign:
        raise CheckpointError(
            f"{directory} must be a new directory or a checkpoint, got a directory that holds "
            f"{min(foreign)!r}"
        )


class _HashingFile:
    """What torch.save needs of a file, counting and hashing on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    @property
    def entry(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self._digest.hexdigest()}


def _write(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Write one file to the disk; return its entry in the manifest."""
    with open(path, "xb") as file:
        hashing = _HashingFile(file)
        try:
            write(hashing)
        except Exception:
            # torch.save reports a full disk as an internal error of its writer.
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    size = path.stat().st_size
    if size != hashing.size:
        raise OSError(errno.EIO, f"wrote {hashing.size} bytes but the file has {size}", str(path))
    return hashing.entry
