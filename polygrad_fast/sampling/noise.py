"""The standard normals of one sample, given by the caller or drawn in the released order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polygrad_fast.profiling import annotate
from polygrad_fast.sampling.components import SamplerComponents

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SampleNoise:
    """Every standard normal of one sample, in loop order (first row = step i = K)."""

    initial_trajectories: Tensor  # [B, H, D]
    initial_actions: Tensor  # [B, H, A]
    trajectories: Tensor  # [K, B, H, D]
    actions: Tensor  # [K, B, H, A]

    @classmethod
    def draw(
        cls,
        states: Shape,
        actions: Shape,
        num_steps: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> SampleNoise:
        """Draw all in the released code's order, in which the last step's actions take none
        (zeros).

        Args:
            states, actions: shapes [B, H, D] and [B, H, A].
            num_steps: K.
            device: of the normals.
            generator: default torch's.
        """

        def normals(shape: Shape) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        initial = normals(states), normals(actions)
        state_noise = torch.empty(num_steps, *states, device=device)
        action_noise = torch.zeros(num_steps, *actions, device=device)
        for step in range(num_steps):
            state_noise[step] = normals(states)
            if step < num_steps - 1:
                action_noise[step] = normals(actions)
        return cls(*initial, state_noise, action_noise)


class LoopNormals:
    """The normals of one sample as the loop asks for them: its start, then step by step.

    Args:
        components: whose action update says which steps take normals for the actions.
        batch: B.
        generator: source of what is drawn; default torch's. The order is the released code's:
            initial states, initial actions, then in every step states and actions, where it takes
            any.
        noise: all normals, given; nothing is drawn.
    """

    def __init__(
        self,
        components: SamplerComponents,
        batch: int,
        generator: torch.Generator | None = None,
        noise: SampleNoise | None = None,
    ):
        self._update = components.config.action_update
        self._shapes = components.shapes(batch)
        self._generator, self._device, self._noise = generator, components.device, noise
        if noise is not None:
            self.initial_trajectories = noise.initial_trajectories
            self.initial_actions = noise.initial_actions
        else:
            self.initial_trajectories, self.initial_actions = map(self._draw, self._shapes)

    def step(self, step: int, k: int) -> tuple[Tensor, Tensor | None]:
        """Return the normals of one step, states [B, H, D] and actions [B, H, A] or None.

        With action update "exact" those of the actions are the initial ones in every step.

        Args:
            step: its number in the loop, from 0.
            k: its diffusion step, 0 in the last.
        """
        takes_actions = k > 0 and self._update in ("score", "sample")
        if self._noise is not None:
            states = self._noise.trajectories[step]
            actions = self._noise.actions[step] if takes_actions else None
        else:
            states = self._draw(self._shapes[0])
            actions = self._draw(self._shapes[1]) if takes_actions else None
        return states, self.initial_actions if self._update == "exact" else actions

    def _draw(self, shape: Shape) -> Tensor:
        with annotate("noise"):
            return torch.randn(shape, generator=self._generator, device=self._device)
