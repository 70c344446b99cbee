"""The temporal U-Net of engine "torch": the same function with folded weights, in a layout whose
convolutions are plain matrix products and whose GroupNorms are four passes over memory.

Activations are matrices [channels, time x batch], time before batch. A convolution's tap is then a
product with a block of neighbouring columns, padding and concatenation cost nothing, and moments
over channels are sums of whole rows.

GroupNorm with statistics per row, s z + b with z = (x - mean) / sqrt(var + eps), and the ReLU after
it are spread over their neighbours:

- The mean over a group of the output of a convolution is a linear function of its input, and so
  is what remains without it: the group's mean is taken off the weights and the bias.
- s changes a sign of the weights before, and |s| multiplies those of the next convolution.
- ReLU(s z + b) = |s| (max(z', -beta) + beta) with beta = b / |s|. Only max(z', -beta) is stored;
  beta becomes part of the next bias, and the padding's zeros are stored as -beta. Max-pooling,
  resizing and concatenation keep this form.
- A row of ones below the activations takes the bias into the product.

What remains of a GroupNorm: square, sum per group, multiply by the inverse root, maximum. Where
its moments are over all rows of a window, the mean is no function of one row's inputs: it is summed
and subtracted, two more passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.denoisers.temporal_unet import NUM_GROUPS, TemporalGroupNorm, TemporalUNet
from polygrad_fast.sampling.graphs import GraphCache
from polygrad_fast.sampling.torch_step import row_parts

SMALLEST_SCALE = 1e-12
"""What |s| counts as where it is smaller: below it, s z is lost beside any b anyway."""
CACHED_NUMBERS = 2**17
"""Numbers of one activation of the first level that are computed together: the calls of half as
many take longer, twice as many leave a CPU's second cache of 2 MiB (measured)."""
MAX_WORKSPACES = 4
"""Sizes of batches whose buffers are kept."""


@dataclass(frozen=True)
class Stored:
    """How stored numbers v of C channels stand for activations: a = scale (v + shift)."""

    scale: Tensor  # [C]
    shift: Tensor  # [C]

    @classmethod
    def plain(cls, channels: int, like: Tensor) -> Stored:
        """Return a = v."""
        return cls(like.new_ones(channels), like.new_zeros(channels))

    @classmethod
    def joined(cls, *parts: Stored) -> Stored:
        """Return that of concatenated channels."""
        return cls(torch.cat([p.scale for p in parts]), torch.cat([p.shift for p in parts]))


