"""Decoding methods that `firp bench` runs side by side, each greedy, each on one prompt at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firp.bench.compiled import CompiledGenerate
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import TreeConfig
from firp.engine.engine import Engine
from firp.engine.state import DecodeStats
from firp.generation.generate import generate
from firp.generation.inputs import CACHES
from firp.tools.hardware import synchronize
from firp.tools.prompt_files import Prompt
from firp.tools.ranks import launched_ranks

PROMPT_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Run:
    """One prompt decoded by one method.

    Attributes:
        tokens: new tokens, the stop token included.
        seconds: the whole call, prefill included.
        counts: tokens that each decode step delivered.
    """

    tokens: list[int]
    seconds: float
    counts: list[int]

    @property
    def stats(self) -> DecodeStats:
        stats = DecodeStats()
        for count in self.counts:
            stats.add([count])
        return stats

    @property
    def deliveries(self) -> list[int]:
        """Tokens of each forward that delivered any: what prefill delivered, in Hugging Face, then `counts`."""
        by_prefill = len(self.tokens) - sum(self.counts)
        return [by_prefill, *self.counts] if by_prefill else self.counts


Method = Callable[[Tensor, int], Run]
R = TypeVar("R")


def _timed(decode: Callable[[], R], device: torch.device) -> tuple[R, float]:
    synchronize(device)
    started = time.perf_counter()
    out = decode()
    synchronize(device)
    return out, time.perf_counter() - started


def engine_method(engine: Engine) -> Method:
    """FIRP, or plain decoding, in this package's engine; capturing and compiling steps is not timed."""
    captured = 0

    def run(ids: Tensor, max_new_tokens: int) -> Run:
        nonlocal captured
        needed = ids.shape[1] + max_new_tokens
        if engine.captures and needed > captured:
            engine.warm_up(max_len=needed, progress=False)
            captured = needed
        counts: list[int] = []
        out, seconds = _timed(
            lambda: generate(
                engine.model, ids, engine=engine, max_new_tokens=max_new_tokens, do_sample=False,
                on_step=lambda event: counts.extend(map(len, event.tokens.values())),
            ),
            ids.device,
        )  # fmt: skip
        return Run(out[0, ids.shape[1] :].tolist(), seconds, counts)

    return run


def hugging_face_method(model: PreTrainedModel, **options: object) -> Method:
    """Hugging Face `generate`. The forward over the prompt delivers tokens too; it is no decode step."""

    def run(ids: Tensor, max_new_tokens: int) -> Run:
        known: list[int] = []  # tokens before each forward: those in the cache, and one more

        def note(_model: object, _arguments: object, named: dict) -> None:
            cache = next(named[name] for name in CACHES if name in named)
            known.append(cache.get_seq_length() + 1)

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            out, seconds = _timed(
                lambda: model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
                ),
                ids.device,
            )
        finally:
            handle.remove()
        known = [*known[1:], out.shape[1]]
        return Run(out[0, ids.shape[1] :].tolist(), seconds, [b - a for a, b in itertools.pairwise(known)])

    return run


def compiled_method(model: PreTrainedModel) -> Method:
    """Hugging Face `generate` with a static cache and torch.compile; compilation and warm-up are not timed."""
    compiled = CompiledGenerate(model)

    def run(ids: Tensor, max_new_tokens: int) -> Run:
        compiled.prepare(ids, max_new_tokens)
        out, seconds = _timed(lambda: compiled(ids, max_new_tokens), ids.device)
        tokens = out[0, ids.shape[1] :].tolist()
        return Run(tokens, seconds, [1] * (len(tokens) - 1))

    return run


# The last two run every op, linear layers and norms included, with torch: what the package's kernels are worth.
METHODS = ("ar", "firp", "hf", "hf-compiled", "prompt-lookup", "ar-reference", "firp-reference")


def check_methods(names: list[str]) -> None:
    """Raise ValueError for an unknown name, or one given twice."""
    for i, name in enumerate(names):
        if name not in METHODS or name in names[:i]:
            twice = " twice" if name in names[:i] else ""
            raise ValueError(f"methods: got {name!r}{twice}, expected some of {', '.join(METHODS)}")


def make_methods(
    names: list[str], model: PreTrainedModel, predictor: FirpPredictor | None, tree: TreeConfig | None
) -> dict[str, Method]:
    """The methods asked for, by name.

    Raises:
        ValueError: an unknown name, one given twice, `firp` without a predictor, or `hf-compiled` where nothing
            compiles.
    """
    check_methods(names)
    made: dict[str, Method] = {}
    for name in names:
        kind, _, impl = name.partition("-")
        if kind == "firp":
            if predictor is None:
                raise ValueError(f"predictor: got None, expected one for the method {name!r}")
            made[name] = engine_method(Engine(model, predictor, tree, impl or None))
        elif kind == "ar":
            made[name] = engine_method(Engine(model, impl=impl or None))
        elif name == "hf":
            made[name] = hugging_face_method(model)
        elif name == "hf-compiled":
            if launched_ranks() > 1:
                raise ValueError("methods: got 'hf-compiled' in a job of several ranks, expected one process for it")
            made[name] = compiled_method(model)
        else:
            made[name] = hugging_face_method(model, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS)
    return made


@dataclass
class Results:
    """What a bench ran.

    Attributes:
        prompts: those that were run.
        runs: runs[method][repeat][i] holds the runs of prompt i, one per turn.
        inputs: inputs[i] holds Hugging Face's token ids of prompt i per turn, where it is among the methods.
        interrupted: whether a Ctrl-C ended the bench; prompts and repeats that were not finished are left out.
    """

    prompts: list[Prompt]
    runs: dict[str, list[list[list[Run]]]] = field(default_factory=dict)
    inputs: list[list[Tensor]] = field(default_factory=list)
    interrupted: bool = False
