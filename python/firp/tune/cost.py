"""What a decode step costs: the one way this package measures it."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch

from firp.engine import Engine
from firp.hardware import synchronize
from firp.state import DecodeState

WARMUP_STEPS = 3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one decode step: median, least and most over interleaved repeats, each a mean over several steps."""

    seconds: float
    low: float
    high: float


def start_at(engine: Engine, context: int, batch_size: int, num_steps: int) -> DecodeState:
    """A run whose B sequences hold `context` random tokens each, with room for `num_steps` steps that never stop.

    Raises:
        ValueError: context or batch size below 1, or more tokens than the model's context holds.
    """
    for name, value in (("context", context), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    config = engine.model.config
    room = num_steps * (engine.num_offsets + 1)
    if context + room > config.max_position_embeddings:
        raise ValueError(
            f"context: got {context}, which with {room} tokens of {num_steps} measured steps exceeds the model's "
            f"context of {config.max_position_embeddings}"
        )
    random = torch.Generator().manual_seed(context)
    prompts = list(torch.randint(config.vocab_size, (batch_size, context), generator=random))
    return engine.start(prompts, max_new_tokens=room, stop_tokens=[])


def measure_steps(
    engines: dict[Key, Engine], context: int, batch_size: int = 1, steps: int = 8, repeats: int = 3
) -> dict[Key, StepTime]:
    """Time decode steps of several engines in rotating order, so that all meet the same moments of the machine.

    The context is prefilled with random tokens; what a step costs depends on shapes, not on which tokens there are. The
    steps before the first timed ones cover the root-only tree, captures and caches.

    Raises:
        ValueError: as `start_at`; steps or repeats below 1.
    """
    for name, value in (("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    states = {}
    for key, engine in engines.items():
        states[key] = start_at(engine, context, batch_size, WARMUP_STEPS + steps * repeats)
        for _ in range(WARMUP_STEPS):
            engine.step(states[key])
    keys, seconds = list(engines), {key: [] for key in engines}
    for repeat in range(repeats):
        shift = repeat % len(keys)
        for key in keys[shift:] + keys[:shift]:
            engine, state = engines[key], states[key]
            synchronize(engine.model.device)
            started = time.perf_counter()
            for _ in range(steps):
                engine.step(state)
            synchronize(engine.model.device)
            seconds[key].append((time.perf_counter() - started) / steps)
    return {key: StepTime(median(values), min(values), max(values)) for key, values in seconds.items()}
