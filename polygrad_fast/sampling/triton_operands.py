"""Denoiser and policy as the kernels read them: folded, cast, at fixed addresses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers import ResidualMLPDenoiser
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.sampling.folding import fold_policy_input, fold_residual_mlp

ROW_ALIGNMENT = 64  # elements; whole tiles of the K loop, and rows aligned for 16-byte loads


def load_kernels() -> ModuleType:
    """Import the kernels, and with them triton; return the package with its modules.

    Raises:
        InputError: triton is not installed.
    """
    try:
        from polygrad_fast import kernels
        from polygrad_fast.kernels import (  # noqa: F401
            dependent_launch,
            guided_step,
            initial_state,
            residual_mlp,
        )
    except ImportError as error:
        raise InputError(
            f"engine 'triton' needs the package triton ({error}); install polygrad-fast[triton] "
            "or use engine 'torch' or 'reference'"
        ) from None
    return kernels


def _round_to_tf32(tensor: Tensor) -> None:
    """Round float32 in place to tf32's ten bits of mantissa, ties away from zero; tensor cores
    would cut the rest off, an error up to twice as large and of one sign."""
    bits = (tensor.view(torch.int32) + 0x1000) & ~0x1FFF
    tensor.copy_(torch.where(tensor.isnan(), tensor, bits.view(torch.float32)))


def _padded_zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    width = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.zeros(rows, width, dtype=dtype, device=device)


@dataclass(frozen=True)
class DenoiserWorkspace:
    """Tensors of one run of the denoiser; layers alternate between the two rows of each pair."""

    input: Tensor  # [B, H (D + A), padded], the GEMMs' dtype
    streams: Tensor  # residual stream, [2, B, W], float32
    operands: Tensor  # the same in the GEMMs' dtype; the streams themselves where that is float32
    moments: Tensor  # [2, tiles, 2, B]
    prediction: Tensor  # [B, H D]


class DenoiserOperands:
    """The residual MLP's weights as its kernels read them: folded, cast, at fixed addresses.

    Args:
        denoiser: whose current weights `refresh` reads.
        precision: a key of `kernels.precision.PRECISIONS`.
        timesteps: the K diffusion steps to embed.
        device: where the kernels run.
    """

    def __init__(
        self,
        denoiser: ResidualMLPDenoiser,
        precision: str,
        timesteps: Sequence[int],
        device: torch.device,
    ):
        kernels = load_kernels()
        self.layer = kernels.residual_mlp
        self.denoiser, self.precision, self.device = denoiser, precision, device
        self.dtype = kernels.precision.PRECISIONS[precision].dtype
        width, num_layers = denoiser.hidden_dim, denoiser.num_layers
        self.in_dim = denoiser.horizon * (denoiser.state_dim + denoiser.action_dim)
        self.out_dim = denoiser.horizon * denoiser.state_dim
        self.by_layer = denoiser.step_conditioning == "layer"
        num_steps = len(timesteps)
        self.timesteps = torch.tensor(timesteps, device=device)
        self.input_weight = _padded_zeros(width, self.in_dim, self.dtype, device)
        self.input_bias = torch.empty(num_steps, width, device=device)
        self.weights = [
            torch.empty(dim, width, dtype=self.dtype, device=device)
            for dim in (*[width] * num_layers, self.out_dim)
        ]
        bias_shape = (num_steps, width) if self.by_layer else (1, width)
        self.biases = [torch.empty(bias_shape, device=device) for _ in range(num_layers)]
        self.biases.append(torch.empty(1, self.out_dim, device=device))
        # gamma and beta of every LayerNorm, the final one included
        self.norms = torch.empty(num_layers + 1, 2, width, device=device)

    def refresh(self) -> None:
        """Read the denoiser's current weights into the operands; no host synchronization."""
        folded = fold_residual_mlp(self.denoiser, self.timesteps, torch.float64)
        layers = folded.layers
        self.input_weight[:, : self.in_dim].copy_(folded.input_weight)
        self.input_bias.copy_(folded.input_rows)
        weights = [*(layer.weight for layer in layers), folded.output.weight]
        torch._foreach_copy_(self.weights, weights)
        if self.precision == "tf32":
            for tensor in (self.input_weight, *self.weights):
                _round_to_tf32(tensor)
        # one launch for all small ones
        targets = [*self.biases]
        sources = [*(layer.rows for layer in layers), folded.output.bias[None]]
        if folded.norm is not None:
            targets += [half for gamma_beta in self.norms for half in gamma_beta]
            norms = [*(layer.norm for layer in layers), folded.norm]
            sources += [half for norm in norms for half in (norm.weight, norm.bias)]
        torch._foreach_copy_(targets, sources)

    def workspace(self, batch: int) -> DenoiserWorkspace:
        """Allocate what one sample needs; the input's padding is zero and stays so."""
        width = self.denoiser.hidden_dim
        moments = self.layer.moments_shape(self.precision, batch, width)
        streams = torch.empty(2, batch, width, device=self.device)
        operands = streams
        if self.dtype != torch.float32:
            operands = torch.empty_like(streams, dtype=self.dtype)
        return DenoiserWorkspace(
            input=_padded_zeros(batch, self.in_dim, self.dtype, self.device),
            streams=streams,
            operands=operands,
            moments=torch.empty(2, *moments, device=self.device),
            prediction=torch.empty(batch, self.out_dim, device=self.device),
        )

    def predict(self, workspace: DenoiserWorkspace, k: int, dependent: bool = False) -> Tensor:
        """Run the denoiser on the workspace's input in step k; return its prediction [B, H D].

        With `dependent` its kernels are launched before those before them have ended."""
        ws, normalized = workspace, not self.by_layer
        # those of full width share their tiles, whether they write moments or not
        blocks = self.layer.layer_blocks(
            self.precision, len(ws.input), self.denoiser.hidden_dim, writes_moments=True
        )

        def written(target: int) -> dict:
            return dict(
                operand_out=ws.operands[target] if ws.operands is not ws.streams else None,
                moments_out=ws.moments[target] if normalized else None,
                blocks=blocks,
            )

        layer = functools.partial(
            self.layer.residual_mlp_layer, precision=self.precision, dependent=dependent
        )
        layer(ws.input, self.input_weight, self.input_bias[k], ws.streams[0], **written(0))
        modules = [*self.denoiser.blocks, self.denoiser]
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            source, target = index % 2, 1 - index % 2
            read = dict(relu=True)
            if normalized:
                read["norm"] = (ws.moments[source], *self.norms[index], modules[index].norm.eps)
            bias = bias[k if len(bias) > 1 else 0]
            if index == len(self.weights) - 1:
                return layer(ws.operands[source], weight, bias, ws.prediction, **read)
            layer(
                ws.operands[source],
                weight,
                bias,
                ws.streams[target],
                residual=ws.streams[source],
                **read,
                **written(target),
            )

    def sources(self) -> list[Tensor]:
        """Return every tensor that `refresh` reads."""
        return [*self.denoiser.parameters(), *self.denoiser.buffers()]


