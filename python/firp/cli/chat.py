"""`firp chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import torch
import typer
from rich.console import Console

from firp.cli import options
from firp.cli.streaming import MarkingStreamer
from firp.decoder.rotary import context_limit
from firp.engine.engine import Engine
from firp.generation.generate import generate
from firp.generation.metrics import StepEvent
from firp.tools.figures import cut
from firp.tools.prompt_files import encode

HELP = (
    "/reset forgets the conversation, /exit ends it; Ctrl-C ends an answer, at the prompt the conversation; "
    "green tokens came free"
)


class Stopped(Exception):
    """Ends an answer after a step, where the engine is as ready for the next one as after a whole answer."""


def chat(
    model: options.Model = "smollm2-135m",
    predictor: options.Predictor = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    nodes: options.Nodes = None,
    lookahead: options.Lookahead = None,
    tree_kind: options.TreeKind = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    plain: options.Plain = False,
) -> None:
    """Talk to the model, turn by turn; tau and tokens per second after every answer.

    Ctrl-C ends an answer, of which the conversation keeps what is written. A second one right after, or one at the
    prompt, ends the conversation with exit code 130.
    """
    sampling = options.sampling(temperature, top_p, top_k)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    device = options.choose_device(device)
    drafter = None if plain else options.find_predictor(model, predictor)
    tree = None if drafter is None else options.make_tree(drafter, nodes, lookahead, tree_kind)
    base, tokenizer = options.load(model, dtype, device)
    engine = Engine(base, drafter, tree)
    console, ranks = options.output(), engine.view.ranks
    console.print(HELP)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while (text := ranks.first(lambda: _read(console))) is not None:
        if text == "/exit":
            break
        if text == "/reset":
            messages = list(start)
            console.print("conversation forgotten")
            continue
        if text.startswith("/"):
            console.print(f"unknown command {text}; {HELP}", markup=False)
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        ids = torch.tensor([encode(tokenizer, messages)], device=base.device)
        room = context_limit(base.config) - ids.shape[1]
        if room < 1:
            console.print(f"the conversation's {ids.shape[1]} tokens fill the model's context; /reset starts again")
            messages.pop()
            continue
        streamer = MarkingStreamer(tokenizer, console)
        asked = {"max_new_tokens": min(max_new_tokens, room), "seed": seed, **sampling}
        console.print(f"[dim]{_answer(engine, ids, streamer, asked)}[/]")
        messages.append({"role": "assistant", "content": tokenizer.decode(streamer.tokens, skip_special_tokens=True)})


def _answer(engine: Engine, ids: torch.Tensor, streamer: MarkingStreamer, asked: dict) -> str:
    """Stream one answer to its end or to Ctrl-C; return its figures."""
    started = time.perf_counter()
    with _noted_interrupts() as interrupts:

        def step_ended(event: StepEvent) -> None:
            streamer.step_ended(event)
            if engine.view.ranks.first(lambda: bool(interrupts)):
                raise Stopped

        try:
            out = generate(
                engine.model, ids, engine=engine, streamer=streamer, on_step=step_ended,
                return_dict_in_generate=True, **asked,
            )  # fmt: skip
        except Stopped:
            streamer.end()
            return f"{len(streamer.tokens)} tokens, stopped"
    stats = out.stats
    speed = stats.tokens / (time.perf_counter() - started)
    return f"{stats.tokens} tokens, tau {cut(stats.tau)}, {cut(speed, 1)} tokens/s"


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Within it, a first Ctrl-C is put into the list; a second one raises KeyboardInterrupt."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _read(console: Console) -> str | None:
    """One line of the user's, None at the end of input; the prompt is shown to people only."""
    try:
        return (console.input("[bold]> [/]") if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None
