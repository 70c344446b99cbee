"""Denoisers and policy as the torch engine evaluates them: folded, in the dtype of the engine,
without autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polygrad_fast.denoisers import (
    ResidualMLPDenoiser,
    RolloutDenoiser,
    TransformerDenoiser,
)
from polygrad_fast.denoisers.shown_range import within
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.protocols import Denoiser, call_denoiser
from polygrad_fast.sampling.folding import fold_policy_input, fold_residual_mlp, why_foreign
from polygrad_fast.sampling.linear import LinearOps, Weight

LOG2_E = math.log2(math.e)
ROWS_PER_THREAD = 256
"""Rows of activations that a denoiser evaluates at a time on a CPU: at width 1024 and 10 steps,
1024 rows at once take 10-20 % longer than four times 256."""
ROWS_OF_A_WAVE = 2048
"""Rows that occupy a large GPU at width 1024: parts of fewer would leave multiprocessors idle."""
HEAD_ALIGNMENT = 8
"""Numbers of a head's row that fused attention on a GPU reads at a time."""


NormArguments = tuple[tuple[int, ...], Tensor, Tensor, float]


class HeldTensors:
    """The tensors a sampling loop reads, up to date after every refresh.

    On a CPU a tensor that already has the wanted dtype is taken as it is, without a copy. A
    captured graph needs fixed addresses: with `fixed_addresses=True` every tensor is copied into
    one that lives as long as this object.
    """

    def __init__(self, device: torch.device, fixed_addresses: bool):
        self.device, self.fixed_addresses = device, fixed_addresses
        self._copies: dict[tuple[str, torch.Size], Tensor] = {}

    def put(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `source` in `dtype` on the device; a copy has the same address each time for one
        name and shape."""
        source = source.detach()
        as_it_is = source.dtype == dtype and source.device == self.device
        if as_it_is and source.is_contiguous() and not self.fixed_addresses:
            return source
        key = (name, source.shape)
        if key not in self._copies:
            self._copies[key] = torch.empty(source.shape, dtype=dtype, device=self.device)
        return self._copies[key].copy_(source)

    def put_norm(self, name: str, norm: nn.LayerNorm, dtype: torch.dtype) -> NormArguments:
        """Return `torch.layer_norm`'s arguments after the input."""
        weight = self.put(f"{name}.weight", norm.weight, dtype)
        return norm.normalized_shape, weight, self.put(f"{name}.bias", norm.bias, dtype), norm.eps


class FoldedDenoiser:
    """What the folded denoisers share."""

    rows_on_gpu: int | None = None
    """Rows that are evaluated at a time on a GPU; None: all."""

    def __init__(
        self,
        denoiser: ResidualMLPDenoiser | RolloutDenoiser | TransformerDenoiser,
        timesteps: Sequence[int],
        dtype: torch.dtype,
        held: HeldTensors,
        ops: LinearOps,
    ):
        self.denoiser, self.dtype, self.held, self.ops = denoiser, dtype, held, ops
        self.timesteps = torch.tensor(timesteps, device=held.device)
        on_cpu = held.device.type == "cpu"
        # On a CPU LayerNorm takes float32 parameters with half-precision input too.
        self.norm_dtype = torch.float32 if on_cpu else dtype

    def _put_weight(self, name: str, weight: Tensor) -> Weight:
        weight = self.held.put(f"{name}.weight", weight, self.dtype)
        return self.ops.pack(weight, num_uses=len(self.timesteps))

    def _put_norm(self, name: str, norm: nn.LayerNorm | None) -> NormArguments | None:
        return norm and self.held.put_norm(name, norm, self.norm_dtype)


def _flat_inputs(
    d: ResidualMLPDenoiser | RolloutDenoiser, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a new buffer [B, H (D + A)] of all states before all actions, and its views of states
    [B, H, D] and actions [B, H, A]."""
    states_size, actions_size = d.horizon * d.state_dim, d.horizon * d.action_dim
    buffer = torch.zeros(batch, states_size + actions_size, dtype=dtype, device=device)
    states, actions = buffer.split([states_size, actions_size], dim=1)
    return (
        buffer,
        states.unflatten(1, (d.horizon, d.state_dim)),
        actions.unflatten(1, (d.horizon, d.action_dim)),
    )


class FoldedResidualMLP(FoldedDenoiser):
    """The residual MLP with its input Linears and step embedding folded into one Linear and one
    bias row per diffusion step.

    The flat input holds all states before all actions (columns permuted in the folded weight), so
    that both parts are contiguous rows. The residual stream has the engine's dtype; LayerNorm
    accumulates in float32.

    On a GPU rows are evaluated by parts whose activations take half of its L2 cache (the residual
    stream, a LayerNorm's result and a product's), so that one kernel finds there what the one
    before has written.
    """

    rows_per_part = ROWS_PER_THREAD

    def __init__(
        self,
        denoiser: ResidualMLPDenoiser,
        timesteps: Sequence[int],
        dtype: torch.dtype,
        held: HeldTensors,
        ops: LinearOps,
    ):
        super().__init__(denoiser, timesteps, dtype, held, ops)
        if held.device.type == "cuda":
            cache = torch.cuda.get_device_properties(held.device).L2_cache_size
            row = 3 * denoiser.hidden_dim * dtype.itemsize
            self.rows_on_gpu = max(ROWS_OF_A_WAVE, cache // 2 // row)

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a new input buffer [B, H (D + A)] and its views of states [B, H, D] and actions
        [B, H, A]."""
        return _flat_inputs(self.denoiser, batch, self.dtype, self.held.device)

    def refresh(self) -> None:
        """Read the module's current weights."""
        d, put, dtype = self.denoiser, self.held.put, self.dtype
        folded = fold_residual_mlp(d, self.timesteps)
        tokens = folded.input_weight.unflatten(1, (d.horizon, -1))
        parts = tokens.split([d.state_dim, d.action_dim], dim=2)
        weight = torch.cat([part.flatten(1) for part in parts], dim=1)
        self.input_weight = self._put_weight("input", weight)
        self.input_rows = put("input.rows", folded.input_rows, dtype).unbind()
        self.blocks = []
        for i, layer in enumerate(folded.layers):
            weight = self._put_weight(f"{i}", layer.weight)
            norm = self._put_norm(f"{i}.norm", layer.norm)
            rows = put(f"{i}.rows", layer.rows, dtype).expand(len(self.timesteps), -1).unbind()
            self.blocks.append((norm, weight, rows))
        self.norm = self._put_norm("norm", folded.norm)
        self.output_weight = self._put_weight("output", folded.output.weight)
        self.output_bias = put("output.bias", folded.output.bias, dtype)

    def __call__(self, buffer: Tensor, k: int) -> Tensor:
        """Predict at step k: an input buffer -> [B, H, D], a new tensor."""
        ops = self.ops
        x = ops.linear(buffer, self.input_weight, self.input_rows[k])
        for norm, weight, rows in self.blocks:
            # x itself lives on as the residual, and with it any NaN.
            h = fast_relu_(torch.layer_norm(x, *norm) if norm else x.clone())
            x = ops.linear_add(h, weight, rows[k], x)
        x = torch.relu_(torch.layer_norm(x, *self.norm) if self.norm else x)
        x = ops.linear(x, self.output_weight, self.output_bias)
        return x.unflatten(1, (self.denoiser.horizon, -1))


class FoldedTransformer(FoldedDenoiser):
    """The transformer with the embeddings of step and position and the input bias folded together.

    On a GPU the heads' weights are padded with zeros to a multiple of `HEAD_ALIGNMENT`, which
    changes no product: fused attention takes no other widths, and would be given padded copies of
    queries, keys and values in every layer.
    """

    def __init__(
        self,
        denoiser: TransformerDenoiser,
        timesteps: Sequence[int],
        dtype: torch.dtype,
        held: HeldTensors,
        ops: LinearOps,
    ):
        super().__init__(denoiser, timesteps, dtype, held, ops)
        self.rows_per_part = max(1, ROWS_PER_THREAD // denoiser.horizon)
        self.head_width = denoiser.hidden_dim // denoiser.num_heads
        aligned = -(-self.head_width // HEAD_ALIGNMENT) * HEAD_ALIGNMENT
        self.head_padding = aligned - self.head_width if held.device.type == "cuda" else 0

    def _pad_heads(self, weight: Tensor) -> Tensor:
        """Pad every head's rows of a weight or bias [heads head_width, ..] with zeros."""
        if self.head_padding == 0:
            return weight
        heads = weight.unflatten(0, (-1, self.head_width))
        return F.pad(heads, (0, 0) * (heads.dim() - 2) + (0, self.head_padding)).flatten(0, 1)

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a new input buffer [B, H, D + A] and its views of states [B, H, D] and actions
        [B, H, A]."""
        d = self.denoiser
        buffer = torch.zeros(
            batch,
            d.horizon,
            d.state_dim + d.action_dim,
            dtype=self.dtype,
            device=self.held.device,
        )
        return buffer, *buffer.split([d.state_dim, d.action_dim], dim=2)

    def refresh(self) -> None:
        """Read the module's current weights."""
        d, put, dtype = self.denoiser, self.held.put, self.dtype
        self.input_weight = self._put_weight("input", d.input.weight)
        positions = d.position_embedding.weight + d.input.bias
        embeddings = positions + d.step_mlp(self.timesteps).unsqueeze(1)
        self.embeddings = put("embeddings", embeddings, dtype).unbind()  # [H, W] for every step
        self.blocks = []
        for i, block in enumerate(d.blocks):
            norms = [
                self._put_norm(f"{i}.{name}", getattr(block, name)) for name in ("norm_1", "norm_2")
            ]
            qkv, joined = block.qkv, block.attention_output
            linears = [
                (self._put_weight(f"{i}.{name}", weight), put(f"{i}.{name}.bias", bias, dtype))
                for name, weight, bias in (
                    ("qkv", self._pad_heads(qkv.weight), self._pad_heads(qkv.bias)),
                    ("attention_output", self._pad_heads(joined.weight.t()).t(), joined.bias),
                    ("mlp_input", block.mlp_input.weight, block.mlp_input.bias),
                    ("mlp_output", block.mlp_output.weight, block.mlp_output.bias),
                )
            ]
            self.blocks.append((*norms, *linears))
        self.output_weight = self._put_weight("output", d.output.weight)
        self.output_bias = put("output.bias", d.output.bias, dtype)

    def __call__(self, buffer: Tensor, k: int) -> Tensor:
        """Predict at step k: an input buffer -> [B, H, D], a new tensor."""
        ops, heads = self.ops, self.denoiser.num_heads
        batch, horizon, _ = buffer.shape
        x = ops.linear(buffer.flatten(0, 1), self.input_weight, None)
        x.view(batch, horizon, -1).add_(self.embeddings[k])
        for norm_1, norm_2, qkv, attention_output, mlp_input, mlp_output in self.blocks:
            joined = ops.linear(torch.layer_norm(x, *norm_1), *qkv)
            q, k_heads, v = joined.view(batch, horizon, 3, heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(
                q, k_heads, v, is_causal=True, scale=1 / math.sqrt(self.head_width)
            )
            attended = attended.transpose(1, 2).reshape(batch * horizon, -1)
            x = ops.linear_add(attended, *attention_output, x)
            h = ops.linear(torch.layer_norm(x, *norm_2), *mlp_input, activation="gelu")
            x = ops.linear_add(h, *mlp_output, x)
        x = ops.linear(x, self.output_weight, self.output_bias)
        return x.view(batch, horizon, -1)


@dataclass
class Rollout:
    """A rollout as far as it is computed."""

    states: Tensor  # [B, H, D], normalized
    observation: Tensor  # after the last step computed [B, S]
    goes_on: Tensor  # whether no step so far was terminal, bool [B, 1]
    num_steps: int  # computed so far


class FoldedRollout(FoldedDenoiser):
    """The rollout denoiser with the units of differences folded into its last layer.

    The input is flat as the residual MLP's, but in float32: the rollout adds its differences to the
    first observation in float32, the products are in the engine's dtype.
    """

    rows_per_part = ROWS_PER_THREAD

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a new input buffer [B, H (D + A)] and its views of states [B, H, D] and actions
        [B, H, A]."""
        return _flat_inputs(self.denoiser, batch, torch.float32, self.held.device)

    def refresh(self) -> None:
        """Read the module's current weights."""
        d, put, dtype = self.denoiser, self.held.put, self.dtype
        *hidden, last = (m for m in d.step.network if isinstance(m, nn.Linear))
        self.hidden = [
            (self._put_weight(f"{i}", layer.weight), put(f"{i}.bias", layer.bias, dtype))
            for i, layer in enumerate(hidden)
        ]
        unit = torch.cat([d.step.difference_scale, torch.ones_like(last.bias[:2])])
        self.output_weight = self._put_weight("output", last.weight * unit.unsqueeze(1))
        self.output_bias = put("output.bias", last.bias * unit, dtype)
        self.flags = put("flags", d.flags, torch.float32)
        low, high = d.step.range.lowest, d.step.range.highest
        self.range = put("lowest", low, torch.float32), put("highest", high, torch.float32)
        if d.process_noise:
            spread = d.step.residual_scale * unit[:-1]
            self.residual_scale = put("residual_scale", spread, torch.float32)

    def begin(self, buffer: Tensor, states: Tensor) -> Rollout:
        """Return a rollout with no step computed yet, from the first observations of an input
        buffer into `states` [B, H, D], which become 0 elsewhere."""
        observation = buffer[:, : self.denoiser.observation_dim].clone()
        states.zero_()[:, 0, : observation.shape[1]] = observation
        goes_on = torch.ones_like(observation[:, :1], dtype=torch.bool)
        return Rollout(states, observation, goes_on, 0)

    def extend(self, rollout: Rollout, buffer: Tensor, stop: int) -> None:
        """Compute the steps before `stop` that a rollout still lacks, by the actions of an input
        buffer: rewards and flags of these steps, observations after them."""
        d, ops = self.denoiser, self.ops
        noise, actions = (
            part.unflatten(1, (d.horizon, -1))
            for part in buffer.split([d.horizon * d.state_dim, d.horizon * d.action_dim], dim=1)
        )
        low, high = self.flags
        can_end = high > low
        for t in range(rollout.num_steps, stop):
            x = torch.cat([rollout.observation, actions[:, t]], dim=1).to(self.dtype)
            for weight, bias in self.hidden:
                x = ops.linear(x, weight, bias, activation="silu")
            out = ops.linear(x, self.output_weight, self.output_bias).to(torch.float32)
            moved, reward, logit = out.split([d.observation_dim, 1, 1], dim=1)
            if d.process_noise:
                following, spread = min(t + 1, d.horizon - 1), self.residual_scale
                moved = torch.addcmul(moved, noise[:, following, :-2], spread[:-1])
                reward = torch.addcmul(reward, noise[:, t, -2:-1], spread[-1:])
            rollout.goes_on = rollout.goes_on & ~(can_end & (logit > 0))
            flag = torch.where(rollout.goes_on, low, high)
            flag = torch.where(logit.isnan(), torch.nan, flag)
            after, reward = within(*self.range, rollout.observation + moved, reward)
            torch.cat([reward, flag], dim=1, out=rollout.states[:, t, d.observation_dim :])
            rollout.observation = torch.where(rollout.goes_on, after, rollout.observation)
            if t + 1 < d.horizon:
                rollout.states[:, t + 1, : d.observation_dim] = rollout.observation
        rollout.num_steps = max(rollout.num_steps, stop)

    def __call__(self, buffer: Tensor, k: int) -> Tensor:
        """Predict at step k: an input buffer -> [B, H, D], a new tensor."""
        d = self.denoiser
        states = buffer.new_empty(len(buffer), d.horizon, d.state_dim)
        self.extend(self.begin(buffer, states), buffer, d.horizon)
        return states


class ForeignDenoiser:
    """A denoiser that is not folded, through denoiser(trajectory, actions, timesteps)."""

    def __init__(
        self,
        denoiser: Denoiser,
        timesteps: Sequence[int],
        dtype: torch.dtype,
        held: HeldTensors,
        ops: LinearOps,
    ):
        if dtype != torch.float32:
            raise InputError(
                f"dtype must be 'float32' where engine 'torch' calls a denoiser that "
                f"{why_foreign(denoiser)} as it is, got {str(dtype).removeprefix('torch.')!r}"
            )
        self.denoiser, self.timesteps, self.device = denoiser, timesteps, held.device
        self.rows_per_part = self.rows_on_gpu = None

    def inputs(self, batch: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return new buffers of states [B, H, D] and actions [B, H, A], as a pair and one by
        one."""
        d = self.denoiser
        states = torch.zeros(batch, d.horizon, d.observation_dim + 2, device=self.device)
        actions = torch.zeros(batch, d.horizon, d.action_dim, device=self.device)
        return (states, actions), states, actions

    def refresh(self) -> None:
        """Do nothing: the module is called with the weights it has."""

    def __call__(self, buffers: tuple[Tensor, Tensor], k: int) -> Tensor:
        """Predict at step k: input buffers -> [B, H, D], a new tensor."""
        states, actions = buffers
        return call_denoiser(self.denoiser, states, actions, self.timesteps[k]).clone()


FOLDED_DENOISERS = {
    ResidualMLPDenoiser: FoldedResidualMLP,
    RolloutDenoiser: FoldedRollout,
    TransformerDenoiser: FoldedTransformer,
}


def fold_denoiser(
    denoiser: Denoiser,
    timesteps: Sequence[int],
    dtype: torch.dtype,
    held: HeldTensors,
    ops: LinearOps,
) -> FoldedDenoiser | ForeignDenoiser:
    """Return the folded form of a denoiser, or of a foreign one what calls it as it is."""
    folded = ForeignDenoiser if why_foreign(denoiser) else FOLDED_DENOISERS[type(denoiser)]
    return folded(denoiser, timesteps, dtype, held, ops)


class FoldedPolicy:
    """`GaussianPolicy` with the normalizer folded into its first Linear, in float32.

    It reads whole state rows [.., D] (zero weights for reward and terminal flag), which are
    contiguous where the observations alone are not. It stays in float32 in every dtype of the
    engine on a CPU: bfloat16 would save its GEMM half the time but lose most of that in LayerNorm
    and ELU, which work in float32 inside.

    On a CPU, ELU(y) + 1 = max(y, 0) + 2^(min(y, 0) log2 e): PyTorch's exp2 takes less than a third
    of its exp. log2 e is folded into the LayerNorm before it, the 1 and the ln 2 into the Linear
    after it. On a GPU one fused kernel is better.
    """

    def __init__(self, policy: GaussianPolicy, state_dim: int, num_steps: int, held: HeldTensors):
        self.policy, self.state_dim, self.num_steps, self.held = policy, state_dim, num_steps, held
        self.ops = LinearOps.choose(held.device, torch.float32)
        self.exp2 = held.device.type == "cpu"

    def refresh(self, normalizer: Normalizer) -> None:
        """Read the module's current weights and the normalizer's moments."""
        modules = list(self.policy.network)
        linears, norms = modules[0::3], modules[1::3]

        def put(name: str, tensor: Tensor) -> Tensor:
            return self.held.put(f"policy.{name}", tensor, torch.float32)

        weight, bias = fold_policy_input(self.policy, normalizer)
        weight = F.pad(weight, (0, self.state_dim - weight.shape[1]))
        self.linears = [(put("0.weight", weight), put("0.bias", bias))]
        for i, linear in enumerate(linears[1:], start=1):
            self.linears.append((put(f"{i}.weight", linear.weight), put(f"{i}.bias", linear.bias)))
        self.norms = [
            self.held.put_norm(f"policy.{i}.norm", norm, torch.float32)
            for i, norm in enumerate(norms)
        ]
        if self.exp2:
            exp2_linears = self.linears[:1] + [
                (weight / LOG2_E, bias - weight.sum(1)) for weight, bias in self.linears[1:]
            ]
            self.exp2_linears = [
                (self.ops.pack(weight, num_uses=self.num_steps), bias)
                for weight, bias in exp2_linears
            ]
            self.exp2_norms = [
                (shape, gamma * LOG2_E, beta * LOG2_E, eps)
                for shape, gamma, beta, eps in self.norms
            ]

    def mean(self, rows: Tensor) -> Tensor:
        """Return the mean raw actions at normalized states: [rows, D] -> [rows, A], a new
        tensor."""
        if not self.exp2:
            return self.differentiable_mean(rows)
        linears = self.exp2_linears
        for (weight, bias), norm in zip(linears[:-1], self.exp2_norms, strict=True):
            h = self.ops.linear(rows, weight, bias)
            rows = torch.layer_norm(h, *norm)
            torch.clamp_max(rows, 0.0, out=h).exp2_()
            rows.clamp_min_(0.0).add_(h, alpha=LOG2_E)
        return self.ops.linear(rows, *linears[-1], activation="tanh")

    def differentiable_mean(self, rows: Tensor) -> Tensor:
        """Return the same, through operations autograd knows."""
        for linear, norm in zip(self.linears[:-1], self.norms, strict=True):
            rows = F.elu(torch.layer_norm(F.linear(rows, *linear), *norm))
        return torch.tanh(F.linear(rows, *self.linears[-1]))


def fast_relu_(x: Tensor) -> Tensor:
    """ReLU in place. Half-precision numbers on a CPU are compared as integers, twice as fast: a
    negative number's sign bit makes a negative integer.

    A NaN with its sign bit set becomes 0, so use it only where the NaN also lives on elsewhere.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        x.view(torch.int16).clamp_min_(0)
        return x
    return torch.relu_(x)
