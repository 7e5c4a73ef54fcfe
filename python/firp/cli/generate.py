"""`firp generate`: answer one prompt, or compare plain decoding and FIRP on it."""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from firp.cli import options
from firp.cli.streaming import MarkingStreamer
from firp.engine.engine import Engine
from firp.generation.generate import generate as firp_generate
from firp.tools.figures import cut
from firp.tools.prompt_files import encode

# Answers by each method that figures are of, in turns; where those on the screen took this many seconds, they count.
REPEATS, LONG = 3, 20.0
DEFAULT_PROMPT = (
    "Nora buys 4 notebooks at 3 dollars each and 2 pens at 1.50 dollars each. She pays with a 20 dollar bill. How much "
    "change does she get?"
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.")] = DEFAULT_PROMPT,
    model: options.Model = "smollm2-135m",
    predictor: options.Predictor = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    nodes: options.Nodes = None,
    lookahead: options.Lookahead = None,
    tree_kind: options.TreeKind = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    raw: options.Raw = False,
    plain: options.Plain = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Plain decoding first, then FIRP, and the figures.")
    ] = False,
) -> None:
    """Answer PROMPT, streaming; tokens that came free are green."""
    if plain and compare:
        raise ValueError("plain: given with compare, expected one of them")
    sampling = options.sampling(temperature, top_p, top_k)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    if not prompt:
        raise ValueError("prompt: got an empty prompt, expected text")
    device = options.choose_device(device)
    drafter = None if plain else options.find_predictor(model, predictor)
    tree = None if drafter is None else options.make_tree(drafter, nodes, lookahead, tree_kind)
    base, tokenizer = options.load(model, dtype, device)
    ids = torch.tensor([encode(tokenizer, [{"role": "user", "content": prompt}], raw)], device=base.device)
    console = options.output()
    engines = {"plain": Engine(base)} if compare or plain else {}
    if drafter is not None:
        engines["FIRP"] = Engine(base, drafter, tree)
    shown: dict[str, Timed] = {}
    for name, engine in engines.items():
        # One short run first, so that the figures hold no first-use costs.
        firp_generate(base, ids, engine=engine, max_new_tokens=8, seed=seed, **sampling)
        if compare:
            console.rule(name)
        streamer = MarkingStreamer(tokenizer, console)
        asked = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling}
        shown[name] = _answer(base, ids, engine, **asked, streamer=streamer, on_step=streamer.step_ended)
    runs: list[dict[str, Timed]] = []
    ranks = next(iter(engines.values())).view.ranks
    if compare and ranks.first(lambda: sum(answer.seconds for answer in shown.values()) < LONG):
        runs = [{name: _answer(base, ids, engine, **asked) for name, engine in engines.items()} for _ in range(REPEATS)]
    _report(console, shown, runs)


class Timed(NamedTuple):
    """An answer, and how long it took."""

    output: Any
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.output.stats.tokens / self.seconds


def _answer(base: PreTrainedModel, ids: Tensor, engine: Engine, **asked: Any) -> Timed:
    started = time.perf_counter()
    output = firp_generate(base, ids, engine=engine, return_dict_in_generate=True, **asked)
    return Timed(output, time.perf_counter() - started)


def _report(console: Console, shown: dict[str, Timed], repeats: list[dict[str, Timed]]) -> None:
    """The figures of repeats in turns, or where there are none of the answers that were shown."""
    runs = repeats or [shown]
    table = Table("method", "tokens", "steps", "tau", "tokens/s", "speedup")
    for name, (out, _) in runs[0].items():
        speed = median(run[name].speed for run in runs)
        ratios = sorted(run[name].speed / next(iter(run.values())).speed for run in runs)
        spread = f" ({cut(ratios[0])}-{cut(ratios[-1])})" if len(runs) > 1 and ratios[-1] > ratios[0] else ""
        speedup = f"{cut(median(ratios))}x{spread}" if len(runs[0]) > 1 else "-"
        table.add_row(name, str(out.stats.tokens), str(out.stats.steps), cut(out.stats.tau), cut(speed, 1), speedup)
    console.print(table)
    turns = f", median of {len(runs)} answers in turns" if len(runs) > 1 else ""
    console.print(
        f"tau = tokens delivered by decode steps / decode steps; tokens/s with prefill{turns}; green tokens came free"
    )
    if len(runs[0]) > 1:
        same = len({tuple(out.sequences[0].tolist()) for run in (shown, *repeats) for out, _ in run.values()}) == 1
        console.print(f"identical output: {'yes' if same else 'no'}")
