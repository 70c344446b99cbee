"""What software and machine a run was made with."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from polygrad_fast._version import __version__
from polygrad_fast.runs.processor import Processor


def versions() -> dict[str, str | None]:
    """Describe the software and machine of a run, for versions.json; what is unknown is None.

    Keys: polygrad_fast, git_commit (ends in "-dirty" if tracked files differ), python, torch,
    numpy, gymnasium, mujoco, triton, cuda (the version torch was built for), gpu, platform,
    processor. Never fails.
    """
    packages = ("torch", "numpy", "gymnasium", "mujoco", "triton")
    cuda, gpu = _cuda()
    return {
        "polygrad_fast": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        **{name: _package_version(name) for name in packages},
        "cuda": cuda,
        "gpu": gpu,
        "platform": platform.platform(),
        "processor": Processor.of_this_machine().name,
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:
        return None


def _cuda() -> tuple[str | None, str | None]:
    try:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return torch.version.cuda, name
    except Exception:
        return None, None


def _git_commit() -> str | None:
    checkout = Path(__file__).resolve().parents[2]
    # An installed package may lie inside another checkout, whose commit says nothing about it.
    if not (checkout / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            ["git", "-C", str(checkout), *describe], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
