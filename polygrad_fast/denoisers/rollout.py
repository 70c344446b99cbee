"""A denoiser that knows dynamics: one step's prediction, rolled out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polygrad_fast.arguments import as_integer
from polygrad_fast.denoisers.one_step import OneStepNetwork, one_step_losses
from polygrad_fast.denoisers.step_embedding import check_inputs
from polygrad_fast.structure import structure


class RolloutDenoiser(nn.Module):
    """Predict clean states as a rollout from the first observation under the given actions.

    The rollout is that of one network for all steps (`OneStepNetwork`), so its states depend on
    earlier actions only, and the network learns from every transition of the windows, by losses of
    its own (`transition_losses`) in place of the denoising loss. The noisy states and the diffusion
    step are not read: without chance the first observation and the actions say all, and what
    diffusion does is to make states and actions agree, one more step of the horizon in each
    diffusion step (action update "exact").

    With `process_noise` every step adds a normal, scaled by how far the data scatter around the
    prediction (`OneStepNetwork.residual_scale`): the same entry of the normals that the diffusion
    began from, which then stand in place of the noisy states (`reads_initial_noise`). A settled
    sample is then one of the stochastic dynamics under the policy, however few the diffusion steps.

    Args:
        observation_dim, action_dim, horizon: S, A and H.
        hidden_dim, num_layers: width and depth of the step's network.
        process_noise: whether chance is rolled out too, as Gaussian noise of the same size at every
            state.

    Raises:
        InputError: a size that is no positive integer.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        horizon: int,
        hidden_dim: int = 256,
        num_layers: int = 3,
        process_noise: bool = False,
    ):
        super().__init__()
        for name, value in (
            ("observation_dim", observation_dim),
            ("action_dim", action_dim),
            ("horizon", horizon),
            ("hidden_dim", hidden_dim),
            ("num_layers", num_layers),
        ):
            as_integer(value, name, 1)
        self.observation_dim, self.action_dim, self.horizon = observation_dim, action_dim, horizon
        self.hidden_dim, self.num_layers = hidden_dim, num_layers
        self.state_dim = observation_dim + 2
        self.step = OneStepNetwork(
            observation_dim, action_dim, hidden_dim, num_layers, process_noise
        )
        self.process_noise = self.reads_initial_noise = process_noise
        # The normalized terminal flags 0 and 1, as far as windows have shown them; else 0.
        self.register_buffer("flags", torch.zeros(2))
        self.noted = {"flags": "farthest"}
        self.built = structure(self)

    def forward(self, trajectory: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Predict clean states: [B, H, D], [B, H, A], [B] (0-based step) -> [B, H, D]; all
        normalized, the first observation of `trajectory` clean; with `process_noise` the rest of it
        standard normals.

        Raises:
            InputError: shapes or dtypes do not fit.
        """
        check_inputs(self, trajectory, actions, timesteps)
        noise = trajectory if self.process_noise else None
        return self.rollout(trajectory[:, 0, : self.observation_dim], actions, noise)

    @torch.no_grad()
    def rollout(
        self, initial_observations: Tensor, actions: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Return the states [B, H, D] from o_0 [B, S] under actions [B, H, A], all normalized.

        Observations and rewards stay within what windows have shown (`ShownRange`). After a step
        whose flag is more probably terminal than not, the observation stays and the flag stays, as
        in `StepwiseModel`; rewards go on. Until windows have shown a terminal, none
        is imagined.

        Args:
            initial_observations, actions: o_0 and u.
            noise: standard normals [B, H, D], as the states are laid out, that `residual_scale`
                scales and rewards and observations (but o_0) get; None: no noise.
        """
        observation, scale = initial_observations, self.step.difference_scale
        goes_on = torch.ones_like(observation[:, :1], dtype=torch.bool)
        can_end = self.flags[1] > self.flags[0]
        states = []
        for t, action in enumerate(actions.unbind(1)):
            difference, reward, logit = self.step(observation, action)
            if noise is not None:
                spread, place = self.step.residual_scale, min(t + 1, self.horizon - 1)
                difference = difference + spread[:-1] * noise[:, place, :-2]
                reward = reward + spread[-1] * noise[:, t, -2]
            following, reward = self.step.range.clamp(observation + scale * difference, reward)
            goes_on = goes_on & ~(can_end & (logit > 0)).unsqueeze(-1)
            flag = torch.where(goes_on, self.flags[0], self.flags[1])
            flag = torch.where(logit.isnan().unsqueeze(-1), torch.nan, flag)
            states.append(torch.cat([observation, reward.unsqueeze(-1), flag], dim=-1))
            observation = torch.where(goes_on, following, observation)
        return torch.stack(states, dim=1)

    def transition_losses(
        self,
        trajectory: Tensor,
        actions: Tensor,
        evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of the step's network on clean windows [B, H, D], [B, H, A], three
        scalars by name (see `one_step_losses`); what the flags look like is noted.

        A normalized flag above 0 is a terminal: the mean of flags is from 0 to below 1.

        Args:
            trajectory, actions: normalized.
            evaluate: computes what `step` does; None: `step` itself.
        """
        states, rewards, flags = trajectory.split([self.observation_dim, 1, 1], dim=-1)
        flags = flags.squeeze(-1)
        ended = flags > 0
        low, high = flags.detach().aminmax()
        self.flags.copy_(
            torch.stack(
                [
                    torch.where(low > 0, self.flags[0], low),
                    torch.where(high > 0, high, self.flags[1]),
                ]
            )
        )
        return one_step_losses(
            self.step, states, actions, rewards.squeeze(-1), ended.to(flags.dtype), evaluate
        )
