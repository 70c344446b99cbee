"""Training of the denoising model (Algorithm 1)."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from polygrad_fast.config import DenoiserConfig, SamplerConfig
from polygrad_fast.denoisers import ResidualMLPDenoiser, TransformerDenoiser
from polygrad_fast.errors import InputError
from polygrad_fast.schedule import NoiseSchedule

LARGEST_EPSILON_ERROR_GAIN = 3.0
"""Largest `NoiseSchedule.epsilon_error_gain` for which noise is predicted without a warning.

States have a standard deviation of about 1 in every step, and denoisers are trained on those only.
After some thousand updates they err by 0.2 or more (root mean square). Times the gain that
displaces the next step's states: by 0.6 at this limit, by 6 in the first step of a cosine schedule,
whose beta ends at 0.999 for every K and tau. So far out a denoiser hardly corrects the error, and
later steps multiply it on.
"""


def warn_of_amplified_errors(
    schedule: NoiseSchedule, config: SamplerConfig, stacklevel: int = 2
) -> None:
    """Warn where a denoiser's error is multiplied beyond what later steps correct."""
    gain = schedule.epsilon_error_gain.max().item()
    if config.prediction_type == "epsilon" and gain > LARGEST_EPSILON_ERROR_GAIN:
        warnings.warn(
            f"prediction_type 'epsilon' with this noise schedule multiplies the denoiser's error "
            f"by {gain:.0f} in one diffusion step, so imagined states and rewards are far off "
            f"until the denoiser is well trained: prediction_type 'sample' "
            f"(--sampler.prediction-type sample) or the preset 'default' avoids it",
            stacklevel=stacklevel + 1,
        )


def build_denoiser(
    config: DenoiserConfig,
    observation_dim: int,
    action_dim: int,
    horizon: int,
    num_train_timesteps: int,
) -> nn.Module:
    """Build the configured denoising network with fresh weights."""
    config = config.resolved(horizon)
    arguments = {
        "observation_dim": observation_dim,
        "action_dim": action_dim,
        "horizon": horizon,
        "hidden_dim": config.hidden_dim,
        "num_layers": config.num_layers,
        "step_conditioning": config.step_conditioning,
        "num_train_timesteps": num_train_timesteps,
    }
    if config.kind == "transformer":
        return TransformerDenoiser(**arguments, num_heads=config.num_heads)
    return ResidualMLPDenoiser(**arguments)


def denoising_loss(
    denoiser: nn.Module,
    trajectory: Tensor,
    actions: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    config: SamplerConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the inpainted denoising loss (Algorithm 1, line 6) and its parts.

    x_i = sqrt(alphabar_i) x + sqrt(1 - alphabar_i) eps with the clean first observation put back;
    the prediction's first observation is replaced by the clean one too; mean squared error against
    eps or x.

    Args:
        trajectory: clean, normalized [B, H, D]. actions: normalized [B, H, A], already clipped if
            the model is to see clipped actions.
        timesteps: 0-based steps [B]. noise: standard normals [B, H, D].

    Returns:
        The scalar loss, and detached scalars for observations, rewards and terminals.
    """
    observation_dim = trajectory.shape[-1] - 2
    alphas_cumprod = schedule.alphas_cumprod[timesteps].view(-1, 1, 1)
    noisy = alphas_cumprod.sqrt() * trajectory + (1.0 - alphas_cumprod).sqrt() * noise
    noisy[:, 0, :observation_dim] = trajectory[:, 0, :observation_dim]
    if config.scale_actions:
        actions = alphas_cumprod.sqrt() * actions
    prediction = denoiser(noisy, actions.clone(), timesteps).clone()
    prediction[:, 0, :observation_dim] = trajectory[:, 0, :observation_dim]
    target = noise if config.prediction_type == "epsilon" else trajectory
    squared_error = (prediction - target).square()
    with torch.no_grad():
        parts = {
            "observation_loss": squared_error[..., :observation_dim].mean(),
            "reward_loss": squared_error[..., -2].mean(),
            "terminal_loss": squared_error[..., -1].mean(),
        }
    return squared_error.mean(), parts


class DenoiserTrainer:
    """Adam on the denoising loss, and the EMA copy that is used for sampling.

    Attributes:
        model: the network being trained. ema_model: its averaged copy.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        config: DenoiserConfig,
        sampler_config: SamplerConfig,
    ):
        self.model, self.schedule = model, schedule
        self.config, self.sampler_config = config.resolved(model.horizon), sampler_config
        try:
            self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        except Exception as error:
            raise InputError(
                f"denoiser {type(model).__name__} cannot be copied for its average: {error}"
            ) from error
        self.optimizer = torch.optim.Adam(model.parameters(), lr=self.config.learning_rate)
        self.num_updates = 0

    def update(
        self, trajectory: Tensor, actions: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on normalized windows [B, H, D], [B, H, A]; return detached
        scalar losses."""
        device = trajectory.device
        timesteps = torch.randint(
            self.schedule.num_train_timesteps,
            (trajectory.shape[0],),
            generator=generator,
            device=device,
        )
        noise = torch.randn(trajectory.shape, generator=generator, device=device)
        loss, parts = denoising_loss(
            self.model,
            trajectory,
            actions,
            timesteps,
            noise,
            self.schedule,
            self.sampler_config,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.num_updates % self.config.ema_interval == 0:
            self._update_ema()
        self.num_updates += 1
        return {"loss": loss.detach(), **parts}

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = self.config.ema_decay if self.num_updates >= self.config.ema_start else 0.0
        averages, weights = list(self.ema_model.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        # an own denoiser's running statistics, for instance
        for copied, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            copied.copy_(buffer)

    def state_dict(self) -> dict:
        """Return optimizer state and counters; the weights are saved with the other weights."""
        return {"optimizer": self.optimizer.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = state["num_updates"]
