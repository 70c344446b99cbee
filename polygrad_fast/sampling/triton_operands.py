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
            refresh,
            residual_mlp,
        )
    except ImportError as error:
        raise InputError(
            f"engine 'triton' needs the package triton ({error}); install polygrad-fast[triton] "
            "or use engine 'torch' or 'reference'"
        ) from None
    return kernels


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Return where a tensor lies in memory, and how."""
    return tensor.data_ptr(), tensor.stride(), tensor.dtype


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


Tasks = tuple[list, list]
"""Of `kernels.refresh`: those that read weights, and those that read what these have computed."""


class Refresh:
    """Brings operands up to date with the modules' weights, in at most two launches.

    Args:
        device: where they are.
        owners: of the operands, `DenoiserOperands` or `PolicyWeights`.
    """

    def __init__(self, device: torch.device, *owners: DenoiserOperands | PolicyWeights):
        self.device, self.owners = device, owners
        self.kernel = load_kernels().refresh
        self._sources: list[Tensor] = []  # kept, so that no other tensor gets their addresses
        self._tables: list[Tensor] = []

    def follow(self) -> bool:
        """Find the tensors that are to be read; return whether any was replaced since the last time
        (what is captured reads the old ones), not changed in place. Then the host waits for the
        device.

        Raises:
            InputError: weights that are not in float32, or whose rows are not contiguous.
        """
        sources = [tensor.detach() for owner in self.owners for tensor in owner.sources()]
        if [*map(_place, sources)] == [*map(_place, self._sources)]:
            return False
        for tensor in sources:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise InputError(
                    "engine 'triton' wants weights in torch.float32, contiguous, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}; engines 'torch' and 'reference' take any"
                )
        stages = zip(*(owner.tasks() for owner in self.owners), strict=True)
        stages = [tasks for tasks in (sum(stage, []) for stage in stages) if tasks]
        self._tables = [self.kernel.refresh_table(tasks, self.device) for tasks in stages]
        self._sources = sources
        return True

    def __call__(self) -> None:
        """Compute the operands; launches only, so that it can be captured."""
        for table in self._tables:
            self.kernel.refresh(table)


class DenoiserOperands:
    """The residual MLP's weights as its kernels read them: folded, cast, at fixed addresses.

    Args:
        denoiser: whose weights they are.
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
        self.layer, self.task = kernels.residual_mlp, kernels.refresh.Task
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
        if not self.by_layer:
            self.embedding = torch.empty(num_steps, denoiser.proj.out_features, device=device)
        self.weights = [
            torch.empty(dim, width, dtype=self.dtype, device=device)
            for dim in (*[width] * num_layers, self.out_dim)
        ]
        bias_shape = (num_steps, width) if self.by_layer else (1, width)
        self.biases = [torch.empty(bias_shape, device=device) for _ in range(num_layers)]
        self.biases.append(torch.empty(1, self.out_dim, device=device))
        # gamma and beta of every LayerNorm, the final one included
        self.norms = torch.empty(num_layers + 1, 2, width, device=device)

    def tasks(self) -> Tasks:
        """Return what computes the operands from the denoiser's weights.

        With step_conditioning "input" the network begins with input(proj(x) + embedding_k), which
        is one Linear with W = W_input W_proj and b_k = W_input (b_proj + embedding_k) + b_input.
        With "layer" every layer's bias takes its embedding of the step.
        """
        d, task = self.denoiser, self.task
        weight = functools.partial(task, round_tf32=self.precision == "tf32")
        input_weight = self.input_weight[:, : self.in_dim]
        first = [
            weight("copy", out, linear.weight)
            for out, linear in zip(self.weights, self._linears(), strict=True)
        ]
        first.append(task("copy", self.biases[-1], d.output.bias[None]))
        if self.by_layer:
            first.append(weight("copy", input_weight, d.input.weight))
            first.append(task("copy", self.input_bias, d.input.bias.expand_as(self.input_bias)))
            for out, block in zip(self.biases[:-1], d.blocks, strict=True):
                rows, bias = block.step_embedding.weight, block.linear.bias
                first.append(task("copy", out, rows, steps=self.timesteps, bias=bias))
            return first, []
        for out, block in zip(self.biases[:-1], d.blocks, strict=True):
            first.append(task("copy", out, block.linear.bias[None]))
        for (gamma, beta), module in zip(self.norms, [*d.blocks, d], strict=True):
            first.append(task("copy", gamma[None], module.norm.weight[None]))
            first.append(task("copy", beta[None], module.norm.bias[None]))
        features, hidden, _, last = d.step_mlp
        first.append(weight("product", input_weight, d.input.weight, d.proj.weight))
        first.append(
            task(
                "embedding",
                self.embedding,
                right=last.weight.t(),
                bias=last.bias,
                second_bias=d.proj.bias,
                steps=self.timesteps,
                frequencies=features.weights,
                first=hidden.weight,
                first_bias=hidden.bias,
            )
        )
        factors = self.embedding, d.input.weight.t()
        return first, [task("product", self.input_bias, *factors, bias=d.input.bias)]

    def _linears(self) -> list[nn.Linear]:
        return [*(block.linear for block in self.denoiser.blocks), self.denoiser.output]

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
        """Return every tensor that the tasks read."""
        return [*self.denoiser.parameters(), *self.denoiser.buffers()]


