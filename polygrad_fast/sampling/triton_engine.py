"""Engine "triton": fused kernels, all K steps in one CUDA graph."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers import ResidualMLPDenoiser
from polygrad_fast.errors import InputError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.profiling import annotate
from polygrad_fast.reference.residual_mlp import fold_input, fold_normalizer
from polygrad_fast.sampling.components import SampleNoise, SamplerComponents
from polygrad_fast.sampling.folded_networks import why_foreign
from polygrad_fast.sampling.graphs import GraphCache

DTYPES = ("auto", "float32", "tf32", "float16", "bfloat16")
MINIMUM_CAPABILITY = (8, 0)
ROW_ALIGNMENT = 64  # elements; whole tiles of the K loop, and rows aligned for 16-byte loads


def _kernels() -> tuple[ModuleType, ModuleType]:
    """Import the kernels, and with them triton."""
    try:
        from polygrad_fast.kernels import guided_step, residual_mlp
    except ImportError as error:
        raise InputError(
            f"engine 'triton' needs the package triton ({error}); install polygrad-fast[triton] "
            "or use engine 'torch' or 'reference'"
        ) from None
    return guided_step, residual_mlp


def _refuse(got: str, wanted: str) -> None:
    raise InputError(
        f"engine 'triton' does not offer {got}, it wants {wanted}; engines 'torch' and "
        "'reference' offer it"
    )


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
        precision: a key of `kernels.residual_mlp.PRECISIONS`.
        num_steps: K.
        device: where the kernels run.
    """

    def __init__(
        self,
        denoiser: ResidualMLPDenoiser,
        precision: str,
        num_steps: int,
        device: torch.device,
    ):
        self.layer = _kernels()[1]
        self.denoiser, self.precision, self.device = denoiser, precision, device
        self.dtype = self.layer.PRECISIONS[precision].dtype
        width, num_layers = denoiser.hidden_dim, denoiser.num_layers
        self.in_dim = denoiser.horizon * (denoiser.state_dim + denoiser.action_dim)
        self.out_dim = denoiser.horizon * denoiser.state_dim
        self.by_layer = denoiser.step_conditioning == "layer"
        self.timesteps = torch.arange(num_steps, device=device)
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
        net = self.denoiser
        if self.by_layer:
            weight, rows = net.input.weight, net.input.bias
        else:
            weight, rows = fold_input(
                net.proj.weight,
                net.proj.bias,
                net.step_mlp(self.timesteps),
                net.input.weight,
                net.input.bias,
            )
            norms = [*(block.norm for block in net.blocks), net.norm]
            for gamma_beta, norm in zip(self.norms, norms, strict=True):
                gamma_beta[0].copy_(norm.weight)
                gamma_beta[1].copy_(norm.bias)
        self.input_weight[:, : self.in_dim].copy_(weight)
        self.input_bias.copy_(rows)
        linears = [*(block.linear for block in net.blocks), net.output]
        torch._foreach_copy_(self.weights, [linear.weight for linear in linears])
        if self.precision == "tf32":
            for tensor in (self.input_weight, *self.weights):
                _round_to_tf32(tensor)
        for bias, linear in zip(self.biases, linears, strict=True):
            bias.copy_(linear.bias)
        if self.by_layer:
            for bias, block in zip(self.biases, net.blocks, strict=False):
                bias.add_(block.step_embedding(self.timesteps))

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

    def predict(self, workspace: DenoiserWorkspace, k: int) -> Tensor:
        """Run the denoiser on the workspace's input in step k; return its prediction [B, H D]."""
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

        layer = functools.partial(self.layer.residual_mlp_layer, precision=self.precision)
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
        steps = _kernels()[0]
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
        self.operands = steps.PolicyOperands(
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
        to, first = self.operands, self.linears[0]
        weight, bias = first.weight, first.bias
        if not self.policy.normed_inputs:
            weight, bias = fold_normalizer(
                weight,
                bias,
                self.normalizer.observations_mean,
                self.normalizer.observations_scale,
            )
        to.first_weight[:, : weight.shape[1]].copy_(weight)
        to.vectors[0, 0].copy_(bias)
        for linear in self.linears[1:-1]:
            to.hidden_weight[:, : linear.in_features].copy_(linear.weight)
            to.vectors[1, 0].copy_(linear.bias)
        if to.precision != "float32":  # the first layer multiplies in tf32 in float16 too
            _round_to_tf32(to.first_weight)
        if to.precision == "tf32":
            _round_to_tf32(to.hidden_weight)
        for vectors, norm in zip(to.vectors, self.norms, strict=True):
            vectors[1].copy_(norm.weight)
            vectors[2].copy_(norm.bias)
        to.last_weight.copy_(self.linears[-1].weight)
        to.last_bias.copy_(self.linears[-1].bias)
        to.std.copy_(self.policy.std)

    def sources(self) -> list[Tensor]:
        """Return every tensor that `refresh` and the kernel read."""
        return [*self.policy.parameters(), *self.normalizer.buffers()]


class TritonEngine:
    """Run Algorithm 2 in fused kernels: per step one launch per denoiser layer and one for all the
    rest; on a GPU all steps are one CUDA graph, captured at the first sample of each shape.

    Weights and moments are read anew at the start of every sample. Noise is drawn in the kernels,
    from a seed that the caller's generator gives: equal seeds give equal trajectories, whatever
    else is in the batch, but not those of another engine.

    Args:
        components: a residual MLP denoiser and a Gaussian policy of at most 2 layers of 256 (none
            foreign, see `why_foreign`); with 1 layer at most 62 observations.
        dtype: what the GEMMs' operands are in: "float32" (also "auto"; no tensor cores), "tf32",
            "float16" or "bfloat16". Residual stream, sums and states are float32 in all of them.

    Raises:
        InputError: an option, network or device that this engine does not offer; the message names
            engines that do. On a GPU also where a first diffusion step fails.

    Numerics: float32 chains agree with the reference to 1e-4 per step; half-precision errors are
    those of plain PyTorch in that dtype. See `PolicyWeights` for the policy's precision.
    """

    def __init__(self, components: SamplerComponents, dtype: str = "auto"):
        if dtype not in DTYPES:
            raise InputError(f"engine 'triton' takes dtype {list(DTYPES)}, got {dtype!r}")
        self.components, self.device = components, components.device
        self._check_options(components)
        self.steps, layers = _kernels()
        self._check_device(layers)
        if dtype == "auto":
            dtype = "float32"
        if self.interpreted and dtype == "bfloat16":
            raise InputError(
                "triton's interpreter multiplies bfloat16 wrongly, got dtype 'bfloat16'; use "
                "'float32', 'float16' or a GPU"
            )
        self.dtype = dtype
        c = components
        self.options = self.steps.step_options(c.config)
        self.table = self.steps.schedule_table(c.schedule, self.options, c.config)
        num_steps = c.schedule.num_train_timesteps
        self.denoiser = DenoiserOperands(c.denoiser, dtype, num_steps, self.device)
        self.policy = PolicyWeights(c.policy, c.normalizer, dtype, self.device)
        bounds = c.action_bounds or (torch.zeros((), device=self.device),) * 2
        self.bounds = tuple(b.float().expand(c.action_dim).contiguous() for b in bounds)
        self._check_sources()
        self._graphs = None if self.interpreted else GraphCache()
        self._addresses: list[int] = []
        if self.device.type == "cuda":
            self._check_launch()

    def _check_options(self, c: SamplerComponents) -> None:
        if c.config.update_states:
            _refuse("update_states=True", "update_states=False")
        for name, module, kind in (
            ("denoiser", c.denoiser, ResidualMLPDenoiser),
            ("policy", c.policy, GaussianPolicy),
        ):
            foreign = f"is a {type(module).__name__}"
            if type(module) is kind:
                foreign = why_foreign(module)
            if foreign is not None:
                _refuse(f"a {name} that {foreign}", f"a {kind.__name__} as its constructor made it")
        steps = _kernels()[0]
        num_layers = sum(isinstance(m, nn.LayerNorm) for m in c.policy.network)
        hidden = c.policy.network[0].out_features
        for name, got, low, high in (
            ("policy num_layers", num_layers, 1, steps.MAX_POLICY_LAYERS),
            ("policy hidden_dim", hidden, 1, steps.MAX_POLICY_DIM),
            ("observation_dim", c.observation_dim, 1, steps.MAX_STATE_DIM - 2),
            ("action_dim", c.action_dim, 1, steps.MAX_ACTION_DIM),
        ):
            if not low <= got <= high:
                _refuse(f"{name} {got}", f"{low} to {high}")
        if num_layers == 1 and c.observation_dim + 2 > steps.MAX_ONE_LAYER_STATE_DIM:
            _refuse(
                f"policy num_layers 1 with observation_dim {c.observation_dim}",
                f"at most {steps.MAX_ONE_LAYER_STATE_DIM - 2} observations or 2 layers",
            )

    def _check_device(self, layers: ModuleType) -> None:
        self.interpreted = layers.is_interpreted()
        if self.interpreted and self.device.type != "cpu":
            raise InputError(
                "engine 'triton' has been imported with TRITON_INTERPRET=1, which wants device "
                f"'cpu', got {str(self.device)!r}; unset it or use engine 'torch' or 'reference'"
            )
        if self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            if capability < MINIMUM_CAPABILITY:
                _refuse(f"compute capability {capability}", f"{MINIMUM_CAPABILITY} or newer")
        elif not self.interpreted:
            raise InputError(
                f"engine 'triton' needs a CUDA GPU (or TRITON_INTERPRET=1 in the environment, for "
                f"tests), got device {str(self.device)!r}; use engine 'torch' or 'reference'"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _check_launch(self) -> None:
        """Run one diffusion step, uncaptured: what does not compile (no C compiler, no ptxas) or
        launch (shared memory, registers) here shall be known now."""
        c = self.components
        try:
            with self._on_device():
                s0 = torch.zeros(1, c.observation_dim, device=self.device)
                guidance = torch.zeros(1, device=self.device)
                seed = torch.zeros(2, dtype=torch.int64, device=self.device)
                self._run(0, s0, guidance, seed, max_steps=1)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
        except Exception as error:
            raise InputError(f"triton cannot run here: {error}") from error

    def _on_device(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def _check_sources(self) -> None:
        for tensor in self._sources():
            if tensor.device != self.device:
                raise InputError(
                    f"the sampler is on {self.device}, but a weight or moment of its modules on "
                    f"{tensor.device}"
                )

    def _sources(self) -> list[Tensor]:
        return [*self.denoiser.sources(), *self.policy.sources()]

    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return normalized states [B, H, D], actions [B, H, A] and, where asked, both chains [n,
        B, H, .] of the last n steps; none of them shares memory with the engine.

        Args are those of `PolicyGuidedSampler.sample`, checked, with normalized initial
        observations [B, S]. Does not synchronize with the device after the first call of a shape.
        """
        if torch.is_tensor(guidance_scale):
            guidance = guidance_scale.detach().to(self.device, torch.float32).reshape(1)
        else:
            guidance = torch.full((1,), float(guidance_scale), device=self.device)
        given = ()
        if noise is not None:
            given = (
                noise.initial_trajectories,
                noise.initial_actions,
                noise.trajectories,
                noise.actions,
            )
            seed = torch.zeros(2, dtype=torch.int64, device=self.device)
        else:
            with annotate("noise"):
                seed = self._draw_seed(generator)
        given = tuple(t.to(self.device, torch.float32).contiguous() for t in given)
        s0 = initial_observations.to(self.device, torch.float32).contiguous()
        inputs = (s0, guidance, seed, *given)
        chain_length = self.components.chain_length(return_chain)
        run = functools.partial(self._run, chain_length)
        with torch.no_grad(), self._on_device():
            if self._graphs is None:
                outputs = run(*inputs)
            else:
                addresses = [tensor.data_ptr() for tensor in self._sources()]
                if addresses != self._addresses:  # a tensor was replaced, not changed in place
                    self._graphs.clear()
                    self._addresses = addresses
                outputs = self._graphs(chain_length, run, inputs)
        trajectory, actions, *chains = outputs
        return trajectory, actions, tuple(chains) if chains else None

    def _draw_seed(self, generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        seed = torch.randint(2**62, (2,), generator=generator, device=device)
        return seed.to(self.device)

    def _run(
        self,
        chain_length: int,
        initial_observations: Tensor,
        guidance_scale: Tensor,
        seed: Tensor,
        *given: Tensor,
        max_steps: int | None = None,
    ) -> tuple[Tensor, ...]:
        """One sample, or its first `max_steps` diffusion steps; launches only, so that it can be
        captured."""
        c = self.components
        batch, observation_dim = initial_observations.shape
        num_steps = c.schedule.num_train_timesteps
        kept = max(1, chain_length)
        shape = (kept, batch, c.horizon)
        trajectories = torch.empty(*shape, observation_dim + 2, device=self.device)
        all_actions = torch.empty(*shape, c.action_dim, device=self.device)
        trajectory, actions = trajectories[0], all_actions[0]

        with annotate("refresh"):
            self.denoiser.refresh()
            self.policy.refresh()
        workspace = self.denoiser.workspace(batch)
        normalizer = c.normalizer
        space = self.steps.ActionSpace(
            normalizer.actions_mean, normalizer.actions_scale, *self.bounds
        )
        common = dict(
            initial_observations=initial_observations,
            table=self.table,
            space=space,
            options=self.options,
            seed=seed,
            denoiser_input=workspace.input,
        )
        with annotate("noise"):
            self.steps.initial_state(
                noise=given[:2] or None, trajectory_out=trajectory, actions_out=actions, **common
            )
        for step, k in enumerate(list(reversed(range(num_steps)))[:max_steps]):
            with annotate("denoiser"):
                prediction = self.denoiser.predict(workspace, k)
            row = max(0, step - (num_steps - kept))
            with annotate("guided_step"):
                self.steps.guided_step(
                    prediction,
                    trajectory,
                    actions,
                    k=k,
                    policy=self.policy.operands,
                    guidance_scale=guidance_scale,
                    noise=(given[2][step], given[3][step]) if given else None,
                    trajectory_out=trajectories[row],
                    actions_out=all_actions[row],
                    **common,
                )
            trajectory, actions = trajectories[row], all_actions[row]
        if chain_length:
            return trajectory.clone(), actions.clone(), trajectories, all_actions
        return trajectory, actions
