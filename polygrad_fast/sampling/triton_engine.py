"""Engine "triton": fused kernels, all K steps in one CUDA graph."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers import ResidualMLPDenoiser
from polygrad_fast.errors import InputError
from polygrad_fast.policy import GaussianPolicy
from polygrad_fast.profiling import annotate
from polygrad_fast.sampling.components import SamplerComponents
from polygrad_fast.sampling.engine import Sampled
from polygrad_fast.sampling.folding import why_foreign
from polygrad_fast.sampling.graphs import GraphCache
from polygrad_fast.sampling.noise import LoopNormals, SampleNoise
from polygrad_fast.sampling.triton_operands import (
    DenoiserOperands,
    PolicyWeights,
    Refresh,
    load_kernels,
)

DTYPES = ("float32", "tf32", "float16", "bfloat16")
MINIMUM_CAPABILITY = (8, 0)
BATCH_ALIGNMENT = 16
"""Triton compiles a kernel anew for sizes that are no multiple of this."""


def _refuse(got: str, wanted: str) -> None:
    raise InputError(
        f"engine 'triton' does not offer {got}, it wants {wanted}; engines 'torch' and "
        "'reference' offer it"
    )


class TritonEngine:
    """Run Algorithm 2 in fused kernels: per step one launch per denoiser layer and one for all the
    rest; on a GPU all steps are one CUDA graph, captured at the first sample of each shape.

    Weights and moments are read anew at the start of every sample. Noise is drawn in the kernels,
    from a seed that the caller's generator gives: equal seeds give equal trajectories, whatever
    else is in the batch, but not those of another engine.

    Args:
        components: a residual MLP denoiser and a Gaussian policy of at most 2 layers of 256 (none
            foreign, see `why_foreign`); with 1 layer at most 62 observations.
        dtype: what the GEMMs' operands are in: "float32" (no tensor cores), "tf32", "float16" or
            "bfloat16". Residual stream, sums and states are float32 in all of them.
        dependent_launch: launch kernels before those before them have ended (compute capability 9.0
            or newer; not measured yet).

    Raises:
        InputError: an option, network or device that this engine does not offer; the message names
            engines that do. On a GPU also where a first diffusion step fails.

    Numerics: float32 chains agree with the reference to 1e-4 per step; half-precision errors are
    those of plain PyTorch in that dtype. See `PolicyWeights` for the policy's precision.
    """

    settles = False

    def __init__(
        self, components: SamplerComponents, dtype: str = "float32", dependent_launch: bool = False
    ):
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
        self.components, self.device = components, components.device
        self.dependent_launch = dependent_launch
        self._check_options(components)
        self.kernels = load_kernels()
        self._check_device()
        if self.interpreted and dtype == "bfloat16":
            raise InputError(
                "dtype must be 'float32' or 'float16' without a GPU (triton's interpreter "
                "multiplies bfloat16 wrongly), got 'bfloat16'"
            )
        self.dtype = dtype
        c = components
        steps = self.kernels.step_table
        self.options = steps.step_options(c.config)
        self.table = steps.schedule_table(c.schedule, self.options, c.config)
        timesteps = c.schedule.timesteps
        self.denoiser = DenoiserOperands(c.denoiser, dtype, timesteps, self.device)
        self.policy = PolicyWeights(c.policy, c.normalizer, dtype, self.device)
        self.refresh = Refresh(self.device, self.denoiser, self.policy)
        bounds = c.action_bounds or (torch.zeros((), device=self.device),) * 2
        self.bounds = tuple(b.float().expand(c.action_dim).contiguous() for b in bounds)
        self._graphs = None if self.interpreted else GraphCache()
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
        limits = load_kernels().policy_mean
        num_layers = sum(isinstance(m, nn.LayerNorm) for m in c.policy.network)
        hidden = c.policy.network[0].out_features
        for name, got, low, high in (
            ("policy num_layers", num_layers, 1, limits.MAX_POLICY_LAYERS),
            ("policy hidden_dim", hidden, 1, limits.MAX_POLICY_DIM),
            ("observation_dim", c.observation_dim, 1, limits.MAX_STATE_DIM - 2),
            ("action_dim", c.action_dim, 1, limits.MAX_ACTION_DIM),
        ):
            if not low <= got <= high:
                _refuse(f"{name} {got}", f"{low} to {high}")
        if num_layers == 1 and c.observation_dim + 2 > limits.MAX_ONE_LAYER_STATE_DIM:
            _refuse(
                f"policy num_layers 1 with observation_dim {c.observation_dim}",
                f"at most {limits.MAX_ONE_LAYER_STATE_DIM - 2} observations or 2 layers",
            )

    def _check_device(self) -> None:
        self.interpreted = self.kernels.precision.is_interpreted()
        if self.interpreted and self.device.type != "cpu":
            raise InputError(
                "engine 'triton' has been imported with TRITON_INTERPRET=1, which wants device "
                f"'cpu', got {str(self.device)!r}; unset it or use engine 'torch' or 'reference'"
            )
        if self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            minimum = MINIMUM_CAPABILITY
            if self.dependent_launch:
                minimum = self.kernels.dependent_launch.MINIMUM_CAPABILITY
            if capability < minimum:
                _refuse(f"compute capability {capability}", f"{minimum} or newer")
        elif not self.interpreted:
            raise InputError(
                f"engine 'triton' needs a CUDA GPU (or TRITON_INTERPRET=1 in the environment, for "
                f"tests), got device {str(self.device)!r}; use engine 'torch' or 'reference'"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _check_launch(self) -> None:
        """Run one diffusion step, uncaptured: what does not compile (no C compiler, no ptxas) or
        launch (shared memory, registers) here shall be known now.

        On as many trajectories as take the tiles of many rows, whose kernels samples of some
        hundred trajectories use: those of a single one would be compiled for it alone.
        """
        c = self.components
        multiple = BATCH_ALIGNMENT * c.horizon
        batch = BATCH_ALIGNMENT * -(-self.kernels.guided_step.MANY_ROWS // multiple)
        try:
            with self._on_device():
                self.refresh.follow()
                s0 = torch.zeros(batch, c.observation_dim, device=self.device)
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

    def sample(
        self,
        initial_observations: Tensor,
        guidance_scale: float | Tensor,
        generator: torch.Generator | None,
        noise: SampleNoise | None,
        return_chain: bool | int,
    ) -> Sampled:
        """Run Algorithm 2; see `Engine.sample`. Does not synchronize with the device after the
        first call of a shape."""
        if torch.is_tensor(guidance_scale):
            guidance = guidance_scale.detach().to(self.device, torch.float32).reshape(1)
        else:
            guidance = torch.full((1,), float(guidance_scale), device=self.device)
        given, s0 = (), initial_observations.contiguous()
        if noise is not None:
            given = tuple(tensor.contiguous() for tensor in vars(noise).values())
            seed = torch.zeros(2, dtype=torch.int64, device=self.device)
        else:
            with annotate("noise"):
                seed = self._draw_seed(generator)
        inputs = (s0, guidance, seed, *given)
        chain_length = self.components.chain_length(return_chain)
        run = functools.partial(self._run, chain_length)
        with torch.no_grad(), self._on_device():
            replaced = self.refresh.follow()
            if self._graphs is None:
                outputs = run(*inputs)
            else:
                if replaced:
                    self._graphs.clear()
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
        batch = len(initial_observations)
        normals = LoopNormals(c, batch, noise=SampleNoise(*given)) if given else None
        kept = max(1, chain_length)
        trajectories, all_actions = (
            torch.empty(kept, *shape, device=self.device) for shape in c.shapes(batch)
        )
        trajectory, actions = trajectories[0], all_actions[0]

        with annotate("refresh"):
            self.refresh()
        workspace = self.denoiser.workspace(batch)
        normalizer = c.normalizer
        space = self.kernels.denoiser_input.ActionSpace(
            normalizer.actions_mean, normalizer.actions_scale, *self.bounds
        )
        common = dict(
            initial_observations=initial_observations,
            table=self.table,
            space=space,
            options=self.options,
            seed=seed,
            denoiser_input=workspace.input,
            dependent=self.dependent_launch,
        )
        with annotate("noise"):
            self.kernels.initial_state.initial_state(
                noise=given[:2] or None, trajectory_out=trajectory, actions_out=actions, **common
            )
        for step, k in enumerate(list(reversed(range(c.num_steps)))[:max_steps]):
            with annotate("denoiser"):
                prediction = self.denoiser.predict(workspace, k, self.dependent_launch)
            row = max(0, step - (c.num_steps - kept))
            with annotate("guided_step"):
                self.kernels.guided_step.guided_step(
                    prediction,
                    trajectory,
                    actions,
                    k=k,
                    policy=self.policy.operands,
                    guidance_scale=guidance_scale,
                    noise=normals and normals.step(step, k),
                    trajectory_out=trajectories[row],
                    actions_out=all_actions[row],
                    **common,
                )
            trajectory, actions = trajectories[row], all_actions[row]
        if chain_length:
            return trajectory.clone(), actions.clone(), trajectories, all_actions
        return trajectory, actions
