"""Checkpoints that survive a kill, a full disk and a damaged file.

A checkpoint is a directory::

    weights.safetensors   the networks, readable without this package
    state.pt              trainer state (optimisers, counters, replay), loads with weights_only=True
    metadata.json         what the caller says about it
    manifest.json         size and sha256 of the files above

It is written as a hidden sibling ``.tmp-<name>-*``, flushed to the disk and renamed into place, so
a directory under the final name is always complete. Where one is replaced, the old one is called
``.old-<name>`` between two renames; readers look there when the final name is missing.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from polygrad_fast.errors import CheckpointError
from polygrad_fast.runs.files import fsync_directory, naming, write_bytes_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WEIGHTS, STATE, METADATA, MANIFEST = (
    "weights.safetensors",
    "state.pt",
    "metadata.json",
    "manifest.json",
)
FORMAT_VERSION = 1
# In a run directory: step checkpoints have been saved there, whatever became of them.
SAVED = ".checkpoints_saved"
# Without file locks a temporary directory counts as abandoned after this time.
_ABANDONED_SECONDS = 3600.0


def save_checkpoint(
    directory: str | Path, weights: dict[str, Tensor], state: dict | None, metadata: dict
) -> Path:
    """Write a checkpoint that appears at ``directory`` complete or not at all.

    An older checkpoint at ``directory`` is replaced; until the new one is complete on the disk it
    stays untouched. Copies tensors to the CPU, so it synchronises with a GPU.

    Args:
        directory: where to write; absent, empty, or an older checkpoint.
        weights: flat map from name to tensor, of any device and layout; tensors may share memory.
        state: nested dict, list and tuple of str, int, float, bool, None and tensors; None writes
            none.
        metadata: anything JSON can express.

    Returns:
        ``directory``.

    Raises:
        TypeError: ``weights``, ``state`` or ``metadata`` hold something else; nothing was written.
        CheckpointError: ``directory`` exists and is no checkpoint; nothing was written.
        OSError: the disk is full or not writable; an older checkpoint is as it was.
    """
    return _save(Path(directory), weights, state, metadata, sequence=0)


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict | None, dict]:
    """Read a checkpoint onto the CPU after comparing every file with the manifest.

    Returns:
        weights, state (None if it was saved without), metadata.

    Raises:
        CheckpointError: missing, incomplete or damaged; one sentence naming the path and what is
            wrong.
    """
    directory = _resolve(Path(directory))
    files = _verify(directory)
    try:
        weights = safetensors.torch.load_file(directory / WEIGHTS)
        state = None
        if STATE in files:
            state = torch.load(directory / STATE, map_location="cpu", weights_only=True)
        metadata = json.loads((directory / METADATA).read_bytes())
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"checkpoint {directory} cannot be read: {reason}") from error
    return weights, state, metadata


def read_metadata(directory: str | Path) -> dict:
    """Return what ``load_checkpoint`` returns last, without reading weights and state.

    Raises:
        CheckpointError: missing or unreadable.
    """
    directory = _resolve(Path(directory))
    _read_manifest(directory)
    try:
        return json.loads((directory / METADATA).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory}: cannot read {METADATA}: {error}") from error


class CheckpointManager:
    """The checkpoints of one run, in ``run_dir/checkpoints``: the last ``step_*`` and the ``best``.

    Safe to kill at any moment: afterwards ``latest`` and ``best`` return complete checkpoints, at
    least as new as the last save that returned. One process writes; others may read meanwhile.

    Args:
        run_dir: the run directory; nothing is created before the first save. Temporary directories
            that a killed process left there are removed.
        keep_last: how many ``step_*`` checkpoints stay, at least 1; may be changed.
    """

    def __init__(self, run_dir: str | Path, keep_last: int = 3) -> None:
        if keep_last < 1:
            raise ValueError(f"got keep_last={keep_last}, wanted at least 1")
        self.directory = Path(run_dir) / "checkpoints"
        self.keep_last = keep_last
        self._marker = Path(run_dir) / SAVED
        _remove_abandoned(self.directory, ".tmp-")
        self._sequence = self._newest_sequence()

    def save(
        self, env_step: int, weights: dict[str, Tensor], state: dict | None, metadata: dict
    ) -> Path:
        """Write ``checkpoints/step_<env_step>``, then delete what ``keep_last`` no longer covers.

        Raises as ``save_checkpoint`` does; the older checkpoints then stay untouched.
        """
        # Newest means saved last, not farthest: a run resumed from an earlier step overtakes what
        # it left behind.
        sequence = 1 + self._newest_sequence()
        path = self.directory / f"step_{env_step:09d}"
        _save(path, weights, state, metadata, sequence)
        self._sequence = sequence
        if not self._marker.exists():
            write_bytes_atomic(self._marker, b"")
        self._prune()
        return path

    def save_best(self, weights: dict[str, Tensor], metadata: dict) -> Path:
        """Replace ``checkpoints/best``: weights and metadata, no trainer state."""
        return _save(self.directory / "best", weights, None, metadata, sequence=0)

    def latest(self) -> Path | None:
        """The undamaged checkpoint saved last, or None. Warns of each damaged one that is newer."""
        skipped = []
        for path in sorted(self._steps(), key=_age_key, reverse=True):
            wrong = _wrong_with(path)
            if wrong is None:
                for reason in skipped:
                    warnings.warn(f"skipped a damaged checkpoint: {reason}", stacklevel=2)
                return path
            if path.exists():  # else another process has pruned it meanwhile
                skipped.append(wrong)
        return None

    def best(self) -> Path | None:
        """The best checkpoint, or None, also where it is damaged."""
        path = _resolve(self.directory / "best")
        return path if _wrong_with(path) is None else None

    def damage(self, kind: str) -> list[str]:
        """What is wrong with each damaged checkpoint of a kind, "last" or "best", newest first."""
        best = _resolve(self.directory / "best")
        steps = sorted(self._steps(), key=_age_key, reverse=True)
        paths = steps if kind == "last" else [best]
        found = [_wrong_with(path) for path in paths if path.exists()]
        return [wrong for wrong in found if wrong is not None]

    def has_saved(self) -> bool:
        """Whether a step checkpoint has ever been saved here, even if none is left."""
        return self._marker.exists() or bool(self._steps())

    def others_saved(self) -> bool:
        """Whether someone else has saved here since this object was made or saved last."""
        return self._newest_sequence() > self._sequence

    def _newest_sequence(self) -> int:
        return max((_sequence(path) or 0 for path in self._steps()), default=0)

    def _steps(self) -> list[Path]:
        """Directories of the step checkpoints, one per step."""
        if not self.directory.is_dir():
            return []
        matches = (
            re.fullmatch(r"(\.old-)?(step_\d+)", name) for name in os.listdir(self.directory)
        )
        found = {_resolve(self.directory / match[2]) for match in matches if match}
        return [path for path in found if path.is_dir()]

    def _prune(self) -> None:
        steps = sorted(self._steps(), key=_age_key)
        complete = [path for path in steps if _looks_complete(path)]
        if len(complete) < self.keep_last:
            return
        keep = complete[-self.keep_last :]
        for path in steps:
            if path not in keep:
                _discard(path)


def _read_manifest(directory: Path) -> dict:
    """The manifest, its files compared by size only."""
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
            f"checkpoint {directory} has format version {version}, wanted {FORMAT_VERSION}"
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
            f"checkpoint {directory}: {MANIFEST} lists {sorted(entries)}, wanted {WEIGHTS}, "
            f"{METADATA} and perhaps {STATE}"
        )
    for name, (size, _) in entries.items():
        try:
            got = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {directory}: {name} is missing ({error.strerror})"
            ) from None
        if got != size:
            raise CheckpointError(f"checkpoint {directory}: {name} has {got} bytes, wanted {size}")
    return manifest


def _verify(directory: Path) -> dict:
    """Compare every file with the manifest by size and checksum; return the manifest's files."""
    files = _read_manifest(directory)["files"]
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
                f"checkpoint {directory}: {name} has the checksum {got[:12]}..., wanted "
                f"{entry['sha256'][:12]}...: its content was changed or damaged"
            )
    return files


