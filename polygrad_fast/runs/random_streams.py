"""The random streams of a run."""

from __future__ import annotations

import json
import random
import warnings
from typing import Any

import numpy as np
import torch


class RandomStreams:
    """Independent random streams, also between neighbouring seeds.

    Making them seeds the global generators of python, numpy and torch.

    Args:
        seed: of everything.
        device: of `generator`.
        index: of the process, among several that train together: in each, what they draw is
            another, but for the global generators and the environments' seeds.

    Attributes:
        generator: batches, updates and imagination; on the device.
        acting: actions in the training environment; on the CPU.
        predictions: actions that a user asks for, which must not change the run; on the CPU.
    """

    def __init__(self, seed: int, device: torch.device, index: int = 0):
        streams = np.random.SeedSequence(seed).spawn(5)
        seeds = [int(stream.generate_state(1, np.uint64)[0]) for stream in streams]
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seeds[0])
        self._seed, self._index = seed, index
        if index > 0:
            seeds[1:4] = self._anew(0, 3)
        self.generator = torch.Generator(device).manual_seed(seeds[1])
        self.acting = torch.Generator().manual_seed(seeds[2])
        self.predictions = torch.Generator().manual_seed(seeds[3])
        self._environment_seed = seeds[4]

    def environment_seeds(self, number: int) -> list[int]:
        """Return a seed for each of so many training environments and their action spaces; the
        first ones are the same for any number."""
        first = self._environment_seed
        others = [np.random.SeedSequence([first, i]) for i in range(1, number)]
        return [first, *(int(seed.generate_state(1, np.uint64)[0]) for seed in others)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all streams that a training draws from, the global ones included."""
        numpy_state = np.random.get_state()
        return {
            "device_type": self.generator.device.type,
            "generator": self.generator.get_state(),
            "acting_generator": self.acting.get_state(),
            "torch_rng": torch.get_rng_state(),
            "python_rng": json.dumps(random.getstate()),
            "numpy_rng": json.dumps([numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]]),
        }

    def _anew(self, step: int, number: int) -> list[int]:
        """Return seeds of this process for streams that begin at an environment step."""
        entropy = np.random.SeedSequence([self._seed, step, self._index])
        return entropy.generate_state(number, np.uint64).tolist()

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restore what `state_dict` returned at an environment step, of the processes together:
        "other_streams" holds those of the processes after the first. On another type of device,
        whose generators take no such state, `generator` starts anew and a warning says so; so do
        the streams of a process that was not there, without one."""
        others = state.get("other_streams", [])  # older checkpoints are of one process
        if self._index > len(others):
            generator, acting = self._anew(step, 2)
            self.generator.manual_seed(generator)
            self.acting.manual_seed(acting)
            self._load_global(state)
            return
        if self._index > 0:
            state = others[self._index - 1]
        device_type = self.generator.device.type
        if state["device_type"] == device_type:
            self.generator.set_state(state["generator"])
        else:
            entropy = np.random.SeedSequence([self._seed, step])
            self.generator.manual_seed(int(entropy.generate_state(1)[0]))
            warnings.warn(
                f"the checkpoint was written on {state['device_type']!r}: on {device_type!r} "
                f"training continues with new random numbers",
                stacklevel=5,
            )
        self.acting.set_state(state["acting_generator"])
        self._load_global(state)

    def _load_global(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch_rng"])
        version, internal, gauss = json.loads(state["python_rng"])
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = json.loads(state["numpy_rng"])
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
