"""Drop-in use of the released code (github.com/marc-rigter/polygrad-world-models): its weights, its
checkpoints and its live objects. See README.md beside this file."""

from polygrad_fast.compat.accelerate import AcceleratedDiffusion, accelerate
from polygrad_fast.compat.checkpoint import (
    ReleasedCheckpoint,
    export_checkpoint,
    load_checkpoint,
)
from polygrad_fast.compat.install import install, uninstall
from polygrad_fast.compat.weights import (
    export_actor_critic,
    export_denoiser,
    load_actor_critic,
    load_denoiser,
    load_policy,
)

__all__ = [
    "AcceleratedDiffusion",
    "ReleasedCheckpoint",
    "accelerate",
    "export_actor_critic",
    "export_checkpoint",
    "export_denoiser",
    "install",
    "load_actor_critic",
    "load_checkpoint",
    "load_denoiser",
    "load_policy",
    "uninstall",
]
