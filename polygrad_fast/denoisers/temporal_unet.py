"""U-Net over time of policy-guided diffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.denoisers.step_embedding import SinusoidalFeatures, step_mlp
from polygrad_fast.errors import InputError
from polygrad_fast.initialization import lecun_normal_
from polygrad_fast.structure import structure

NUM_GROUPS = 8
NORM_OVER = ("row", "window")


class TemporalGroupNorm(nn.GroupNorm):
    """GroupNorm of activations [B, C, L], with moments over the channels of each group and

    - "row": of every time step alone. The released code calls the network on single trajectories,
      whose time axis its GroupNorm takes for the batch.
    - "window": over all time steps, as `nn.GroupNorm` does.
    """

    def __init__(self, num_channels: int, over: str):
        super().__init__(NUM_GROUPS, num_channels, eps=1e-6)
        self.over = over

    def forward(self, x: Tensor) -> Tensor:
        if self.over == "window":
            return super().forward(x)
        batch, channels, length = x.shape
        rows = x.transpose(1, 2).reshape(-1, channels)
        return super().forward(rows).view(batch, length, channels).transpose(1, 2)


class EncoderLevel(nn.Module):
    """Two convolutions, the noise level added after the first: [B, C, L], [B, F] -> [B, W, L]."""

    def __init__(self, in_dim: int, width: int, embedding_dim: int, norm_over: str):
        super().__init__()
        self.conv_1 = nn.Conv1d(in_dim, width, 3, padding=1)
        self.condition = nn.Linear(embedding_dim, width)
        self.norm_1 = TemporalGroupNorm(width, norm_over)
        self.conv_2 = nn.Conv1d(width, width, 3, padding=1)
        self.norm_2 = TemporalGroupNorm(width, norm_over)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.conv_1(x) + self.condition(embedding).unsqueeze(-1)
        x = torch.relu(self.norm_1(x))
        return torch.relu(self.norm_2(self.conv_2(x)))


class DecoderLevel(nn.Module):
    """Resize to the encoder's output of a level and join it: [B, 2 W, l], [B, W, L] -> [B, W, L].

    The convolution after the nearest-neighbour resize is 2 wide and padded on the right: row j
    reads rows j and j + 1.
    """

    def __init__(self, width: int, embedding_dim: int, norm_over: str):
        super().__init__()
        self.conv_1 = nn.Conv1d(2 * width, width, 2)
        self.condition = nn.Linear(embedding_dim, width)
        self.norm_1 = TemporalGroupNorm(width, norm_over)
        self.conv_2 = nn.Conv1d(2 * width, width, 3, padding=1)
        self.norm_2 = TemporalGroupNorm(width, norm_over)
        self.conv_3 = nn.Conv1d(width, width, 3, padding=1)
        self.norm_3 = TemporalGroupNorm(width, norm_over)

    def forward(self, x: Tensor, encoded: Tensor, embedding: Tensor) -> Tensor:
        x = F.interpolate(x, size=encoded.shape[-1], mode="nearest-exact")
        x = self.conv_1(F.pad(x, (0, 1))) + self.condition(embedding).unsqueeze(-1)
        x = torch.relu(self.norm_1(x))
        x = torch.relu(self.norm_2(self.conv_2(torch.cat([x, encoded], dim=1))))
        return torch.relu(self.norm_3(self.conv_3(x)))


class TemporalUNet(nn.Module):
    """F_theta(x, c) of policy-guided diffusion (arXiv 2404.06356), as in the released code.

    A row of x is [observation | action | reward | done], all normalized, D = S + A + 2. Level i
    has width F 2^i and half the rows of level i - 1, odd numbers rounded down. Kernels start
    LeCun-normal (variance 1 / fan_in, truncated at 2 standard deviations), biases at 0.

    Args:
        observation_dim, action_dim: S and A.
        features: F, the width of level 0, a multiple of 8 of at least 16 (paper: 1024). With 16 a
            group of the GroupNorms has 2 channels, whose variance is ill-conditioned in float32.
        num_levels: at least 1 (paper: 3).
        generator: source of the initial weights; default torch's.
        norm_over: what the GroupNorms take their moments over, "row" (released) or "window"; see
            `TemporalGroupNorm`.

    Raises:
        InputError: a size out of range, or another `norm_over`.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        features: int = 1024,
        num_levels: int = 3,
        generator: torch.Generator | None = None,
        norm_over: str = "row",
    ):
        super().__init__()
        if norm_over not in NORM_OVER:
            raise InputError(f"norm_over must be one of {list(NORM_OVER)}, got {norm_over!r}")
        self.observation_dim = as_integer(observation_dim, "observation_dim", 1)
        self.action_dim = as_integer(action_dim, "action_dim", 1)
        self.features = as_integer(features, "features", 16)
        self.num_levels = as_integer(num_levels, "num_levels", 1)
        if self.features % NUM_GROUPS:
            raise InputError(f"features must be a multiple of {NUM_GROUPS}, got {features}")
        self.trajectory_dim = observation_dim + action_dim + 2
        widths = [features * 2**level for level in range(num_levels)]
        quarter = features // 4
        self.noise_embedding = step_mlp(SinusoidalFeatures(quarter), quarter, features)
        self.encoder = nn.ModuleList(
            EncoderLevel(in_dim, width, features, norm_over)
            for in_dim, width in zip([self.trajectory_dim, *widths], widths, strict=False)
        )
        self.decoder = nn.ModuleList(
            DecoderLevel(width, features, norm_over) for width in reversed(widths[:-1])
        )
        self.output = nn.Conv1d(features, self.trajectory_dim, 1)
        self.reset_parameters(generator)
        self.built = structure(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, from `generator` or torch's."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                lecun_normal_(module.weight, module.weight[0].numel(), generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, TemporalGroupNorm):
                module.reset_parameters()

    @property
    def min_length(self) -> int:
        """The shortest trajectories that every level has a row of."""
        return 2 ** (self.num_levels - 1)

    def forward(self, trajectory: Tensor, noise_condition: Tensor) -> Tensor:
        """Return F_theta, [B, L, D].

        Args:
            trajectory: c_in x, [B, L, D] of the weights' dtype, L at least `min_length`.
            noise_condition: c_noise of every trajectory, [B].

        Raises:
            InputError: another shape.
        """
        self._check(trajectory, noise_condition)
        embedding = F.silu(self.noise_embedding(noise_condition))
        x, encoded = trajectory.transpose(1, 2), []
        for level in self.encoder:
            if encoded:
                x = F.max_pool1d(x, 2)
            x = level(x, embedding)
            encoded.append(x)
        for level, skip in zip(self.decoder, reversed(encoded[:-1]), strict=True):
            x = level(x, skip, embedding)
        return self.output(x).transpose(1, 2)

    def _check(self, trajectory: Tensor, noise_condition: Tensor) -> None:
        shape = tuple(trajectory.shape)
        if len(shape) != 3 or shape[2] != self.trajectory_dim or shape[1] < self.min_length:
            raise InputError(
                f"trajectory must be of shape [B, L, {self.trajectory_dim}] with L at least "
                f"{self.min_length}, got shape {shape}"
            )
        if tuple(noise_condition.shape) != shape[:1]:
            raise InputError(
                f"noise_condition must be of shape {shape[:1]} (the batch is the trajectory's), "
                f"got {tuple(noise_condition.shape)}"
            )