class PackedConvolution:
    """A convolution over time and, where one follows, its GroupNorm and ReLU.

    Args:
        convolution: 1, 2 or 3 wide.
        norm: what follows it.
        condition: what is added to all rows before `norm`, as a function of the noise level.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        convolution: nn.Conv1d,
        norm: TemporalGroupNorm | None,
        condition: nn.Linear | None,
        dtype: torch.dtype,
    ):
        self.convolution, self.norm, self.condition = convolution, norm, condition
        self.width = convolution.kernel_size[0]
        self.main = 1 if self.width == 3 else 0  # the tap whose product takes the bias
        channels, device = convolution.out_channels, convolution.weight.device
        columns = convolution.in_channels
        # Their addresses stay: a captured graph reads them.
        self.joint = torch.empty(channels, self.width * columns + 1, dtype=dtype, device=device)
        self.single = dtype != torch.float32  # one product: half precision must not add up rounded
        self.taps = [
            torch.empty(channels, columns + (k == self.main), dtype=dtype, device=device)
            for k in range(0 if self.single else self.width)
        ]
        self.threshold = torch.empty(channels, 1, device=device)
        self.sign = torch.empty(channels, device=device)
        self.biases: Tensor | None = None

    def refresh(self, inputs: Stored, embeddings: Tensor) -> Stored:
        """Fold the current weights for inputs stored in that way; return how outputs are.

        Args:
            embeddings: SiLU of the embedded noise levels, [n, F].
        """
        conv, norm = self.convolution, self.norm
        weight = conv.weight.detach().float()  # [O, C, k]
        bias = conv.bias + torch.einsum("ock,c->o", weight, inputs.scale * inputs.shift)
        weight = weight * inputs.scale[:, None]
        rows = bias[None]  # [n or 1, O]
        if self.condition is not None:
            rows = rows + self.condition(embeddings)
        stored = Stored.plain(conv.out_channels, weight)
        if norm is not None:
            if norm.over == "row":
                weight, rows = _without_group_mean(weight, 0), _without_group_mean(rows, 1)
            self.sign.copy_(torch.where(norm.weight < 0, -1.0, 1.0))
            weight, rows = weight * self.sign[:, None, None], rows * self.sign
            # a sum of squares instead of their mean: the root of a group's size is left over
            size = conv.out_channels // NUM_GROUPS
            scale = norm.weight.abs().clamp(min=SMALLEST_SCALE) * math.sqrt(size)
            shift = (norm.bias / scale).to(self.joint.dtype).float()
            self.threshold.copy_(-shift[:, None])
            stored = Stored(scale, shift)
        if self.biases is None or self.biases.shape != rows.shape:
            self.biases = torch.empty_like(rows, dtype=self.joint.dtype)
        self.biases.copy_(rows)
        if self.single:
            self.joint[:, :-1].copy_(weight.transpose(1, 2).flatten(1))
        else:
            for tap, values in zip(self.taps, weight.unbind(2), strict=True):
                tap[:, : values.shape[1]].copy_(values)
        if len(rows) == 1:
            self._bias_column().copy_(self.biases[0])
        return stored

    def _bias_column(self) -> Tensor:
        return (self.joint if self.single else self.taps[self.main])[:, -1]

    def multiply(self, x: Rows, scratch: Scratch, index: int | Tensor = 0) -> Tensor:
        """Return the convolution's output [O, L batch], float32, in `scratch`.

        Args:
            x: stored inputs, padded by as many rows as the convolution is wide, less one.
            scratch: buffers.
            index: of the noise level; a tensor [1] where a graph is captured.
        """
        if len(self.biases) > 1:
            row = self.biases[index] if isinstance(index, int) else self.biases[index][0]
            self._bias_column().copy_(row)
        columns = x.inner.shape[1]
        out = scratch.out(len(self.threshold), columns)
        if not self.single:
            torch.mm(self.taps[self.main], x.blocks_and_ones[self.main], out=out)
            for k, tap in enumerate(self.taps):
                if k != self.main:
                    torch.addmm(out, tap, x.blocks[k], out=out)
            return out
        joint = x.blocks_and_ones[0]
        if self.width > 1:
            joint = scratch.joint(self.joint.shape[1], columns)
            for target, block in zip(joint[:-1].chunk(self.width), x.blocks, strict=True):
                target.copy_(block)
            joint[-1].fill_(1.0)
        half = scratch.half(len(out), columns)
        torch.mm(self.joint, joint, out=half)
        return out.copy_(half)

    def __call__(self, x: Rows, target: Tensor, scratch: Scratch, index: int | Tensor = 0) -> None:
        """Write what is stored of ReLU(GroupNorm(convolution)) to `target`, [O, L batch]."""
        out = self.multiply(x, scratch, index)
        if self.norm.over == "row":
            self._normalize_rows(out, scratch)
        else:
            self._normalize_windows(out, x.length, scratch)
        if target.dtype == out.dtype:
            torch.maximum(out, self.threshold, out=target)
        else:
            target.copy_(torch.maximum(out, self.threshold, out=out))

    def _normalize_rows(self, out: Tensor, scratch: Scratch) -> None:
        """Divide each group of each row, whose mean is 0 already, by its root of squares."""
        groups = out.view(NUM_GROUPS, -1, out.shape[1])
        squares = torch.mul(groups, groups, out=scratch.squares(*groups.shape))
        moments = scratch.moments(out.shape[1])
        torch.sum(squares, 1, keepdim=True, out=moments)
        moments.add_(self.norm.eps * groups.shape[1]).rsqrt_()
        groups.mul_(moments)

    def _normalize_windows(self, out: Tensor, length: int, scratch: Scratch) -> None:
        """Take each group's mean over all rows of a trajectory off and divide by the root of
        squares, times that of the number of rows."""
        groups, sign = out.view(NUM_GROUPS, -1, out.shape[1]), self.sign.view(NUM_GROUPS, -1, 1)
        windows = groups.unflatten(2, (length, -1))  # [8, c, L, b]
        _, size, _, batch = windows.shape
        of_rows, of_windows = scratch.moments(out.shape[1]), scratch.window_moments(batch)
        torch.bmm(sign.mT, groups, out=of_rows)  # the mean is that before signs were folded in
        torch.sum(of_rows.unflatten(2, (length, -1)), 2, keepdim=True, out=of_windows)
        means = of_windows.div_(size * length)
        windows.addcmul_(sign.unsqueeze(3), means, value=-1.0)
        squares = torch.mul(windows, windows, out=scratch.squares(*windows.shape))
        torch.sum(squares, (1, 2), keepdim=True, out=of_windows)
        of_windows.div_(length).add_(self.norm.eps * size).rsqrt_()
        windows.mul_(of_windows)


def _without_group_mean(values: Tensor, axis: int) -> Tensor:
    """Return values without their mean over each group's channels, which are on that axis."""
    grouped = values.unflatten(axis, (NUM_GROUPS, -1))
    return (grouped - grouped.mean(axis + 1, keepdim=True)).flatten(axis, axis + 1)


