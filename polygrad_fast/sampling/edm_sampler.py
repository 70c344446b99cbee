"""The public sampler of EDM denoisers, and its engines."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.config import EDMConfig
from polygrad_fast.denoisers.temporal_unet import TemporalUNet
from polygrad_fast.diffusion.edm import NoiseLevels, denoise, preconditioning
from polygrad_fast.errors import InputError
from polygrad_fast.profiling import annotate
from polygrad_fast.sampling.folding import why_foreign
from polygrad_fast.sampling.heun import FixedEntries, Guidance, heun_sample
from polygrad_fast.sampling.input_checks import as_tensor, check_generator, common_device
from polygrad_fast.sampling.packed_unet import PackedTemporalUNet
from polygrad_fast.sampling.torch_engine import DTYPES, cuda_matmul_precision
from polygrad_fast.structure import parts

ENGINES = ("auto", "reference", "torch")


@dataclass(frozen=True)
class EDMNoise:
    """Every standard normal of one sample."""

    initial: Tensor  # [B, L, D], before it is multiplied by sigma_0
    steps: Tensor  # [N, B, L, D], before s_noise; read where gamma_i > 0


@dataclass(frozen=True)
class EDMSample:
    """Sampled trajectories, normalized."""

    trajectories: Tensor  # [B, L, D]
    chain: Tensor | None = None  # [N, B, L, D], after each step


class PlainDenoiser:
    """D(x; sigma) by the network as it is."""

    def __init__(self, network: nn.Module, config: EDMConfig):
        self.network, self.sigma_data = network, config.sigma_data

    def refresh(self) -> None:
        """Do nothing: the network is called."""

    def __call__(self, trajectories: Tensor, sigma: float) -> Tensor:
        """Return D(x; sigma), [B, L, D]."""
        levels = trajectories.new_full((len(trajectories),), sigma)
        return denoise(self.network, trajectories, levels, self.sigma_data)


class PackedDenoiser:
    """D(x; sigma) by the packed network, at the noise levels of a sampler.

    Args:
        network: the U-Net.
        config: of the noise levels.
        dtype: see `EDMSampler`.
    """

    def __init__(self, network: TemporalUNet, config: EDMConfig, dtype: str):
        levels = NoiseLevels.of(config)
        distinct = sorted({*levels.sigma[:-1], *levels.sigma_hat})
        device = network.output.weight.device
        sigma = torch.tensor(distinct, dtype=torch.float64)
        factors = preconditioning(sigma, config.sigma_data)
        rows = zip(*(f.tolist() for f in factors[:3]), strict=True)
        self._at = {s: (i, *row) for i, (s, row) in enumerate(zip(distinct, rows, strict=True))}
        c_noise = factors.c_noise.to(device, torch.float32)
        self._packed = PackedTemporalUNet(network, c_noise, DTYPES[dtype])
        self._precision = contextlib.nullcontext
        if device.type == "cuda":
            name = "tf32" if dtype == "tf32" else "ieee"
            self._precision = functools.partial(cuda_matmul_precision, name)

    def refresh(self) -> None:
        """Fold the network's current weights."""
        self._packed.refresh()

    def __call__(self, trajectories: Tensor, sigma: float) -> Tensor:
        """Return D(x; sigma), [B, L, D]; sigma is one of the noise levels."""
        index, c_skip, c_out, c_in = self._at[sigma]
        with self._precision():
            prediction = self._packed(c_in * trajectories, index)
        return prediction.mul_(c_out).add_(trajectories, alpha=c_skip)