class PolicyWeights:
    """The policy's weights as the guided step reads them: on normalized observations, cast.

    Precision: its hidden layer multiplies in float16 in both half-precision engines (its operands
    follow a LayerNorm, so float16's range holds them, with 8 times bfloat16's precision); its first
    layer in tf32 there, whose range holds any estimate of the states; its last in float32 always.

    Args:
        policy: whose current weights `refresh` reads. normalizer: likewise its moments.
        precision: the engine's.
        device: where the kernel runs.
    """

    def __init__(
        self, policy: GaussianPolicy, normalizer: Normalizer, precision: str, device: torch.device
    ):
        self.policy, self.normalizer = policy, normalizer
        self.linears = [m for m in policy.network if isinstance(m, nn.Linear)]
        self.norms = [m for m in policy.network if isinstance(m, nn.LayerNorm)]
        if precision == "bfloat16":
            precision = "float16"
        dtype = torch.float16 if precision == "float16" else torch.float32
        hidden, observation_dim = self.linears[0].weight.shape
        action_dim, num_layers = policy.action_dim, len(self.norms)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device)

        first_weight = _padded_zeros(hidden, observation_dim, torch.float32, device)
        hidden_weight = first_weight
        if num_layers > 1:
            hidden_weight = _padded_zeros(hidden, hidden, dtype, device)
        self.operands = load_kernels().policy_mean.PolicyOperands(
            first_weight=first_weight,
            hidden_weight=hidden_weight,
            vectors=empty(num_layers, 3, hidden),
            last_weight=empty(action_dim, hidden),
            last_bias=empty(action_dim),
            std=empty(action_dim),
            num_layers=num_layers,
            eps=self.norms[0].eps,
            precision=precision,
        )

    def refresh(self) -> None:
        """Read the policy's current weights and the normalizer's current moments."""
        to = self.operands
        weight, bias = fold_policy_input(self.policy, self.normalizer)
        to.first_weight[:, : weight.shape[1]].copy_(weight)
        to.vectors[0, 0].copy_(bias)
        last = self.linears[-1]
        targets = [to.last_weight, to.last_bias, to.std]
        sources = [last.weight, last.bias, self.policy.std]
        for linear in self.linears[1:-1]:
            to.hidden_weight[:, : linear.in_features].copy_(linear.weight)
            targets.append(to.vectors[1, 0])
            sources.append(linear.bias)
        for vectors, norm in zip(to.vectors, self.norms, strict=True):
            targets += [vectors[1], vectors[2]]
            sources += [norm.weight, norm.bias]
        torch._foreach_copy_(targets, sources)
        if to.precision != "float32":  # the first layer multiplies in tf32 in float16 too
            _round_to_tf32(to.first_weight)
        if to.precision == "tf32":
            _round_to_tf32(to.hidden_weight)

    def sources(self) -> list[Tensor]:
        """Return every tensor that `refresh` and the kernel read."""
        return [*self.policy.parameters(), *self.normalizer.buffers()]
