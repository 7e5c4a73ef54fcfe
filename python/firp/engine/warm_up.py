"""Work done ahead of the first request: everything that a GPU replays later is captured, and what it runs is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from firp.engine.buffers import SMALLEST_BUCKET
from firp.engine.graphs import StepRunner
from firp.engine.prefill import padded_length

if TYPE_CHECKING:
    from firp.engine.engine import Engine


def warm_up(engine: Engine, runner: StepRunner, batch_size: int, max_len: int) -> None:
    """Pass prompts of every padded length, and take steps over every bucket of the cache.

    Args:
        max_len: tokens that prompt and output may hold together.
    """
    state = engine.start([torch.zeros(1, dtype=torch.int64)] * batch_size, max_len - 1, [])
    if engine.captures:
        for length in sorted({padded_length(length) for length in range(1, max_len)}):
            prompt = torch.zeros(min(length, max_len - 1), dtype=torch.int64)
            runner.prefill(engine, state.buffers, [prompt] * batch_size, None)
    for slots in sorted(
        {state.buffers.bucket(slots) for slots in range(1, max_len + engine.max_rows, SMALLEST_BUCKET)}
    ):
        state.use_slots(slots)
        for _ in range(2):  # The first tree is the root alone.
            engine.step(state)
    engine.release(state)
