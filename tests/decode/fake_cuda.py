"""A GPU made of CPU tensors: every tensor reports that device, and what captures, replays and late reads rely on
holds.

Streams are per device, and an op runs on the current stream of its tensors' device. A capture records what its stream
is given, and does none of it. A pool counts the graphs in it; one that none is left in cannot be captured into while a
block of it lives. cuBLAS makes a workspace at a stream's first product and keeps it. A copy into pinned memory arrives
when a later event of its stream is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "firp.linear")
UNWRITTEN = -77


class Stream:
    def __init__(self, cuda: FakeCuda, device: int) -> None:
        self.cuda, self.index = cuda, device
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []

    def wait_stream(self, other: Stream) -> None:
        """Nothing to do: ops are done in the order of their launch."""


class Event:
    """Marks what its stream had been given when it was recorded."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.stream = self.cuda.current_stream()
        self.before = list(self.stream.queue)

    def synchronize(self) -> None:
        for copy in self.before:
            target, value = copy
            with self.cuda.quiet():
                target.copy_(value)
            self.stream.queue = [other for other in self.stream.queue if other is not copy]


class Pool:
    """Memory of graphs: how many use it, the storages made in it, and whether a workspace lies in it for good."""

    def __init__(self) -> None:
        self.use_count = 0
        self.storages: list[StorageWeakRef] = []
        self.holds_workspace = False

    @property
    def lives(self) -> bool:
        return self.holds_workspace or any(not storage.expired() for storage in self.storages)


class Graph:
    """Ops over tensors, done again by `replay`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.ops: list[tuple] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.own: set[int] = set()

    def begin(self, pool: int | None, stream: Stream) -> None:
        handle = self.cuda.graph_pool_handle() if pool is None else pool
        if handle not in self.cuda.pools:
            self.cuda.pools[handle] = Pool()
        elif self.cuda.pools[handle].use_count == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.pool = self.cuda.pools[handle]
        self.pool.use_count += 1
        weakref.finalize(self, _leave, self.pool)
        self.cuda.capturing[stream] = self

    def end(self, stream: Stream) -> None:
        del self.cuda.capturing[stream]
        for tensor, value in self.before.values():
            tensor.copy_(value)
        self.before.clear()

    def add(self, func, args: tuple, kwargs: dict) -> object:
        """Record one op. What it writes to is put back at the end: a capture does nothing."""
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    key = tensor.untyped_storage()._cdata
                    if key not in self.own and key not in self.before:
                        whole = tensor.new_empty(0).set_(tensor.untyped_storage())
                        self.before[key] = whole, whole.clone()
        # By address: a tensor may get other storage later.
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in known:
                self.own.add(tensor.untyped_storage()._cdata)
                self.pool.storages.append(StorageWeakRef(tensor.untyped_storage()))
        return out

    def replay(self) -> None:
        with self.cuda.quiet():
            for func, args, kwargs, out in self.ops:
                if func.is_view:
                    continue
                for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _leave(pool: Pool) -> None:
    pool.use_count -= 1


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class FakeCuda:
    """Two GPUs, of which all tensors are on one.

    Args:
        monkeypatch: of the test.
        device: index of the GPU that holds the tensors; GPU 0 is the current one.
    """

    def __init__(self, monkeypatch, device: int = 0) -> None:
        self.device = torch.device("cuda", device)
        self.current_device = 0
        self.streams = {index: Stream(self, index) for index in (0, 1)}
        self.made = 0
        self.pools: dict[int, Pool] = {}
        self.workspaces: set[Stream] = set()
        self.capturing: dict[Stream, Graph] = {}
        self.pinned: set[int] = set()  # Addresses.
        self._handles = itertools.count(1)
        self._default_capture_stream: Stream | None = None
        self._quiet = False
        for name, value in {
            "Stream": self._stream, "stream": self.use_stream, "current_stream": self.current_stream,
            "device": self.use_device, "CUDAGraph": lambda: Graph(self), "graph": self.capture,
            "graph_pool_handle": self.graph_pool_handle, "Event": lambda: Event(self),
            "mem_get_info": lambda device: (1 << 40, 1 << 40), "memory_reserved": lambda device: 0,
            "memory_allocated": lambda device: 0, "get_device_capability": lambda device: (9, 0),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("firp.decoder.model_check._check_modes", lambda device: None)
        monkeypatch.setattr("firp_kernels.registry._owners", _Served())

    def _stream(self, device: torch.device | None = None) -> Stream:
        self.made += 1
        return Stream(self, self.current_device if device is None else device.index)

    def current_stream(self) -> Stream:
        return self.streams[self.current_device]

    def graph_pool_handle(self) -> int:
        return next(self._handles)

    @contextlib.contextmanager
    def use_device(self, device: torch.device):
        before, self.current_device = self.current_device, device.index
        yield
        self.current_device = before

    @contextlib.contextmanager
    def use_stream(self, stream: Stream):
        device, before = self.current_device, self.streams[stream.index]
        self.current_device, self.streams[stream.index] = stream.index, stream
        yield
        self.current_device, self.streams[stream.index] = device, before

    @contextlib.contextmanager
    def capture(
        self, graph: Graph, pool: int | None = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ):
        if stream is None:
            self._default_capture_stream = stream = self._default_capture_stream or self._stream()
        self.empty_cache()
        with self.use_stream(stream):
            graph.begin(pool, stream)
            yield
            with self.quiet():
                graph.end(stream)

    def keep_pinned(self, tensor: torch.Tensor) -> None:
        address = tensor.data_ptr()
        self.pinned.add(address)
        weakref.finalize(tensor, self.pinned.discard, address)

    def empty_cache(self) -> None:
        """Pools without a graph or a block are gone, their handles as good as new."""
        self.pools = {handle: pool for handle, pool in self.pools.items() if pool.use_count or pool.lives}

    @contextlib.contextmanager
    def quiet(self):
        before, self._quiet = self._quiet, True
        yield
        self._quiet = before

    def launch(self, func, args: tuple, kwargs: dict) -> object:
        """One op on the current stream of the tensors' device."""
        if self._quiet:
            return func(*args, **kwargs)
        stream = self.streams[self.device.index]
        graph = self.capturing.get(stream)
        if str(func).startswith(PRODUCTS) and stream not in self.workspaces:
            self.workspaces.add(stream)
            if graph is not None:
                graph.pool.holds_workspace = True
        if func is torch.ops.aten.copy_.default and args[0].data_ptr() in self.pinned:
            stream.queue.append((args[0], args[1].clone()))
            return args[0]
        return func(*args, **kwargs) if graph is None else graph.add(func, args, kwargs)

    @contextlib.contextmanager
    def tensors(self):
        """Every tensor lies on the GPU, and every op is one of its streams'."""
        with _Devices(self), _Launches(self):
            yield


class _Served(dict):
    """Every op has a kernel."""

    def __missing__(self, key: tuple[str, str]) -> str:
        return "extension"


class _Devices(TorchFunctionMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.cuda.device
        if func == torch.Tensor.is_cuda.__get__:
            return True
        pinned = kwargs.pop("pin_memory", False)
        out = func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})
        if pinned:
            self.cuda.keep_pinned(out.fill_(UNWRITTEN))
        return out


def _on_cpu(value: object) -> object:
    return torch.device("cpu") if isinstance(value, torch.device) else value


class _Launches(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.cuda.launch(func, args, kwargs or {})
