"""Files that appear whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power loss. Does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError name ``path``: a failed write names no file, and a temporary one says little
    to a user."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``; a reader finds the old or the new content, never a mixture."""
    path = Path(path)
    # One fixed name: what a killed process left is overwritten by the next write.
    temporary = path.with_name(f".tmp-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Write ``data`` as indented JSON; a reader finds the old or the new file, never a mixture.

    Raises TypeError, before anything is written, if JSON cannot express ``data``.
    """
    write_bytes_atomic(path, (json.dumps(data, indent=2) + "\n").encode())
