"""Whether the default engine's answers are the model's own: every token against Hugging Face's forward, in one pass.

python -m benchmarks.lossless --prompts prompts.jsonl

Hugging Face's forward passes each prompt together with FIRP's answer. Where every token of the answer is the argmax of
the row before it, and the answer ends where it should, greedy decoding by that forward gives just this answer. That
takes one forward an answer, where decoding takes one a token. Any other answer is decoded by Hugging Face's `generate`
and compared with that: two nearly equal scores may change places between one row and many. Run the same command again
to go on after an interruption.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import firp
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.prompt_files import OWN_PROMPTS, Prompt, encode, load_prompts
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.commands import run
from benchmarks.document import Document, digest, make_folder

OUT = Path(__file__).parent / "results/lossless.json"
DTYPES = ("float32", "float64")


def compared(engine: firp.Engine, judge: PreTrainedModel, prompt: Tensor, max_new_tokens: int) -> dict:
    """FIRP's greedy answer to a prompt [T], and whether it is the judge's.

    Returns:
        tokens, steps, delivered: of the answer. equal: whether the judge gives the same. forward: whether its forward
        alone shows it. gap: the least difference of the two highest scores before a token.
    """
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    out = firp.generate(engine.model, prompt[None], engine=engine, return_dict_in_generate=True, **options)
    text, answer = out.sequences[0], out.sequences[0, len(prompt) :]
    with torch.no_grad():
        scores = judge(text[None, :-1], use_cache=False, logits_to_keep=len(answer)).logits[0]
    best = scores.topk(2, -1)
    same = torch.equal(best.indices[:, 0], answer) and _ends(judge, answer, max_new_tokens)
    return {
        "tokens": len(answer), "steps": out.stats.steps, "delivered": out.stats.tokens,
        "equal": same or torch.equal(judge.generate(prompt[None], **options)[0], text), "forward": same,
        "gap": float((best.values[:, 0] - best.values[:, 1]).min()),
    }  # fmt: skip


def _ends(judge: PreTrainedModel, answer: Tensor, max_new_tokens: int) -> bool:
    """Whether an answer ends where decoding would end it: at the first stop token, or at the limit."""
    ids = judge.generation_config.eos_token_id
    stops = torch.isin(answer, torch.tensor([] if ids is None else ids))
    return not stops[:-1].any() and (bool(stops[-1]) or len(answer) == max_new_tokens)


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts; default: the project's.")] = OWN_PROMPTS,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write what was found.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    predictor: Annotated[str | None, typer.Option(help="Default: the one shipped for the model.")] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts taken, spread evenly over the file; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
) -> None:
    """Compare greedy answers of the default engine with Hugging Face's forward; exit code 1 if any differs."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected {' or '.join(DTYPES)}: others round too much to compare rows")
    drafts = firp.default_predictor(model) if predictor is None else firp.load_predictor(predictor)
    chosen = load_prompts(prompts, limit)
    (base, tokenizer), (judge, _) = (firp.load_model(model, dtype, "cpu") for _ in range(2))
    engine = firp.Engine(base, drafts)
    settings = {
        "model": model, "predictor": drafts.fingerprint(), "prompts": digest(prompts.read_bytes()), "limit": limit,
        "dtype": dtype, "max_new_tokens": max_new_tokens, "tau": TAU_FORMULA,
    }  # fmt: skip

    def answers(named: list[Prompt]) -> dict:
        texts = [torch.tensor(encode(tokenizer, [{"role": "user", "content": one.turns[0]}])) for one in named]
        found = [compared(engine, judge, text, max_new_tokens) for text in texts]
        return {"answers": [{"id": one.id, **of_it} for one, of_it in zip(named, found, strict=True)]}

    make_folder("json", json_path.parent)
    document, made = Document(json_path, settings, environment(base)), []
    for category in dict.fromkeys(prompt.category for prompt in chosen):
        named = [prompt for prompt in chosen if prompt.category == category]
        made += document.part(category, {}, functools.partial(answers, named))["answers"]
        print(f"{category}: {told(made[-len(named) :])}")
    print(f"all: {told(made)}")
    if not all(one["equal"] for one in made):
        sys.exit(1)


def told(answers: list[dict]) -> str:
    equal, gap = sum(one["equal"] for one in answers), min(one["gap"] for one in answers)
    tokens, delivered, steps = (sum(one[name] for one in answers) for name in ("tokens", "delivered", "steps"))
    shown = f"{equal} of {len(answers)} answers are the model's own, {tokens} tokens, tau {cut(delivered / steps, 3)}"
    return f"{shown}, least gap of two scores {gap:.1e}"


if __name__ == "__main__":
    run(main)
