"""Everything the commands of offline learning need, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from polygrad_fast.config.edm import (
    EDMConfig,
    EDMTrainingConfig,
    PolicyGuidanceConfig,
    TemporalUNetConfig,
)
from polygrad_fast.config.offline_agents import IQLConfig, TD3BCConfig
from polygrad_fast.config.options import Options
from polygrad_fast.config.world_models import EnsembleConfig
from polygrad_fast.errors import InputError


@dataclass(frozen=True)
class DiffuseConfig(Options):
    """What training a diffusion model on a dataset's windows needs besides dataset and seed. The
    defaults are the released code's of policy-guided diffusion."""

    window_length: int = 32
    """Rows of a window, L."""
    window_stride: int = 8
    """From one window to the next; an episode's first window and those that end in a terminal are
    taken in any case."""
    validation_fraction: float = 0.05
    """Share of the episodes that are held out."""
    network: TemporalUNetConfig = field(default_factory=TemporalUNetConfig)
    training: EDMTrainingConfig = field(default_factory=EDMTrainingConfig)
    sigma_data: float = 1.0
    """Standard deviation of normalized data, for EDM's preconditioning."""
    total_updates: int | None = None
    """Updates of the training; None: as many as `training.num_epochs` need."""
    validation_windows: int = 1024
    """Held-out windows, at most, that the validation loss is measured on."""
    validation_interval: int = 5000
    """Updates between two such measurements."""
    log_interval: int = 500
    """Updates between two rows of metrics.csv."""
    checkpoint_interval: int = 5000
    keep_checkpoints: int = 2
    cpu_threads: int | None = None
    """PyTorch's threads on a CPU; None: as they are."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "window_length", "window_stride", "validation_windows")
        self._check_at_least(1, "validation_interval", "log_interval")
        self._check_at_least(1, "checkpoint_interval", "keep_checkpoints")
        self._check(0 <= self.validation_fraction < 1, "validation_fraction", "in [0, 1)")
        self._check_positive("sigma_data", "total_updates", "cpu_threads")
        shortest = 2 ** (self.network.num_levels - 1)
        levels = f"{self.network.num_levels} levels of the network"
        self._check(
            self.window_length >= shortest, "window_length", f"at least {shortest} for {levels}"
        )

    @classmethod
    def from_preset(cls, name: str) -> DiffuseConfig:
        """Return a preset: "released", "paper", or "quick" (small tasks on a CPU).

        Raises:
            InputError: unknown preset.
        """
        return _preset(DIFFUSE_PRESETS, name)


@dataclass(frozen=True)
class DynamicsConfig(Options):
    """What training a dynamics ensemble on a dataset's transitions needs besides dataset and seed.
    Sizes are those of PETS and MBPO, `total_updates` is this library's."""

    window_length: int = 32
    """Steps of an imagined trajectory where `trajectory_rows` of `offline train` does not say
    otherwise: the windows' length of the diffusion model that it is compared with."""
    ensemble: EnsembleConfig = field(default_factory=lambda: EnsembleConfig(batch_size=256))
    """Networks and their training; batch_size counts transitions."""
    total_updates: int = 100_000
    log_interval: int = 500
    """Updates between two rows of metrics.csv."""
    checkpoint_interval: int = 5000
    keep_checkpoints: int = 2
    cpu_threads: int | None = None
    """PyTorch's threads on a CPU; None: as they are."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "window_length", "total_updates", "log_interval")
        self._check_at_least(1, "checkpoint_interval", "keep_checkpoints")
        self._check_positive("cpu_threads")

    @classmethod
    def from_preset(cls, name: str) -> DynamicsConfig:
        """Return a preset: "released" and "paper" with the windows of those, or "quick" (small
        tasks on a CPU).

        Raises:
            InputError: unknown preset.
        """
        return _preset(DYNAMICS_PRESETS, name)


@dataclass(frozen=True)
class OfflineTrainConfig(Options):
    """What training an agent on real or synthetic data needs besides agent, data and seed. The
    defaults are the released code's of policy-guided diffusion, with the paper's guidance."""

    td3_bc: TD3BCConfig = field(default_factory=TD3BCConfig)
    """Options of `--agent td3_bc`; its total_updates is that of the run."""
    iql: IQLConfig = field(default_factory=IQLConfig)
    """Options of `--agent iql`; its total_updates is that of the run."""
    sampler: EDMConfig = field(default_factory=EDMConfig)
    """How synthetic trajectories are sampled."""
    guidance: PolicyGuidanceConfig = field(
        default_factory=lambda: PolicyGuidanceConfig(coefficient=1.0, normalize=True, denoised=True)
    )
    """Of `--data guided`."""
    total_updates: int = 1_000_000
    batch_size: int = 256
    real_share: float = 0.0625
    """Share of a batch that is real with synthetic data."""
    num_trajectories: int = 8192
    """Trajectories of a synthetic set."""
    trajectory_rows: int | None = 129
    """Rows of a sampled trajectory, which makes one transition less; None: the windows' length and
    1. In windows only the last row can be terminal, and a trajectory's last row is dropped: sampled
    at the windows' length, synthetic data hold hardly any terminal."""
    num_sets: int = 1
    """Synthetic sets in use at once, of which the oldest is replaced by the next one; the synthetic
    part of a batch is split evenly between them, and the first ones are all there from the
    beginning. 1 is the paper's periodic generation, more its continuous one."""
    sampling_batch_size: int = 256
    lifetime: int = 10_000
    """Updates on a synthetic set before the next one is sampled; the first serves one more, as
    released."""
    first_unguided: bool = True
    """Sample the first sets without guidance; False: guided by the untrained policy. Trajectories
    of an ensemble are the policy's from the beginning."""
    eval_interval: int = 10_000
    """Updates between two evaluations."""
    eval_episodes: int = 16
    log_interval: int = 1000
    """Updates between two rows of metrics.csv."""
    checkpoint_interval: int = 10_000
    keep_checkpoints: int = 2
    engine: Literal["auto", "reference", "torch"] = "auto"
    """Sampling engine."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Arithmetic of the U-Net's products in sampling."""
    cpu_threads: int | None = None
    """PyTorch's threads on a CPU; None: as they are."""

    def _check_ranges(self) -> None:
        self._check_at_least(1, "total_updates", "batch_size", "num_trajectories")
        self._check_at_least(1, "sampling_batch_size", "lifetime", "eval_interval", "eval_episodes")
        self._check_at_least(1, "log_interval", "checkpoint_interval", "keep_checkpoints")
        self._check_at_least(1, "num_sets")
        self._check(0 <= self.real_share <= 1, "real_share", "in [0, 1]")
        rows = self.trajectory_rows
        self._check(rows is None or rows >= 2, "trajectory_rows", "None or at least 2")
        self._check_positive("cpu_threads")

    @property
    def num_real(self) -> int:
        """Real rows of a batch with synthetic data."""
        return round(self.real_share * self.batch_size)

    @classmethod
    def from_preset(cls, name: str) -> OfflineTrainConfig:
        """Return a preset: "released", "paper", or "quick" (small tasks on a CPU).

        Raises:
            InputError: unknown preset.
        """
        return _preset(OFFLINE_TRAIN_PRESETS, name)