class Scratch:
    """Buffers that every layer uses in turn."""

    def __init__(self, numbers: int, joint_numbers: int, columns: int, like: Tensor):
        device, dtype = like.device, like.dtype
        self._out = torch.empty(numbers, device=device)
        self._squares = torch.empty(numbers, device=device)
        self._moments = torch.empty(NUM_GROUPS * columns, device=device)
        self._window_moments = torch.empty_like(self._moments)
        half = dtype != torch.float32
        self._half = torch.empty(numbers if half else 0, dtype=dtype, device=device)
        self._joint = torch.empty(joint_numbers if half else 0, dtype=dtype, device=device)

    def out(self, rows: int, columns: int) -> Tensor:
        """A product's result, float32."""
        return self._out[: rows * columns].view(rows, columns)

    def squares(self, *shape: int) -> Tensor:
        """Its squares, float32, in a shape of as many numbers."""
        return self._squares[: math.prod(shape)].view(shape)

    def moments(self, columns: int) -> Tensor:
        """One number per group and column, float32 [8, 1, columns]."""
        return self._moments[: NUM_GROUPS * columns].view(NUM_GROUPS, 1, columns)

    def window_moments(self, batch: int) -> Tensor:
        """One number per group and trajectory, float32 [8, 1, 1, batch]."""
        return self._window_moments[: NUM_GROUPS * batch].view(NUM_GROUPS, 1, 1, batch)

    def half(self, rows: int, columns: int) -> Tensor:
        """A product's result in half precision."""
        return self._half[: rows * columns].view(rows, columns)

    def joint(self, rows: int, columns: int) -> Tensor:
        """The inputs of all taps, one below the other."""
        return self._joint[: rows * columns].view(rows, columns)


