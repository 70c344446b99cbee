"""Without a GPU the kernels run in triton's interpreter, which must be chosen before triton is
imported."""

import importlib.util
import os

import pytest
import torch

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
