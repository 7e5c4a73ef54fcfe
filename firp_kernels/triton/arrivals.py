"""Counters of the programs that have come to a point of a launch: zeros in, zeros out.

Two launches that may run at the same time never share a counter. Launches of one stream follow each other, so they do.
A captured launch keeps counters of its own for ever, as its graph may be replayed beside anything; 4 bytes a tile.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SLAB = 1 << 18


class Arrivals:
    """The counters of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Two threads may capture at a time, and must not take the same counters.
        self._lock = threading.Lock()
        self._of_stream: dict[int, Tensor] = {}
        # Graphs hold addresses only: every slab stays.
        self._slabs = [self._zeros(0)]
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """`count` zeros or more, int32, which the launch must leave as zeros."""
        on_gpu = self.device.type == "cuda"
        with self._lock:
            if on_gpu and torch.cuda.is_current_stream_capturing():
                return self._take_for_graph(count)
            if on_gpu and len(self._slabs[-1]) - self._taken < SLAB // 2:
                self._add_slab()
            stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
            if stream not in self._of_stream or len(self._of_stream[stream]) < count:
                self._of_stream[stream] = self._zeros(count)
            return self._of_stream[stream]

    def _add_slab(self) -> None:
        slab = self._zeros(SLAB)
        # Replays on other streams do not wait for the one that fills it.
        torch.cuda.current_stream(self.device).synchronize()
        self._slabs.append(slab)
        self._taken = 0

    def _take_for_graph(self, count: int) -> Tensor:
        slab, first = self._slabs[-1], self._taken
        if len(slab) - first < count:  # Then every replay makes its zeros.
            return self._zeros(count)
        # A launch is specialised for pointers divisible by 16.
        self._taken += -(-count // 4) * 4
        return slab[first : first + count]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


_arrivals: dict[torch.device, Arrivals] = {}


def take_arrivals(count: int, device: torch.device) -> Tensor:
    """`count` zeros or more on `device`, int32, for one launch."""
    if device not in _arrivals:
        # The first of two threads stays: graphs may hold its addresses already.
        _arrivals.setdefault(device, Arrivals(device))
    return _arrivals[device].take(count)