def _preset(presets: dict, name: str):
    if not isinstance(name, str) or name not in presets:
        raise InputError(f"preset must be one of {list(presets)}, got {name!r}")
    return presets[name]()


def _paper_diffuse() -> DiffuseConfig:
    return DiffuseConfig(window_length=16, training=EDMTrainingConfig.paper())


def _quick_diffuse() -> DiffuseConfig:
    """A U-Net that a CPU trains in minutes."""
    return DiffuseConfig(
        window_length=16,
        window_stride=1,
        network=TemporalUNetConfig(features=32, num_levels=3, norm_over="window"),
        training=EDMTrainingConfig(ema_decay=0.95),
        total_updates=5000,
        validation_windows=512,
        validation_interval=500,
        log_interval=100,
        checkpoint_interval=1000,
        cpu_threads=1,
    )


def _paper_train() -> OfflineTrainConfig:
    """Sets of 2^14 trajectories of 16 rows, 4 for a training, and only synthetic data."""
    return OfflineTrainConfig(
        td3_bc=TD3BCConfig.original(),
        iql=IQLConfig(target_update="after", adam_eps=1e-8),
        sampler=EDMConfig.paper(),
        guidance=PolicyGuidanceConfig.paper(),
        real_share=0.0,
        num_trajectories=2**14,
        trajectory_rows=16,
        lifetime=250_000,
    )


def _quick_train() -> OfflineTrainConfig:
    """Few steps of the sampler, which Karras et al.'s Euler step needs, and short runs, whose
    networks a learning rate of 3e-4 leaves untrained."""
    return OfflineTrainConfig(
        td3_bc=TD3BCConfig(hidden_dim=128, learning_rate=1e-3),
        iql=IQLConfig(hidden_dim=128, learning_rate=1e-3),
        sampler=EDMConfig.paper(num_inference_steps=32),
        total_updates=10_000,
        num_trajectories=2048,
        trajectory_rows=None,
        lifetime=2500,
        eval_interval=1000,
        log_interval=250,
        checkpoint_interval=1000,
        cpu_threads=1,
    )


def _paper_dynamics() -> DynamicsConfig:
    return DynamicsConfig(window_length=16)


def _quick_dynamics() -> DynamicsConfig:
    """Five small networks, of which three imagine."""
    return DynamicsConfig(
        window_length=16,
        ensemble=EnsembleConfig(
            num_members=5, num_elites=3, hidden_dim=128, num_layers=3, batch_size=256
        ),
        total_updates=5000,
        log_interval=100,
        checkpoint_interval=1000,
        cpu_threads=1,
    )


DYNAMICS_PRESETS = {
    "released": DynamicsConfig,
    "paper": _paper_dynamics,
    "quick": _quick_dynamics,
}
DIFFUSE_PRESETS = {"released": DiffuseConfig, "paper": _paper_diffuse, "quick": _quick_diffuse}
OFFLINE_TRAIN_PRESETS = {
    "released": OfflineTrainConfig,
    "paper": _paper_train,
    "quick": _quick_train,
}