def _wrong_with(path: Path) -> str | None:
    try:
        _verify(path)
    except CheckpointError as error:
        return str(error)
    return None


def _looks_complete(path: Path) -> bool:
    try:
        _read_manifest(path)
    except CheckpointError:
        return False
    return True


def _sequence(path: Path) -> int | None:
    """How many saves of its run came before, plus one; None where the manifest cannot be used."""
    try:
        return int(_read_manifest(path)["sequence"])
    except CheckpointError:
        return None


def _age_key(path: Path) -> tuple[float, int]:
    """Sort by time of saving; what cannot be told counts as newest: ``latest`` reports it."""
    sequence = _sequence(path)
    return (math.inf if sequence is None else sequence), int(path.name.rpartition("_")[2])


def _save(
    directory: Path, weights: dict[str, Tensor], state: dict | None, metadata: dict, sequence: int
) -> Path:
    weights = _portable_weights(weights)
    if state is not None:
        state = _portable_state(state, "state")
    try:
        metadata_bytes = (json.dumps(metadata, indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata cannot be written as JSON: {error}") from error
    _refuse_foreign(directory)

    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    with naming(directory):
        _remove_abandoned(parent, f".tmp-{directory.name}-")
        temporary, lock = _locked_directory(parent, f".tmp-{directory.name}-")
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
        fsync_directory(temporary)
        _move_into_place(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    fsync_directory(parent)
    return directory


def _portable_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own, contiguous CPU copies: safetensors takes neither shared memory nor strides."""
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"weights[{name!r}] is a {type(tensor).__name__}, wanted a name (str) and a Tensor"
            )
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def _portable_state(value: Any, key_path: str) -> Any:
    """``value`` with its tensors on the CPU; TypeError if weights_only=True would reject a part.

    Types are compared exactly: a numpy float is a float to isinstance, but not to the loader.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int, float, bool, type(None)):
                raise TypeError(
                    f"a key of {key_path} is {key!r} of type {type(key).__name__}, wanted str, "
                    "int, float, bool or None"
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
        f"{key_path} is a {kind.__module__}.{kind.__qualname__}, wanted dict, list, tuple, str, "
        "int, float, bool, None or Tensor"
    )


def _refuse_foreign(directory: Path) -> None:
    """Replacing deletes: do that to nothing but checkpoints."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: wanted a new directory or a checkpoint")
    foreign = set(os.listdir(directory)) - {WEIGHTS, STATE, METADATA, MANIFEST}
    if foreign:
        raise CheckpointError(
            f"{directory} exists and is not a checkpoint (it holds {min(foreign)!r}): wanted a new "
            "directory or a checkpoint to replace"
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


def _move_into_place(temporary: Path, directory: Path) -> None:
    # A directory that is not empty cannot be replaced in one rename. Between the two below readers
    # find the old one under its other name (_resolve), so a kill at any point leaves a complete
    # checkpoint.
    old = _old_name(directory)
    if not directory.exists():
        os.replace(temporary, directory)
    else:
        if old.exists():
            _discard(old)
        os.replace(directory, old)
        try:
            os.replace(temporary, directory)
        except BaseException:
            os.replace(old, directory)
            raise
    if old.exists():
        fsync_directory(directory.parent)
        _discard(old)


def _old_name(directory: Path) -> Path:
    return directory.with_name(f".old-{directory.name}")


def _resolve(directory: Path) -> Path:
    """Where the checkpoint ``directory`` is: there, or moved aside by a save that was killed."""
    old = _old_name(directory)
    return old if not directory.exists() and old.exists() else directory


def _discard(directory: Path) -> None:
    """Delete a checkpoint; killed half way, this leaves a temporary directory, no damaged one."""
    doomed = directory.with_name(
        f".tmp-{directory.name.removeprefix('.old-')}-{os.urandom(6).hex()}"
    )
    os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new directory and a descriptor with its lock, which ends when this process does."""
    while True:
        path = parent / f"{prefix}{os.urandom(6).hex()}"
        path.mkdir()
        if fcntl is None:
            return path, None
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for abandoned before it was locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the same, and the other process is removing it now
            os.close(lock)
            continue
        except OSError:  # a file system without locks: _remove_if_abandoned goes by age there
            pass
        if path.exists():
            return path, lock
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove temporary directories whose process is gone; those being written are locked."""
    if parent.is_dir():
        for name in os.listdir(parent):
            if name.startswith(prefix):
                _remove_if_abandoned(parent / name)


def _remove_if_abandoned(path: Path) -> None:
    lock = None
    try:
        if fcntl is not None:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                return
            except BlockingIOError:
                return
            except OSError:
                pass
        if path.is_dir() and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:  # gone already, or not ours to open
        pass
    finally:
        if lock is not None:
            os.close(lock)
