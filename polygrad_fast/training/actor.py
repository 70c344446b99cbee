"""The policy as the environment meets it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polygrad_fast.data import ActionScaler
from polygrad_fast.data.checks import as_finite_float32
from polygrad_fast.errors import InputError, NonFiniteError
from polygrad_fast.normalizer import Normalizer
from polygrad_fast.training.acting_policy import ActingPolicy, moments_of


class Actor:
    """Map observations of the environment to actions.

    Args:
        policy: the current one; its weights may change.
        normalizer: for a policy that reads normalized observations.
        action_scaler: from the policy's actions to the environment's.
        device: of policy and normalizer.

    Attributes:
        acting: the policy that `sample` draws from, which is told of changes by its `refresh`; on
            another device than a CPU one change older than the policy.
    """

    def __init__(
        self,
        policy: nn.Module,
        normalizer: Normalizer,
        action_scaler: ActionScaler,
        device: torch.device,
    ):
        self.policy, self.normalizer, self.device = policy, normalizer, device
        self.action_scaler = action_scaler
        self.acting = ActingPolicy(policy, normalizer)

    @torch.no_grad()
    def sample(self, observation: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Draw the policy's action [A], in its own units, for one raw observation [S].

        Raises:
            InputError: an observation so large that the policy's mean is not finite.
            NonFiniteError: the policy's weights are not finite.
        """
        mean, std = self.acting.moments(torch.from_numpy(observation))
        noise = torch.randn(mean.shape, generator=generator)
        action = (mean + std * noise).numpy()
        if np.count_nonzero(np.isfinite(action)) < action.size:
            self._check_too_large(observation)
            raise NonFiniteError(f"the policy's action is {action.tolist()}")
        return action

    @torch.no_grad()
    def predict(
        self, observation: np.ndarray, generator: torch.Generator | None = None
    ) -> np.ndarray:
        """Return environment actions within their bounds, [A] or [N, A].

        Args:
            observation: [S] or [N, S], raw.
            generator: draw from the policy with it; None: take the policy's mean.

        Raises:
            InputError: wrong shape or dtype, or a value that is not finite in float32.
            NonFiniteError: the policy's weights are not finite.
        """
        array = self._checked(observation)
        moments = moments_of(self.policy, self.normalizer)
        mean, std = moments(torch.from_numpy(array).to(self.device))
        mean = mean.cpu()
        if not torch.isfinite(mean).all():
            self._check_too_large(array)
            raise NonFiniteError("the policy's mean is not finite")
        if generator is not None:
            mean = mean + std.cpu() * torch.randn(mean.shape, generator=generator)
        return self.action_scaler.to_environment(mean.numpy())

    def _checked(self, observation: np.ndarray) -> np.ndarray:
        if isinstance(observation, Tensor):
            observation = observation.detach().cpu()
        try:
            array = np.asarray(observation)
        except ValueError as error:  # rows of different lengths
            raise InputError(f"observation cannot be read as an array: {error}") from error
        size = self.normalizer.observation_dim
        if array.ndim not in (1, 2) or array.shape[-1] != size:
            raise InputError(
                f"observation must have shape [{size}] or [N, {size}], got {list(array.shape)}"
            )
        if array.dtype.kind not in "iuf":
            raise InputError(f"observation must be of real numbers, got dtype {array.dtype}")
        return as_finite_float32(array, array.shape, "observation")

    def _check_too_large(self, observation: np.ndarray) -> None:
        """Blame an observation where a policy of finite weights gave a result that is not."""
        if all(torch.isfinite(weight).all() for weight in self.policy.parameters()):
            largest = np.unravel_index(np.abs(observation).argmax(), observation.shape)
            raise InputError(
                f"observation{[int(i) for i in largest]} must be small enough for the policy's "
                f"mean to be finite, got {observation[largest]:g}"
            )
