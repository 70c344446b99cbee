"""A CUDA device on a machine without one: code runs on "cuda" with real values, on the CPU.

    with fake_cuda.installed() as gpu:
        module = Module().to("cuda")
        with gpu.without_syncs() as launches:  # .item(), bool(tensor), copies to the host: HostSync
            module.update(...)
        assert launches.total() < 40

Tensors on "cuda" say so (`cuda:0`), refuse to meet tensors of the CPU, and count every operator
launched on them. A captured CUDA graph keeps the operators that ran during its capture, with the
tensors they ran on (whose former values come back at its end), and a replay runs them again: a
number that Python computed during the capture stays what it was, a weight is read anew at its old
address. What a capture forbids raises. Triton kernels run in the interpreter, as on a CPU, or are
counted only.

Not imitated: what differs in PyTorch's own operators between the devices (an operator is one
launch; its numbers and what it is made of are the CPU's), streams (everything runs in order), and
memory used again within a graph.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
# Operators whose results' shapes or values the host waits for.
SYNCHRONIZING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten.equal.default,
    aten._linalg_check_errors.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
NOT_LAUNCHED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
TOLD = {  # of a tensor on the device
    Tensor.device.__get__: DEVICE,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.get_device: DEVICE.index,
    Tensor.record_stream: None,
}
READ_BY_HOST = {Tensor.tolist, Tensor.__reduce_ex__}


class HostSync(RuntimeError):
    """Code waited for the device, or copied between it and the host, where it must not."""


class Storages:
    """A set of tensors' memory."""

    def __init__(self):
        self._alive: dict[int, StorageWeakRef] = {}
        self._purge_at = 1024

    def add(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._alive[reference.cdata] = reference  # which keeps the number from another storage
        if len(self._alive) > self._purge_at:
            self._alive = {k: ref for k, ref in self._alive.items() if not ref.expired()}
            self._purge_at = 2 * len(self._alive) + 1024

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._alive


class Graph:
    """What ran during one capture, to be run again."""

    def __init__(self):
        self.operations: list[Callable[[], None]] = []
        self.launches: collections.Counter[str] = collections.Counter()
        self.generators: dict[int, torch.Generator] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        """Allow a generator of one's own in the capture."""
        self.generators[id(generator)] = generator

    def note_written(self, func: Callable, args: tuple, kwargs: dict) -> None:
        """Keep what an operator is going to write over."""
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(given):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before:
                    self._before[storage._cdata] = storage, storage.clone()

    def undo(self) -> None:
        """Write back what was before the capture, which on a GPU computes nothing."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """Run every operation on the tensors it was captured with."""
        for operation in self.operations:
            operation()

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()


class FakeCuda:
    """The device: which tensors lie on it, what was launched, where the host waited.

    Attributes:
        launches: operators and kernels by name. A replay of a graph is one.
        syncs: what the host waited for, where that was not forbidden.
        graphs: captured so far; each has the `launches` of one replay.
    """

    def __init__(self):
        self.launches: collections.Counter[str] = collections.Counter()
        self.syncs: collections.Counter[str] = collections.Counter()
        self.graphs: list[Graph] = []
        self.forbids_syncs = False
        self.capturing: Graph | None = None
        self.sets_number = False  # x[..] = 1.0: on a GPU a launch with the number
        self.memory, self.pinned = Storages(), Storages()

    @contextlib.contextmanager
    def without_syncs(self) -> Iterator[collections.Counter[str]]:
        """Raise HostSync where the host waits for the device or copies from or to it; yield the
        launches in the block, filled at its end."""
        before, forbade = self.launches.copy(), self.forbids_syncs
        counted: collections.Counter[str] = collections.Counter()
        self.forbids_syncs = True
        try:
            yield counted
        finally:
            self.forbids_syncs = forbade
            counted.update(self.launches - before)

    def holds(self, value: Any) -> bool:
        """Whether this is a tensor on the device."""
        return isinstance(value, Tensor) and value in self.memory

    def sync(self, name: str) -> None:
        """Note that the host waits."""
        if self.capturing is not None:
            raise HostSync(f"{name} during the capture of a CUDA graph")
        if self.forbids_syncs:
            raise HostSync(f"{name} makes the host wait for the device")
        self.syncs[name] += 1

    def launch(self, name: str, again: Callable[[], None]) -> None:
        """Count what was launched; `again` launches it once more, in replays."""
        self.launches[name] += 1
        if self.capturing is not None:
            self.capturing.launches[name] += 1
            self.capturing.operations.append(again)

    def launch_operator(
        self, name: str, func: Callable, args: tuple, kwargs: dict, result: Any
    ) -> None:
        """Count an operator that has run; in replays its results get their new values."""
        if name in NOT_LAUNCHED:
            return
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = _tensors(result)

        def again() -> None:
            for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata not in given:
                    old.copy_(new)

        self.launch(name, again)

    @contextlib.contextmanager
    def capture(self, graph: Graph, *args, **kwargs) -> Iterator[None]:
        """Stand for `torch.cuda.graph`."""
        if self.capturing is not None:
            raise RuntimeError("a CUDA graph is being captured already")
        self.capturing = graph
        self.graphs.append(graph)
        states = [(generator, generator.get_state()) for generator in graph.generators.values()]
        states.append((torch.default_generator, torch.default_generator.get_state()))
        try:
            yield
        finally:
            self.capturing = None
            graph.undo()
            for generator, state in states:
                generator.set_state(state)

    def check_host_copy(self, host: Tensor, non_blocking: bool, name: str) -> None:
        """Note that the host waits, unless it need not: copies of pinned memory may go on."""
        if not (non_blocking and host in self.pinned):
            self.sync(f"{name} between pageable memory and the device")

    def check_generator(self, generator: torch.Generator | None) -> None:
        """Raise RuntimeError where the device cannot draw from it."""
        if generator is None:
            return
        if generator.device != DEVICE:
            raise RuntimeError(f"expected a generator on {DEVICE}, got one on {generator.device}")
        if self.capturing is not None and id(generator) not in self.capturing.generators:
            raise RuntimeError("a generator in a capture must be registered with the graph")


class Operators(TorchDispatchMode):
    """Checks and counts what runs on the device."""

    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        with torch._C.DisableTorchFunction():
            if not any(tensor in self.gpu.memory for tensor in tensors):
                return func(*args, **kwargs)
            name = func._schema.name.split("::")[1]
            self._check(func, name, tensors, args, kwargs)
            if self.gpu.capturing is not None:
                self.gpu.capturing.note_written(func, args, kwargs)
            result = func(*args, **kwargs)
            copied_to_host = func is aten.copy_.default and args[0] not in self.gpu.memory
            if not copied_to_host:
                for tensor in _tensors(result):
                    self.gpu.memory.add(tensor)
            if not _is_view(func):
                self.gpu.launch_operator(name, func, args, kwargs, result)
            return result

    def _check(self, func, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> None:
        gpu = self.gpu
        on_host = [t for t in tensors if t not in gpu.memory and t.dim() > 0]
        if func is aten.copy_.default:
            filled = gpu.sets_number and args[1].dim() == 0
            if not (args[0] in gpu.memory and (args[1] in gpu.memory or filled)):
                host = args[1] if args[0] in gpu.memory else args[0]
                gpu.check_host_copy(host, len(args) > 2 and args[2], name)
        elif func in INDEXING:
            fills = len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8) and not fills:
                    gpu.sync(f"{name} with a mask")
            if on_host:
                gpu.sync(f"{name} at indices on the host")
        elif on_host:
            raise RuntimeError(
                f"{name}: expected all tensors on {DEVICE}, got one of shape "
                f"{tuple(on_host[0].shape)} on the host"
            )
        gpu.check_generator(kwargs.get("generator"))
        if func in SYNCHRONIZING:
            gpu.sync(name)


class Functions(TorchFunctionMode):
    """Gives functions that take or tell a device their meaning."""

    def __init__(self, gpu: FakeCuda):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs = self.gpu, dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        if func is Tensor.pin_memory or kwargs.pop("pin_memory", False):
            pinned = func(*args, **kwargs) if func is not Tensor.pin_memory else args[0].clone()
            gpu.pinned.add(pinned)
            return pinned
        if func is Tensor.is_pinned:
            return args[0] in gpu.pinned
        if args and gpu.holds(args[0]):
            if func in TOLD:
                return TOLD[func]
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert a cuda:0 device type tensor to numpy")
            if func in READ_BY_HOST:
                gpu.sync(func.__name__)
            if func is Tensor.__deepcopy__:
                copied = func(*args, **kwargs)
                gpu.memory.add(copied)
                return copied
            if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
                gpu.sets_number = True
                try:
                    return func(*args)
                finally:
                    gpu.sets_number = False
        if kwargs.get("device") is None or not _is_cuda(kwargs["device"]):
            return func(*args, **kwargs)
        return self._made(func, args, kwargs)

    def _made(self, func, args: tuple, kwargs: dict):
        """Run a function that makes a tensor on the device."""
        gpu = self.gpu
        kwargs["device"] = "cpu"
        gpu.check_generator(kwargs.get("generator"))
        if func in (torch.tensor, torch.as_tensor) and not gpu.holds(args[0]):
            gpu.sync(f"{func.__name__} of numbers on the host")
        made = func(*args, **kwargs)
        if made not in gpu.memory:
            gpu.memory.add(made)
            detached = {**kwargs, "requires_grad": False} if "requires_grad" in kwargs else kwargs
            gpu.launch_operator(func.__name__, func, args, detached, made.detach())
        return made

    def _moved(self, func, tensor: Tensor, *args, **kwargs) -> Tensor:
        """Run `Tensor.to`, `cuda` or `cpu`."""
        moved = {"device": None, "dtype": None, "non_blocking": False, "copy": False, **kwargs}
        if func is Tensor.cuda:
            moved["device"] = DEVICE
        elif func is Tensor.cpu:
            moved["device"] = HOST
        else:
            if args and isinstance(args[0], Tensor):  # the device and dtype of another
                device = DEVICE if self.gpu.holds(args[0]) else HOST
                args = (device, args[0].dtype, *args[1:])
            names = ["device", "dtype", "non_blocking", "copy"]
            if args and isinstance(args[0], torch.dtype):
                names.remove("device")
            moved.update(zip(names, args, strict=False))
        device, non_blocking = moved.pop("device"), moved.pop("non_blocking")
        if device is not None and _is_cuda(device) != self.gpu.holds(tensor):
            with _disable_current_modes():
                copied = tensor.clone()
            host = tensor if _is_cuda(device) else copied
            self.gpu.check_host_copy(host, non_blocking, f"{func.__name__}({device})")
            if _is_cuda(device):
                self.gpu.memory.add(copied)
            tensor = copied
        if moved["dtype"] is None:
            del moved["dtype"]
        return tensor.to(**moved) if "dtype" in moved or moved["copy"] else tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_cuda(device: str | torch.device | int) -> bool:
    device = torch.device(device)
    if device.type == "cuda" and device.index not in (None, DEVICE.index):
        raise RuntimeError(f"CUDA error: invalid device ordinal, got {device}")
    return device.type == "cuda"


def _is_view(func) -> bool:
    aliases: Iterable = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@contextlib.contextmanager
def installed(runs_kernels: bool = True) -> Iterator[FakeCuda]:
    """Give this process a CUDA device for the length of the block.

    Args:
        runs_kernels: whether Triton's kernels run, in the interpreter (where it is on), or are
            counted only, so that what they write stays as it was.
    """
    import fake_cuda_runtime

    gpu = FakeCuda()
    with fake_cuda_runtime.replaced(gpu, runs_kernels), Operators(gpu), Functions(gpu):
        yield gpu
