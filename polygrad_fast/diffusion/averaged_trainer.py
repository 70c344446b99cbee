"""Adam on a network, and the average of its weights that is used."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polygrad_fast.denoisers.explicit import explicit_passes, is_as_built
from polygrad_fast.diffusion.flat_weights import FlatWeights
from polygrad_fast.errors import InputError
from polygrad_fast.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class AveragedTrainer:
    """Minimize losses of a network by Adam and keep an exponential moving average of its weights.

    The average is overwritten instead of moved for the first `ema_start` updates, and touched every
    `ema_interval` updates only (paper, appendix A: decay 0.99, every 10, from 2000 on).

    Weights, gradients, moments and averages lie side by side in memory, so that Adam and the
    average are one call each. Networks of this library are differentiated by passes that are
    written out, unless they were changed or are watched by hooks.

    Where several processes train, gradients are averaged over them, and what the network notes on
    windows is merged, so that all hold the same: its modules name these buffers, with the value
    that counts (`Ranks.merge_`), as `noted`.

    Args:
        model: the network; its weights change in place.
        learning_rate, ema_decay, ema_interval, ema_start: as in `DenoiserConfig`.
        average_at_start: whether the average is touched after update 1, interval + 1, ..
            (PolyGRAD's released code) or after update interval, 2 interval, .. (that of
            policy-guided diffusion).
        train_dtype: as in `DenoiserConfig`; the weights stay in their own dtype.
        num_train_timesteps: K, if the network is a denoiser.

    Raises:
        InputError: the network cannot be copied.

    Attributes:
        model: the network being trained.
        ema_model: its averaged copy.
        num_updates: how often `minimize` has been called.
        ranks: the processes over whose losses the gradient is averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        ema_decay: float,
        ema_interval: int = 1,
        ema_start: int = 0,
        average_at_start: bool = True,
        train_dtype: str = "float32",
        num_train_timesteps: int = 1,
    ):
        self.model = model
        try:
            self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} cannot be copied for its average: {error}"
            ) from error
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._weights = FlatWeights(map(model.get_parameter, trained))
        self._averages = FlatWeights(map(self.ema_model.get_parameter, trained))
        # what training does not change, but others may: frozen weights, running statistics
        kept = [name for name, p in model.named_parameters() if not p.requires_grad]
        self._copied = [
            *((self.ema_model.get_parameter(n), model.get_parameter(n)) for n in kept),
            *zip(self.ema_model.buffers(), model.buffers(), strict=True),
        ]
        self._noted = [
            (module.get_buffer(name), which)
            for module in model.modules()
            for name, which in getattr(module, "noted", {}).items()
        ]
        buffers = self._weights.buffers
        for buffer in buffers:
            buffer.grad = torch.zeros_like(buffer)
        self._gradients = self._weights.views([buffer.grad for buffer in buffers])
        self._device = buffers[0].device
        on_gpu = self._device.type == "cuda"
        self.optimizer = torch.optim.Adam(buffers, lr=learning_rate, fused=True, capturable=on_gpu)
        # of the products; "float32" leaves a network of another dtype as it is
        self._rounds = train_dtype != "float32"
        self._dtype = getattr(torch, train_dtype) if self._rounds else buffers[0].dtype
        self._explicit = explicit_passes(model, num_train_timesteps, self._dtype)
        self._passes = None  # those that the next loss comes from
        self.num_updates = 0
        self.ranks = Ranks()
        self._ema_decay, self._ema_interval, self._ema_start = ema_decay, ema_interval, ema_start
        self._ema_phase = 0 if average_at_start else ema_interval - 1

    @contextlib.contextmanager
    def network(self) -> Iterator[Callable[..., Any]]:
        """Give what evaluates `model` for the next loss, within the block: its written-out passes,
        or itself, under autocast where the products are of another dtype than the weights."""
        self._passes = self._explicit if self._explicit and is_as_built(self.model) else None
        if self._passes is not None:
            yield self._passes
        elif self._rounds:
            # the cache would keep tensors of a captured graph
            with torch.autocast(self._device.type, self._dtype, cache_enabled=False):
                yield self.model
        else:
            yield self.model

    def minimize(self, loss: Tensor) -> None:
        """Take one Adam step on a scalar loss of `model`, then move the average if it is due."""
        passes, self._passes = self._passes, None
        for parameter, gradient in zip(self._weights.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        if passes is None:
            for buffer in self._weights.buffers:
                buffer.grad.zero_()
        loss.backward()
        if passes is not None:
            passes.backward()
        self.ranks.average_([buffer.grad for buffer in self._weights.buffers])
        self.ranks.merge_(self._noted)
        self.optimizer.step()
        (share,) = self.averaging(1)
        if share is not None:
            self._move_average(share)
        self.num_updates += 1

    def averaging(self, count: int) -> tuple[float | None, ...]:
        """Return by which share of the way each of the next updates moves the average; None: it
        does not. Besides the network's structure, all that an update is told by the host."""
        return tuple(
            None
            if update % self._ema_interval != self._ema_phase
            else 1.0 - (self._ema_decay if update >= self._ema_start else 0.0)
            for update in range(self.num_updates, self.num_updates + count)
        )

    @property
    def can_be_captured(self) -> bool:
        """Whether an update may be captured in a CUDA graph: where the network is this library's,
        as built, and trains in this process alone. What another does is not known, nor whether a
        graph can hold its exchange with other processes."""
        alone = self.ranks.number == 1
        return self._device.type == "cuda" and alone and is_as_built(self.model)

    @torch.no_grad()
    def _move_average(self, share: float) -> None:
        buffers = self._averages.buffers, self._weights.buffers
        for average, weights in zip(*buffers, strict=True):
            average.lerp_(weights, share)
        for copied, source in self._copied:
            copied.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer state and counter; the weights are saved with the other weights.

        The optimizer's is what `torch.optim.Adam` on the single parameters would have.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        state: dict[int, dict[str, Tensor]] = {}
        for number, buffer in enumerate(self._weights.buffers):
            entry = self.optimizer.state.get(buffer)
            for i in self._weights.indices(number) if entry else ():
                state[i] = {"step": entry["step"].clone()}
        moments = self._moments() if state else {}
        for name, views in moments.items():
            for i, view in enumerate(views):
                state[i][name] = view
        groups[0]["params"] = list(range(len(self._weights.parameters)))
        optimizer = {"state": state, "param_groups": groups}
        return {"optimizer": optimizer, "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        saved = state["optimizer"]
        own = self.optimizer.state_dict()
        own["param_groups"][0]["lr"] = saved["param_groups"][0]["lr"]
        entries = saved["state"]
        own["state"] = {
            number: {"step": entries[self._weights.indices(number)[0]]["step"]}
            | {name: torch.zeros_like(buffer) for name in MOMENTS}
            for number, buffer in enumerate(self._weights.buffers)
            if entries
        }
        self.optimizer.load_state_dict(own)
        for name, views in (self._moments() if entries else {}).items():
            for i, view in enumerate(views):
                view.copy_(entries[i][name])
        self.num_updates = state["num_updates"]

    def _moments(self) -> dict[str, list[Tensor]]:
        """Return each parameter's part of Adam's moments, by their names."""
        states = [self.optimizer.state[buffer] for buffer in self._weights.buffers]
        return {name: self._weights.views([s[name] for s in states]) for name in MOMENTS}