class PolicyWeights:
    """The policy's weights as the guided step reads them: on normalized observations, cast.

    Precision: its hidden layer multiplies in float16 in both half-precision engines (its operands
    follow a LayerNorm, so float16's range holds them, with 8 times bfloat16's precision); its first
    layer in tf32 there, whose range holds any estimate of the states; its last in float32 always.

    Args:
        policy: whose weights they are. normalizer: whose moments are folded into them.
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
        kernels = load_kernels()
        self.task = kernels.refresh.Task
        self.operands = kernels.policy_mean.PolicyOperands(
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

    def tasks(self) -> Tasks:
        """Return what computes the operands from the policy's weights and the moments.

        A policy on raw observations s = s_norm scale + mean gets W diag(scale) and b + W mean in
        its first layer, one on normalized ones its own.
        """
        policy, normalizer, to = self.policy, self.normalizer, self.operands
        task = self.task
        # the first layer multiplies in tf32 in float16 too
        first = functools.partial(task, round_tf32=to.precision != "float32")
        hidden = functools.partial(task, round_tf32=to.precision == "tf32")
        linear, *middle, last = self.linears
        weight = to.first_weight[:, : linear.in_features]
        bias = to.vectors[0, :1]
        if policy.normed_inputs:
            tasks = [first("copy", weight, linear.weight), task("copy", bias, linear.bias[None])]
        else:
            scale, mean = normalizer.observations_scale, normalizer.observations_mean[:, None]
            tasks = [
                first("copy", weight, linear.weight, scale=scale),
                task("offset", bias, linear.weight, mean, bias=linear.bias),
            ]
        for linear in middle:
            out = to.hidden_weight[:, : linear.in_features]
            tasks.append(hidden("copy", out, linear.weight))
            tasks.append(task("copy", to.vectors[1, :1], linear.bias[None]))
        for vectors, norm in zip(to.vectors, self.norms, strict=True):
            tasks.append(task("copy", vectors[1:2], norm.weight[None]))
            tasks.append(task("copy", vectors[2:3], norm.bias[None]))
        tasks.append(task("copy", to.last_weight, last.weight))
        tasks.append(task("copy", to.last_bias[None], last.bias[None]))
        tasks.append(task("exp", to.std[None], policy.log_std[None], number=policy.min_std))
        return tasks, []

    def sources(self) -> list[Tensor]:
        """Return every tensor that the tasks and the kernel read."""
        return [*self.policy.parameters(), *self.normalizer.buffers()]
