"""What branches of earlier text are worth in decoding, by category: the engine as it is, and without them.

python -m benchmarks.ablations.lookup --prompts prompts.jsonl

One engine decodes greedily with the trees that it chooses on this machine, and with as many nodes of a branch as pay
there; then the same engine without branches. Answers are compared with plain decoding, token for token. Each part
holds the trees and their figures. Where these are of another first use, it is decoded again.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated
from unittest import mock

import firp
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.drafting.choices import Choice
from firp.drafting.lookup import Lookup
from firp.tools.environment import environment
from firp.tools.files import locked
from firp.tools.prompt_files import OWN_PROMPTS, load_prompts

from benchmarks.commands import check_length, run
from benchmarks.document import Document, digest, make_folder
from benchmarks.few_rows import decoded, generate, rows_of_steps, show, texts_of

OUT = Path(__file__).parents[1] / "results/lookup.json"
WITH, WITHOUT = "with branches", "without"


class NoBranches(Lookup):
    """It takes note of the text as ever, and adds nothing to a tree."""

    def pays(self, sequences: list[int], prices: list[float]) -> int:
        return 0


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts; default: the project's.")] = OWN_PROMPTS,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    predictor: Annotated[str | None, typer.Option(help="Default: the one shipped for the model.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "bfloat16",
) -> None:
    """Decode with and without branches, and report tau by category."""
    check_length(max_new_tokens)
    chosen = load_prompts(prompts, limit)
    base, tokenizer = firp.load_model(model, dtype, "cpu")
    drafts = firp.default_predictor(model) if predictor is None else firp.load_predictor(predictor)
    settings = {
        "model": model, "firp": drafts.fingerprint(), "limit": limit, "max_new_tokens": max_new_tokens, "dtype": dtype,
        "prompts": digest(prompts.read_bytes()), "tau": TAU_FORMULA, "threads": torch.get_num_threads(),
    }  # fmt: skip

    def figures(engine: firp.Engine, plain: firp.Engine, rows: list[int], category: str) -> dict:
        inputs = texts_of(chosen, category, tokenizer)
        answers = [generate(plain, text, max_new_tokens).sequences[0] for text in inputs]
        made = {WITH: decoded(engine, rows, inputs, answers, max_new_tokens)}
        with mock.patch("firp.generation.loop.Lookup", NoBranches):
            made[WITHOUT] = decoded(engine, rows, inputs, answers, max_new_tokens)
        return made

    make_folder("json", json_path.parent)
    with locked(json_path.parent):
        document = Document(json_path, settings, environment(base), (WITH, WITHOUT))
        engine, plain = firp.Engine(base, drafts), firp.Engine(base)
        rungs = engine.rungs(1)
        if not rungs:
            raise ValueError("predictor: got one without an acceptance profile, expected one: it has no branches")
        rows = rows_of_steps(engine)
        measured = Choice(engine.num_offsets, None, {1: rungs}, "").as_document()["batches"]["1"]
        made_from = {"num_offsets": engine.num_offsets, "rungs": measured}
        for category in dict.fromkeys(prompt.category for prompt in chosen):
            document.part(category, made_from, functools.partial(figures, engine, plain, rows, category))
    show(document.figures)


if __name__ == "__main__":
    run(main)
