"""A step's record on its way to the host: one small copy, read when the host has time for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from firp.decoder.modes import current
from firp.engine.state import StepRecord


@dataclass(frozen=True)
class HostRecord:
    """What a step emitted, as the host reads it: the fields of `StepRecord` as lists, one entry per sequence."""

    tokens: list[list[int]]
    counts: list[int]
    finished: list[bool]
    status: list[int]


class PendingRecord:
    """One step's record. On a GPU the copy into pinned memory is queued at once and waited for by `read`.

    Args:
        record: of the step just launched. A graph overwrites it at its next replay, which the copy precedes.
    """

    def __init__(self, record: StepRecord) -> None:
        self._record = record
        if record.packed is not None:
            with current(record.packed.device):
                self._pinned = torch.empty(record.packed.shape, dtype=torch.int64, pin_memory=True)
                self._pinned.copy_(record.packed, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()

    def read(self) -> HostRecord:
        if self._record.packed is None:
            fields = ("tokens", "counts", "finished", "status")
            return HostRecord(*(getattr(self._record, name).tolist() for name in fields))
        self._copied.synchronize()
        rows = self._pinned.tolist()
        return HostRecord(
            tokens=[row[:-3] for row in rows],
            counts=[row[-3] for row in rows],
            finished=[bool(row[-2]) for row in rows],
            status=[row[-1] for row in rows],
        )