class EDMSampler:
    """Sample trajectories from an EDM denoiser by the stochastic Heun sampler (Karras et al. 2022,
    algorithm 2).

    Its engines draw the same noise and agree to rounding on a CPU. Weights are read anew at every
    sample, and a network that was changed is noticed. Threads may share a sampler: their calls wait
    for each other. A copy or an unpickled sampler is built anew.

    Args:
        denoiser: F_theta, called as denoiser(c_in x [B, L, D], c_noise [B]), of float32 weights.
            Its attribute `trajectory_dim` is D.
        config: noise levels and options; default the released code's.
        engine: "reference" is plain PyTorch; "torch" packs this library's `TemporalUNet` (see
            `packed_unet`), on a GPU one CUDA graph per evaluation, and calls any other network as
            it is; "auto" is "torch".
        dtype: "float32", "bfloat16" or, on a GPU, "tf32": of the network's products; moments and
            trajectories are float32. "auto" is float32 on a CPU, tf32 on a GPU. bfloat16 is fast
            only on processors that have it.
        device: "auto" and None are the denoiser's; another one is an error.

    Raises:
        InputError: an option that is not offered.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        config: EDMConfig | None = None,
        engine: str = "auto",
        dtype: str = "auto",
        device: str | torch.device | None = "auto",
    ):
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {list(ENGINES)}, got {engine!r}")
        if not (config is None or isinstance(config, EDMConfig)):
            raise InputError(f"config must be an EDMConfig, got {config!r}")
        if not isinstance(denoiser, nn.Module):
            raise InputError(f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}")
        self.denoiser, self.config = denoiser, config or EDMConfig()
        self.device = common_device(device, denoiser)
        self.engine = "torch" if engine == "auto" else engine
        self._dtype = dtype
        self._lock = threading.Lock()
        self._build()

    def __reduce__(self):
        return EDMSampler, (self.denoiser, self.config, self.engine, self._dtype)

    def _packed_parts(self) -> list[nn.Module] | None:
        """Return the parts that are packed, None where the denoiser is to be called."""
        packs = self.engine == "torch" and isinstance(self.denoiser, TemporalUNet)
        return parts(self.denoiser) if packs and why_foreign(self.denoiser) is None else None

    def _build(self) -> None:
        foreign = why_foreign(self.denoiser)
        self._built_for = self._packed_parts()
        self._packs = self._built_for is not None
        on_gpu = self.device.type == "cuda"
        self.dtype = self._dtype
        if self.dtype == "auto":
            self.dtype = "tf32" if on_gpu and self._packs else "float32"
        offered = ["float32"]
        if self._packs:
            offered += ["bfloat16", *(["tf32"] if on_gpu else [])]
        if self.dtype not in offered:
            why = f"engine {self.engine!r}" if foreign is None else f"a denoiser that {foreign}"
            raise InputError(
                f"dtype must be 'auto' or one of {offered} with {why} on {self.device.type!r}, got "
                f"{self._dtype!r}"
            )
        if self._packs:
            self._denoise = PackedDenoiser(self.denoiser, self.config, self.dtype)
        else:
            self._denoise = PlainDenoiser(self.denoiser, self.config)

    @torch.no_grad()
    def sample(
        self,
        num_trajectories: int,
        length: int,
        generator: torch.Generator | None = None,
        noise: EDMNoise | None = None,
        guidance: Guidance | None = None,
        conditions: FixedEntries | None = None,
        return_chain: bool = False,
    ) -> EDMSample:
        """Return B normalized trajectories of L rows.

        Normals are drawn in order: the start, then those of each step that adds noise (gamma_i >
        0); the released code draws for every step.

        Args:
            num_trajectories, length: B and L, which need not be the length of training.
            generator: source of the normals, on the sampler's device; default torch's.
            noise: every normal, given.
            guidance: called at the start of every step; `PolicyGuidance`, for instance.
            conditions: known entries.
            return_chain: also return the trajectories after every step.

        Raises:
            InputError: sizes out of range, noise of another shape or not finite, or conditions that
                do not fit.
        """
        batch = as_integer(num_trajectories, "num_trajectories", 1)
        shape = batch, as_integer(length, "length", self._min_length()), self._trajectory_dim()
        check_generator(generator, self.device)
        if noise is not None:
            noise = self._check_noise(noise, shape)
        if conditions is not None:
            conditions.check(shape)
        autocast_off = torch.autocast(self.device.type, enabled=False)
        with self._lock, torch.inference_mode(False), torch.no_grad(), autocast_off:
            if self._packed_parts() != self._built_for:
                self._build()  # it was changed: what is packed is no longer what it computes
            with annotate("refresh"):
                self._denoise.refresh()
            normals = self._normals(shape, generator, noise)
            trajectories, chain = heun_sample(
                next(normals),
                normals,
                self.config,
                self._denoise,
                guidance,
                conditions,
                return_chain,
            )
        return EDMSample(trajectories, chain)

    def _min_length(self) -> int:
        return getattr(self.denoiser, "min_length", 1)

    def _trajectory_dim(self) -> int:
        dim = getattr(self.denoiser, "trajectory_dim", None)
        if dim is None:
            raise InputError(
                f"denoiser must have the attribute trajectory_dim, the numbers of a row, got a "
                f"{type(self.denoiser).__name__} without it"
            )
        return dim

    def _normals(
        self, shape: tuple[int, ...], generator: torch.Generator | None, noise: EDMNoise | None
    ) -> Iterator[Tensor | None]:
        """Yield the start's normals, then each step's, None where gamma_i is 0."""

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        yield draw() if noise is None else noise.initial
        for index, gamma in enumerate(NoiseLevels.of(self.config).gamma):
            if gamma == 0.0:
                yield None
            else:
                yield draw() if noise is None else noise.steps[index]

    def _check_noise(self, noise: EDMNoise, shape: tuple[int, ...]) -> EDMNoise:
        if not isinstance(noise, EDMNoise):
            raise InputError(f"noise must be an EDMNoise, got {type(noise).__name__}")
        steps = (self.config.num_inference_steps, *shape)
        converted = []
        for name, wanted in (("initial", shape), ("steps", steps)):
            tensor = as_tensor(getattr(noise, name), f"noise.{name}")
            if tuple(tensor.shape) != wanted:
                raise InputError(
                    f"noise.{name} must be of shape {wanted}, got shape {tuple(tensor.shape)}"
                )
            converted.append(tensor.to(self.device, torch.float32))
            if not torch.isfinite(converted[-1]).all():
                raise InputError(f"noise.{name} must be finite numbers, got NaN or infinity")
        return EDMNoise(*converted)
