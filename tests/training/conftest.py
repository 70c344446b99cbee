"""The device of tests that run on an imitated GPU, and on a real one where there is one."""

from __future__ import annotations

import contextlib

import fake_cuda
import pytest
import torch


@pytest.fixture(
    params=[
        "imitated",
        pytest.param(
            "real",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ]
)
def gpu(request):
    """The imitated device, or None for a real one."""
    with fake_cuda.installed() if request.param == "imitated" else contextlib.nullcontext() as gpu:
        yield gpu
