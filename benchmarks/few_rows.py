"""What a predictor delivers in steps of at most 10 rows, by category, beside another one.

python -m benchmarks.few_rows --prompts prompts.jsonl --before folder

The predictor drafts up to 3 nodes and 2 lookahead nodes of 2 offsets, with up to 3 nodes of a branch of earlier text:
at most 10 rows above the insertion layer. Where nothing was drafted, a step has the root alone, and 3 rows. An engine
on a CPU would choose trees by what its rows cost there; this one is told its tree, and that a branch costs nothing.
`--before` decodes the same prompts with another predictor's tree of 8 rows: 4 nodes, 2 lookahead nodes, 2 offsets,
without branches. Answers are compared with plain decoding, token for token.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import firp
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.drafting.choices import Choice, Rung
from firp.drafting.trees import TreeConfig
from firp.generation.output import FirpOutput
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.files import locked
from firp.tools.prompt_files import OWN_PROMPTS, Prompt, encode, load_prompts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.commands import check_length, run
from benchmarks.document import Document, digest, make_folder

OUT = Path(__file__).parent / "results/few-rows.json"
NUM_OFFSETS, BRANCH = 2, 3
TREE, BEFORE = TreeConfig(3, 2), TreeConfig(4, 2)


def engine_with_branches(model: PreTrainedModel, predictor: firp.FirpPredictor) -> firp.Engine:
    """It drafts `TREE`, with as many nodes of a branch as `BRANCH` allows."""
    engine = firp.Engine(model, predictor)
    rungs = Rung(TreeConfig(1, 1), 1.0, 1.0), Rung(TREE, 0.1, 2.0, (0.0,) * BRANCH)
    engine._trees.automatic = object()
    engine._trees.choice = Choice(NUM_OFFSETS, None, {1: rungs}, "firp tune")
    return engine


def rows_of_steps(engine: firp.Engine) -> list[int]:
    """Rows above the insertion layer, to which each step of the engine adds from now on."""
    step, rows = engine._trees.step, []
    forward = step.forward

    def noted(state: firp.DecodeState, *args: object) -> Tensor:
        nodes, lookahead = state.tree.size
        rows.append(nodes + lookahead * step.num_offsets)
        return forward(state, *args)

    step.forward = noted
    return rows


def decoded(engine: firp.Engine, rows: list[int], prompts: list[Tensor], answers: list[Tensor], most: int) -> dict:
    """Figures of greedy answers; `answers` are those of plain decoding."""
    rows.clear()
    steps, tokens, equal = 0, 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        out = generate(engine, prompt, most)
        steps, tokens = steps + out.stats.steps, tokens + out.stats.tokens
        equal += torch.equal(out.sequences[0], answer)
    return {
        "answers": len(prompts), "equal": equal, "steps": steps, "tokens": tokens, "tau": tokens / steps,
        "rows": {"mean": sum(rows) / len(rows), "most": max(rows)},
    }  # fmt: skip


def texts_of(prompts: list[Prompt], category: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The tokens of each prompt of a category, through the chat template."""
    asked = [[{"role": "user", "content": prompt.turns[0]}] for prompt in prompts if prompt.category == category]
    return [torch.tensor(encode(tokenizer, conversation)) for conversation in asked]


def generate(engine: firp.Engine, prompt: Tensor, most: int) -> FirpOutput:
    options = {"max_new_tokens": most, "do_sample": False, "return_dict_in_generate": True}
    return firp.generate(engine.model, prompt[None], engine=engine, **options)


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts; default: the project's.")] = OWN_PROMPTS,
    before: Annotated[str | None, typer.Option(help="Folder of another predictor; default: none.")] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "bfloat16",
) -> None:
    """Decode in steps of few rows, and report tau by category."""
    check_length(max_new_tokens)
    chosen = load_prompts(prompts, limit)
    base, tokenizer = firp.load_model(model, dtype, "cpu")
    predictor = firp.default_predictor(model)
    engines, fingerprints = {}, {"now": predictor.fingerprint()}
    if before is not None:
        other = firp.load_predictor(before).first_offsets(NUM_OFFSETS)
        engines["before"], fingerprints["before"] = firp.Engine(base, other, BEFORE), other.fingerprint()
    engines["now"] = engine_with_branches(base, predictor)
    rows = {name: rows_of_steps(engine) for name, engine in engines.items()}
    plain = firp.Engine(base)
    settings = {
        "model": model, "predictors": fingerprints, "limit": limit, "max_new_tokens": max_new_tokens, "dtype": dtype,
        "prompts": digest(prompts.read_bytes()), "tau": TAU_FORMULA,
        "threads": torch.get_num_threads(),
        "trees": {"now": str(TREE), "before": str(BEFORE)}, "num_offsets": NUM_OFFSETS, "branch": BRANCH,
    }  # fmt: skip

    def figures(category: str) -> dict:
        inputs = texts_of(chosen, category, tokenizer)
        answers = [generate(plain, text, max_new_tokens).sequences[0] for text in inputs]
        return {name: decoded(engine, rows[name], inputs, answers, max_new_tokens) for name, engine in engines.items()}

    make_folder("json", json_path.parent)
    with locked(json_path.parent):
        document = Document(json_path, settings, environment(base), list(engines))
        for category in dict.fromkeys(prompt.category for prompt in chosen):
            document.part(category, {}, functools.partial(figures, category))
    show(document.figures)


def show(found: dict[str, dict]) -> None:
    names = list(next(iter(found.values())))
    table = Table(
        "category", *(f"{what} {name}" for name in names for what in ("tau", "most rows", "as plain decoding"))
    )
    lines = {**found, "all": {name: together([figures[name] for figures in found.values()]) for name in names}}
    for category, figures in lines.items():
        cells = []
        for of_it in (figures[name] for name in names):
            cells += [cut(of_it["tau"], 3), str(of_it["rows"]["most"]), f"{of_it['equal']} of {of_it['answers']}"]
        table.add_row(category, *cells)
    Console(highlight=False).print(table)
    print(f"tau = {TAU_FORMULA}")


def together(parts: list[dict]) -> dict:
    sums = {key: sum(part[key] for part in parts) for key in ("answers", "equal", "steps", "tokens")}
    return sums | {"tau": sums["tokens"] / sums["steps"], "rows": {"most": max(part["rows"]["most"] for part in parts)}}


if __name__ == "__main__":
    run(main)
