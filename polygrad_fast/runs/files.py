"""Files and directories that appear whole or not at all.

A file is written under a temporary name and renamed. So is a directory; where it replaces another
one, the old one is called `.old-<name>` between two renames, and `locate` finds it there.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power loss. Does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError name `path`.

    A failed write names no file, and the name of a temporary one says little to a user.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to, which the end of the block renames to `path`.

    A reader finds the old or the new content, never a mixture. Where the block raises, the old file
    stays. Makes the folder.
    """
    path = Path(path)
    # One fixed name: what a killed process left is overwritten by the next write.
    temporary = path.with_name(f".tmp-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`; a reader finds the old or the new content, never a mixture."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON; a reader finds the old or the new file, never a mixture.

    Raises TypeError, before anything is written, if JSON cannot express `data`.
    """
    write_bytes_atomic(path, (json.dumps(data, indent=2) + "\n").encode())


def make_temporary(directory: Path) -> Path:
    """Make an empty sibling of `directory`, to be filled and moved there: `.tmp-<name>-*`."""
    path = _temporary_name(directory)
    path.mkdir()
    return path


def remove_temporaries(parent: Path, name: str | None = None) -> None:
    """Remove the temporary directories within `parent` that killed processes left.

    A process that is still filling one then fails with an OSError, and nothing of it appears.

    Args:
        parent: the folder; it need not exist.
        name: only those of the directory `parent / name`; None: all.
    """
    if not parent.is_dir():
        return
    of = ".+" if name is None else re.escape(name)
    for found in os.listdir(parent):
        if re.fullmatch(rf"\.tmp-{of}-[0-9a-f]{{12}}", found):
            # Renamed first: whoever still fills it cannot move it into place half deleted.
            doomed = parent / f"{found[:-12]}{os.urandom(6).hex()}"
            with contextlib.suppress(OSError):  # another process was quicker
                os.replace(parent / found, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def move_into_place(temporary: Path, directory: Path) -> None:
    """Rename a filled temporary directory to `directory`, replacing what is there.

    A directory that is not empty cannot be replaced in one rename. Between the two it takes, the
    old one is where `locate` finds it, so that a kill at any point leaves one of them complete.
    """
    old = _old_name(directory)
    if not directory.exists():
        os.replace(temporary, directory)
    else:
        if old.exists():
            discard(old)
        os.replace(directory, old)
        try:
            os.replace(temporary, directory)
        except BaseException:
            os.replace(old, directory)
            raise
    if old.exists():
        fsync_directory(directory.parent)
        discard(old)


def locate(directory: Path) -> Path:
    """Return where `directory` is: there, or moved aside by a process that was killed."""
    old = _old_name(directory)
    return old if not directory.exists() and old.exists() else directory


def discard(directory: Path) -> None:
    """Delete a directory; killed half way, this leaves a temporary one, not half of it."""
    name = directory.name.removeprefix(".old-")
    doomed = _temporary_name(directory.with_name(name))
    os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _temporary_name(directory: Path) -> Path:
    return directory.with_name(f".tmp-{directory.name}-{os.urandom(6).hex()}")


def _old_name(directory: Path) -> Path:
    return directory.with_name(f".old-{directory.name}")
