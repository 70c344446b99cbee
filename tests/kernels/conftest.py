"""Without a GPU the kernels run in triton's interpreter, which must be chosen before triton is
imported."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True, scope="session")
def guards():
    """Interpreted kernels run between guards, their programs in random order."""
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    import guarded_kernels

    with guarded_kernels.guards():
        yield


@pytest.fixture(scope="session")
def compiled_rows(tmp_path_factory):
    """Run scripts of this folder that compile kernels, without the interpreter: a function of name
    -> command, which returns name -> the JSON rows that each has printed.

    Once in a session, whichever of pytest's processes asks, and one call after another: what two of
    them compile, triton then finds on disk.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def run(commands):
        stored = shared / f"compiled-{'-'.join(map(str, commands))}.json"
        with FileLock(shared / "compiled.lock"):
            if not stored.exists():
                stored.write_text(json.dumps(_outputs(commands)))
        outputs = json.loads(stored.read_text())
        return {
            name: [json.loads(line) for line in outputs[str(name)] if line.startswith("{")]
            for name in commands
        }

    return run


def _outputs(commands):
    """Run commands beside each other; return the lines that each has printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = {
        name: subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, env=environment, text=True
        )
        for name, command in commands.items()
    }
    lines = {}
    for name, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, output
        lines[str(name)] = output.splitlines()
    return lines
