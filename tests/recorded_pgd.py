"""Results recorded from the released code of Policy-Guided Diffusion.

The environment variable POLYGRAD_RECORDED_PGD names a folder of other recordings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(os.environ.get("POLYGRAD_RECORDED_PGD", Path(__file__).parent / "fixtures" / "pgd"))
INDEX = json.loads((FIXTURES / "index.json").read_text())


def cases(*kinds: str) -> list[str]:
    """Return the names of the recorded cases of these kinds."""
    return [name for name, case in INDEX.items() if case["kind"] in kinds]


def recorded(name: str) -> dict[str, Tensor]:
    """Return what is recorded of one case."""
    with np.load(FIXTURES / INDEX[name]["file"]) as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}
