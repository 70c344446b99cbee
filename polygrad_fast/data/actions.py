"""Actions between the policy's space and the environment's."""

from __future__ import annotations

import gymnasium
import numpy as np

from polygrad_fast.errors import InputError


class ActionScaler:
    """Map actions between the policy's space and the environment's.

    With `rescale` and finite bounds the policy's space is [-1, 1]^A, and its action a stands for
    the environment's low + (clip(a, -1, 1) + 1)/2 * (high - low). Otherwise the policy's actions
    are the environment's own, clipped to its bounds where these are finite.

    Args:
        action_space: the environment's.
        rescale: ask for [-1, 1]; without effect on a space with an infinite bound.

    Attributes:
        low, high: float32 [A], bounds in the policy's space, possibly infinite.
        rescaled: whether the policy's space is [-1, 1]^A.

    Raises:
        InputError: the action space is not a Box of one dimension, or has a finite bound that
            float32 arithmetic cannot handle: beyond float32, or beyond 1e18 without rescaling,
            where squares overflow.
    """

    def __init__(self, action_space: gymnasium.spaces.Box, rescale: bool) -> None:
        if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
            raise InputError(f"action space must be a Box of one dimension, got {action_space}")
        self._dtype = action_space.dtype
        self._env_low, self._env_high = action_space.low, action_space.high
        self._low64 = action_space.low.astype(np.float64)
        high64 = action_space.high.astype(np.float64)
        self.rescaled = bool(rescale) and bool(np.isfinite([self._low64, high64]).all())
        largest = float(np.finfo(np.float32).max) if self.rescaled else 1e18
        for name, bound in (("low", self._low64), ("high", high64)):
            for i in np.flatnonzero(np.isfinite(bound) & (np.abs(bound) > largest)):
                raise InputError(
                    f"action space: {name}[{i}] must lie between {-largest:.3g} and "
                    f"{largest:.3g}, or be infinite, got {bound[i]:g}"
                )
        self._range64 = high64 - self._low64
        if self.rescaled:
            self.low = np.full(action_space.shape, -1.0, dtype=np.float32)
            self.high = np.full(action_space.shape, 1.0, dtype=np.float32)
        else:
            self.low = action_space.low.astype(np.float32)
            self.high = action_space.high.astype(np.float32)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Return the environment's action for a policy action.

        Args:
            action: [A] or [N, A] in the policy's space; values outside its bounds are clipped.

        Returns:
            A new array of the same shape in the action space's dtype, within its bounds.

        Raises:
            InputError: another shape.
        """
        action = self._checked(action)
        if self.rescaled:
            action = self._low64 + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * self._range64
        with np.errstate(over="ignore"):
            action = action.astype(self._dtype)
        # Clipped after the cast: rounding to the space's dtype may step over a bound.
        return np.clip(action, self._env_low, self._env_high)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """Return the policy action of an environment's action; the inverse of `to_environment`.

        Args:
            action: [A] or [N, A] within the environment's bounds.

        Returns:
            float32 array of the same shape in the policy's space; 0 where a bound pair is equal.

        Raises:
            InputError: another shape.
        """
        action = self._checked(action)
        if not self.rescaled:
            return action.astype(np.float32)
        scale = np.divide(
            2.0, self._range64, out=np.zeros_like(self._range64), where=self._range64 > 0
        )
        offset = np.where(self._range64 > 0, -1.0, 0.0)
        return np.clip((action - self._low64) * scale + offset, -1.0, 1.0).astype(np.float32)

    def _checked(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, dtype=np.float64)
        size = self.low.shape[0]
        if action.ndim not in (1, 2) or action.shape[-1] != size:
            raise InputError(f"action must have shape ({size},) or (N, {size}), got {action.shape}")
        return action
