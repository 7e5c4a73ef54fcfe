"""A prompt's pass over the layers beside Hugging Face's, in turns.

python -m benchmarks.prompts

Both write the keys and values of the same random tokens. Hugging Face's forward also scores the last token; the engine
leaves that to its first step. Ratios are Hugging Face's seconds over the engine's, so above 1 the engine is faster.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import firp
import torch
import typer
from firp.cli.options import choose_device, integers
from firp.engine.prefill import check_prompts
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.hardware import synchronize
from transformers import PreTrainedModel

from benchmarks.commands import run
from benchmarks.document import Document

OUT = Path(__file__).parent / "results/prompts.json"
DTYPES = ("float32", "bfloat16", "float16")


def pass_of_engine(engine: firp.Engine, tokens: torch.Tensor) -> float:
    """Seconds in which all tokens [n] but the last have passed."""
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    return firp.generate(engine.model, tokens[None], engine=engine, **options).time.prefill


@torch.no_grad()
def pass_of_model(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """The same of the model's own forward."""
    synchronize(model.device)
    begin = time.perf_counter()
    model(tokens[None, :-1], use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return time.perf_counter() - begin


def compare(engine: firp.Engine, length: int, repeats: int, seed: int) -> dict:
    """Median seconds of both, and the ratio of each pair, which takes turns at being first."""
    model, generator = engine.model, torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (length + 1,), generator=generator).to(model.device)
    ways = (functools.partial(pass_of_engine, engine), functools.partial(pass_of_model, model))
    for way in ways:
        way(tokens)
    taken: list[list[float]] = [[], []]
    for turn in range(repeats):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            taken[which].append(ways[which](tokens))
    own, theirs = taken
    ratios = sorted(b / a for a, b in zip(own, theirs, strict=True))
    return {"engine": median(own), "hugging face": median(theirs), "ratio": median(ratios), "ratios": ratios}


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, with commas.")] = "128,1000",
    dtypes: Annotated[str, typer.Option(help="dtypes, with commas.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of each.")] = 15,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the tokens.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Time a prompt's pass in the engine and in the model itself."""
    sizes = integers("lengths", lengths)
    kinds = [dtype.strip() for dtype in dtypes.split(",")]
    for dtype in kinds:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes: got {dtype!r}, expected {', '.join(DTYPES)}, with commas")
    where = choose_device(device)
    for dtype in kinds:
        base, _ = firp.load_model(model, dtype, where)
        engine = firp.Engine(base)
        check_prompts(base.config, [length + 1 for length in sizes], 1)
        document = Document(json_path, {"model": model, "repeats": repeats, "seed": seed}, environment(base))
        for length in sizes:
            compute = functools.partial(compare, engine, length, repeats, seed)
            found = document.part(f"{dtype}, {length} tokens", {}, compute)
            print(
                f"{dtype}, {length} tokens: engine {1e3 * found['engine']:.1f} ms, Hugging Face "
                f"{1e3 * found['hugging face']:.1f} ms, {cut(found['ratio'])}x "
                f"({cut(found['ratios'][0])}-{cut(found['ratios'][-1])})"
            )


if __name__ == "__main__":
    run(main)
