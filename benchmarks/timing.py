"""Clocks: what a call takes on a CPU or a GPU, and the rates the machine reaches in the same run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.case import Call

CACHE_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
ASSUMED_CPU_CACHE = 32 << 20
MAX_SETS = 64
MEMORY = {"cpu": 1 << 30, "cuda": 16 << 30}
PASS_SECONDS = 0.02
GRAPH_CALLS = 32
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
RATE_TRIES, RATE_SECONDS = 5, 1.0


@dataclass
class Timed:
    """The same work on several sets of buffers: one call per set."""

    calls: list[Call]
    scope: Callable[[], AbstractContextManager]
    capturable: bool = True


def cache_bytes(device: str) -> int:
    """The last-level cache: L2 of the GPU, L3 of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    try:
        return int(CACHE_FILE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return ASSUMED_CPU_CACHE


def num_sets(device: str, moved: int, held: int) -> int:
    """Sets of buffers to rotate over, so that together they move more than twice the cache, within memory's limits."""
    wanted = 2 * cache_bytes(device) // max(moved, 1) + 1
    return max(1, min(max(wanted, 2), MAX_SETS, MEMORY[device] // max(held, 1)))


def start(device: str, timed: Timed, reset: Callable[[], None] | None) -> Callable[[], float]:
    """Warm up, and return a pass over the calls that gives microseconds per call."""
    return _start_graph(timed, reset) if device == "cuda" and timed.capturable else _start_wall(timed, reset)


def interleave(
    passes: dict[str, Callable[[], float]], repeats: int, reset: Callable[[], None] | None
) -> dict[str, list[float]]:
    """Microseconds per call of each contender, one figure per repeat; repeats are interleaved in rotating order."""
    samples: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            if reset is not None:
                reset()
            samples[name].append(passes[name]())
    return samples


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _start_wall(timed: Timed, reset: Callable[[], None] | None) -> Callable[[], float]:
    """A pass by the host's clock over as many calls as fill PASS_SECONDS; sets go round across passes."""

    def run(count: int) -> float:
        chosen = list(itertools.islice(rotation, count))
        _synchronize()
        begin = time.perf_counter()
        for call in chosen:
            call()
        _synchronize()
        return (time.perf_counter() - begin) * 1e6 / count

    rotation = itertools.cycle(timed.calls)
    with timed.scope():
        for _ in range(2):
            if reset is not None:
                reset()
            warm = run(len(timed.calls))
    count = max(1, min(len(timed.calls), int(PASS_SECONDS * 1e6 / max(warm, 1e-3))))

    def one_pass() -> float:
        with timed.scope():
            return run(count)

    return one_pass


def _start_graph(timed: Timed, reset: Callable[[], None] | None) -> Callable[[], float]:
    """A pass that replays a CUDA graph of the calls between two events."""
    calls = timed.calls
    if reset is None:
        calls = calls * -(-GRAPH_CALLS // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), timed.scope():
        for call in timed.calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    if reset is not None:
        reset()
    graph = torch.cuda.CUDAGraph()
    with timed.scope(), torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def one_pass() -> float:
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / len(calls)

    if reset is not None:
        reset()
    one_pass()
    return one_pass


class Rates:
    """The fastest copy and matrix product seen on a device in this run."""

    def __init__(self, device: str):
        self.device = device
        source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / self._fastest(lambda: target.copy_(source))
        self._matmul: dict[torch.dtype, float] = {}

    def _fastest(self, call: Call) -> float:
        """Seconds of the fastest of some tries, of which the last starts within a second."""
        call()
        seconds: list[float] = []
        while len(seconds) < RATE_TRIES and sum(seconds) < RATE_SECONDS:
            _synchronize()
            begin = time.perf_counter()
            call()
            _synchronize()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    def matmul(self, dtype: torch.dtype) -> float:
        """Operations per second of a large product in `dtype`, two per multiply-add."""
        if dtype not in self._matmul:
            size = MATMUL_SIZE[self.device]
            left = torch.ones(size, size, dtype=dtype, device=self.device)
            self._matmul[dtype] = 2 * size**3 / self._fastest(lambda: left @ left)
        return self._matmul[dtype]

    def floor(self, num_bytes: int, operations: int, dtype: torch.dtype) -> float:
        """Microseconds below which no implementation can go: max(bytes / bandwidth, operations / matmul rate)."""
        return 1e6 * max(num_bytes / self.bandwidth, operations / self.matmul(dtype) if operations else 0.0)

    def document(self) -> dict:
        matmul = {str(dtype).removeprefix("torch."): rate for dtype, rate in self._matmul.items()}
        return {"copy_bytes_per_second": self.bandwidth, "matmul_operations_per_second": matmul}