class Rows:
    """A buffer of stored activations [C + 1, (before + L + after) batch], the last row ones.

    Args:
        channels, length, batch: C, L and b.
        before, after: rows of padding.
        like: of the wanted dtype and device.
    """

    def __init__(
        self, channels: int, length: int, batch: int, before: int, after: int, like: Tensor
    ):
        self.length, self.batch, self.before, self.after = length, batch, before, after
        self.all = like.new_ones(channels + 1, (before + length + after) * batch)
        self.inner = self.all[:-1, before * batch : (before + length) * batch]  # [C, L b]
        starts = range(0, (before + after + 1) * batch, batch)
        # what each tap of a convolution reads, and the same with the row of ones
        self.blocks_and_ones = [self.all[:, start : start + length * batch] for start in starts]
        self.blocks = [block[:-1] for block in self.blocks_and_ones]

    def pad(self, stored: Stored) -> None:
        """Write the padding's zeros as they are stored."""
        zeros = -stored.shift[:, None]
        self.all[:-1, : self.before * self.batch] = zeros
        self.all[:-1, (self.before + self.length) * self.batch :] = zeros

    def by_time(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return channels [first, last) without padding, [c, L, b]."""
        return self.inner[first:last].unflatten(1, (self.length, self.batch))


class Workspace:
    """The activations of one batch of trajectories of L rows."""

    def __init__(self, unet: TemporalUNet, batch: int, length: int, like: Tensor):
        widths = [unet.features * 2**level for level in range(unet.num_levels)]
        lengths = [length // 2**level for level in range(unet.num_levels)]

        def rows(channels: int, level: int, before: int, after: int) -> Rows:
            return Rows(channels, lengths[level], batch, before, after, like)

        last = unet.num_levels - 1
        inputs = [unet.trajectory_dim, *widths[:-1]]
        self.inputs = [rows(inputs[i], i, 1, 1) for i in range(last + 1)]
        self.encoded = [rows(widths[i], i, 1, 1) for i in range(last + 1)]
        self.joined = [rows(2 * widths[i], i, 1, 1) for i in range(last)]
        self.resized = [rows(2 * widths[i], i, 0, 1) for i in range(last)]
        self.decoded = [rows(widths[i], i, 1, 1) for i in range(last)]
        self.outputs = [rows(widths[i], i, 0, 0) for i in range(last + 1)]
        sizes = [w * n * batch for w, n in zip(widths, lengths, strict=True)]
        joint = max(6 * size + n * batch for size, n in zip(sizes, lengths, strict=True))
        self.scratch = Scratch(
            max(*sizes, unet.trajectory_dim * length * batch),
            max(joint, (3 * unet.trajectory_dim + 1) * length * batch),
            length * batch,
            like,
        )
        self.sources = [_nearest(lengths[i + 1], lengths[i], like.device) for i in range(last)]


def _nearest(source: int, target: int, device: torch.device) -> Tensor | None:
    """Return the source row of each target row, floor((j + 0.5) source / target), or None where
    every source row serves two."""
    if target == 2 * source:
        return None
    rows = ((2 * j + 1) * source // (2 * target) for j in range(target))
    return torch.tensor(list(rows), device=device)


class PackedTemporalUNet:
    """A `TemporalUNet` at the n noise levels of a sampler.

    It agrees with the network to float32's rounding. `refresh` reads its current weights.

    Args:
        unet: as its constructor makes it.
        c_noise: the noise conditions, float32 [n].
        dtype: of weights and activations; moments and what is added up are float32.
    """

    def __init__(self, unet: TemporalUNet, c_noise: Tensor, dtype: torch.dtype):
        self.unet, self.c_noise = unet, c_noise
        self._like = torch.empty(0, dtype=dtype, device=c_noise.device)
        self._graphs = GraphCache() if c_noise.is_cuda else None
        self._positions = torch.arange(len(c_noise), device=c_noise.device)
        self._workspaces: dict[tuple[int, int], Workspace] = {}

        def packed(level: nn.Module, number: int) -> PackedConvolution:
            condition = level.condition if number == 1 else None
            parts = getattr(level, f"conv_{number}"), getattr(level, f"norm_{number}")
            return PackedConvolution(*parts, condition, dtype)

        self._encoder = [[packed(level, number) for number in (1, 2)] for level in unet.encoder]
        # by level from the top, as everything here
        decoder = reversed(unet.decoder)
        self._decoder = [[packed(level, number) for number in (1, 2, 3)] for level in decoder]
        self._output = PackedConvolution(unet.output, None, None, dtype)
        self._stored: dict[str, list[Stored]] = {}

    def refresh(self) -> None:
        """Fold the network's current weights."""
        embeddings = F.silu(self.unet.noise_embedding(self.c_noise))
        inputs = Stored.plain(self.unet.trajectory_dim, embeddings[0])
        stored = {name: [] for name in ("inputs", "encoded", "joined", "resized", "decoded")}
        skips = []
        for first, second in self._encoder:
            stored["inputs"].append(inputs)
            stored["encoded"].append(first.refresh(inputs, embeddings))
            inputs = second.refresh(stored["encoded"][-1], embeddings)
            skips.append(inputs)
        below = skips.pop()
        for (first, second, third), skip in zip(
            reversed(self._decoder), reversed(skips), strict=True
        ):
            stored["resized"].insert(0, below)
            stored["joined"].insert(0, Stored.joined(first.refresh(below, embeddings), skip))
            stored["decoded"].insert(0, second.refresh(stored["joined"][0], embeddings))
            below = third.refresh(stored["decoded"][0], embeddings)
        self._output.refresh(below, embeddings)
        self._stored = stored
        for workspace in self._workspaces.values():
            self._pad(workspace)

    def _pad(self, workspace: Workspace) -> None:
        for name, stored in self._stored.items():
            for rows, how in zip(getattr(workspace, name), stored, strict=True):
                rows.pad(how)

    def __call__(self, trajectories: Tensor, index: int) -> Tensor:
        """Return F_theta(x, c_noise[index]), float32: [B, L, D] -> [B, L, D]."""
        batch, length, _ = trajectories.shape
        if self._graphs is not None:
            workspace = self._workspace(batch, length)
            return self._graphs(
                (batch, length),
                lambda x, at: (self._evaluate(x, at, workspace),),
                (trajectories, self._positions[index : index + 1]),
            )[0]
        result = torch.empty_like(trajectories)
        rows = max(1, CACHED_NUMBERS // (self.unet.features * length))
        for part in row_parts(batch, rows, trajectories.device):
            workspace = self._workspace(part.stop - part.start, length)
            result[part] = self._evaluate(trajectories[part], index, workspace)
        return result

    def _workspace(self, batch: int, length: int) -> Workspace:
        workspace = self._workspaces.pop((batch, length), None)
        if workspace is None:
            while len(self._workspaces) >= MAX_WORKSPACES:
                self._workspaces.pop(next(iter(self._workspaces)))
                if self._graphs is not None:
                    self._graphs.clear()  # they read the buffers that go
            workspace = Workspace(self.unet, batch, length, self._like)
            self._pad(workspace)
        self._workspaces[batch, length] = workspace
        return workspace

    def _evaluate(self, x: Tensor, index: int | Tensor, w: Workspace) -> Tensor:
        """Return F_theta as a view [b, L, D] of a buffer."""
        scratch, last = w.scratch, len(self._encoder) - 1
        w.inputs[0].by_time().copy_(x.permute(2, 1, 0))
        for i, (first, second) in enumerate(self._encoder):
            first(w.inputs[i], w.encoded[i].inner, scratch, index)
            if i == last:
                second(w.encoded[i], w.outputs[i].inner, scratch)
                continue
            width = self.unet.features * 2**i
            second(w.encoded[i], w.joined[i].inner[width:], scratch)
            rows, pooled = w.joined[i].by_time(width), w.inputs[i + 1]
            even = 2 * pooled.length
            torch.maximum(rows[:, 0:even:2], rows[:, 1:even:2], out=pooled.by_time())
        for i in reversed(range(last)):
            self._resize(w.outputs[i + 1].by_time(), w.resized[i].by_time(), w.sources[i])
            first, second, third = self._decoder[i]
            first(w.resized[i], w.joined[i].inner[: self.unet.features * 2**i], scratch, index)
            second(w.joined[i], w.decoded[i].inner, scratch)
            third(w.decoded[i], w.outputs[i].inner, scratch)
        out = self._output.multiply(w.outputs[0], scratch)
        return out.view(-1, w.outputs[0].length, w.outputs[0].batch).permute(2, 1, 0)

    @staticmethod
    def _resize(source: Tensor, target: Tensor, rows: Tensor | None) -> None:
        """Copy the nearest source rows: [C, l, b] to [C, L, b]."""
        if rows is None:
            target.unflatten(1, (-1, 2)).copy_(source.unsqueeze(2))
        else:
            target.copy_(source[:, rows])
