"""What a decode step costs after a real prompt, for `firp tune` and `firp bench`; they have the time that an engine's
first use (`firp.engine.costs`) does not have."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from firp.engine.engine import Engine
from firp.engine.state import DecodeState
from firp.tools.hardware import synchronize

WARMUP_STEPS = 3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one decode step in each interleaved repeat, every one a mean over several steps."""

    repeats: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return median(self.repeats)

    def relative_to(self, other: StepTime) -> tuple[float, float, float]:
        """Median, least and most of this time over the other's, repeat by repeat."""
        ratios = [own / base for own, base in zip(self.repeats, other.repeats, strict=True)]
        return median(ratios), min(ratios), max(ratios)


def num_steps(steps: int, repeats: int) -> int:
    """Steps that `measure_steps` takes with each engine."""
    return WARMUP_STEPS + steps * repeats


def check_context(model: PreTrainedModel, context: int, num_offsets: int, num_steps: int) -> int:
    """Tokens that `num_steps` steps may add to a context of `context` tokens.

    Raises:
        ValueError: a context below 1, or more tokens than the model's context holds.
    """
    if context < 1:
        raise ValueError(f"context: got {context}, expected at least 1")
    room, limit = num_steps * (num_offsets + 1), model.config.max_position_embeddings
    if context + room > limit:
        raise ValueError(
            f"context: got {context}, which with the {room} tokens that {num_steps} measured steps may add exceeds the "
            f"model's context of {limit}"
        )
    return room


def start_at(engine: Engine, context: int, batch_size: int, num_steps: int) -> DecodeState:
    """A run whose B sequences hold `context` random tokens each, with room for `num_steps` steps that never stop."""
    room = check_context(engine.model, context, engine.num_offsets, num_steps)
    random = torch.Generator().manual_seed(context)
    prompts = list(torch.randint(engine.model.config.vocab_size, (batch_size, context), generator=random))
    return engine.start(prompts, max_new_tokens=room, stop_tokens=[])


def measure_steps(
    engines: dict[Key, Engine], context: int, batch_size: int = 1, steps: int = 8, repeats: int = 3
) -> dict[Key, StepTime]:
    """Time decode steps of several engines in rotating order, so that all meet the same moments of the machine.

    The context is prefilled with random tokens; what a step costs depends on shapes, not on which tokens there are. The
    steps before the first timed ones cover the root-only tree, captures and caches.

    Raises:
        ValueError: as `check_context`; batch_size, steps or repeats below 1.
    """
    for name, value in (("batch_size", batch_size), ("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    states = {}
    for key, engine in engines.items():
        states[key] = start_at(engine, context, batch_size, num_steps(steps, repeats))
        for _ in range(WARMUP_STEPS):
            engine.step(states[key])
    keys = list(engines)
    seconds: dict[Key, list[float]] = {key: [] for key in engines}
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
    return {key: StepTime(tuple(values)) for key, values in seconds.items()}
