"""Where the time of a run goes, and what a server may watch step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class TimeSplit:
    """Seconds of one `generate` call.

    Attributes:
        prefill: prompts through the model.
        steps: in the engine: forwards, processors, verification, drafting, and waiting for their results.
        host: handing tokens over: stopping criteria, streamer, callback, bookkeeping.
    """

    prefill: float = 0.0
    steps: float = 0.0
    host: float = 0.0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to the named part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - started)

    @property
    def total(self) -> float:
        return self.prefill + self.steps + self.host


@dataclass(frozen=True)
class StepEvent:
    """What `on_step` is called with after every decode step.

    Attributes:
        step: number of the step, from 0; the steps of a batch count once.
        tokens: index in the caller's batch -> new tokens of that sequence, for sequences that got any.
        ended: indices of the sequences that ended with this step.
        seconds: since the call began, prefill included.
    """

    step: int
    tokens: dict[int, list[int]]
    ended: list[int]
    seconds: float
