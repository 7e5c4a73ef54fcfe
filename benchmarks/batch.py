"""A batch of ragged prompts: this engine against Hugging Face's `generate`, tokens per second of the whole call.

Run `python benchmarks/batch.py --batch-size 8 --json out.json`. Both get the same left-padded batch; repeats are
interleaved in turning order, after one short run each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import firp
import torch
import typer
from firp.generation.batch import cut_after_stop, left_padded, stop_ids
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.files import write_atomically
from firp.tools.prompt_files import OWN_PROMPTS, encode, load_prompts
from rich.console import Console
from rich.table import Table


def main(
    model: str = "smollm2-135m",
    batch_size: int = 8,
    max_new_tokens: int = 96,
    repeats: int = 5,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(help="torch threads; default: torch's own.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Decode one batch with firp (the predictor's own tree), plain decoding in the same engine, and Hugging Face."""
    if threads is not None:
        torch.set_num_threads(threads)
    base, tokenizer = firp.load_model(model, dtype)
    prompts = load_prompts(OWN_PROMPTS, batch_size)
    batch = left_padded(
        [encode(tokenizer, [{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts],
        tokenizer.pad_token_id,
    )
    engines = {"firp": firp.Engine(base, firp.default_predictor(model)), "plain": firp.Engine(base)}
    methods: dict[str, Callable] = {
        name: lambda engine=engine, **options: firp.generate(base, **batch, engine=engine, **options)
        for name, engine in engines.items()
    }
    methods["hf"] = lambda **options: base.generate(**batch, **options)
    common = {"do_sample": False, "return_dict_in_generate": True}
    stops = stop_ids(base)
    for method in methods.values():
        method(max_new_tokens=4, **common)
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    rows, times = {}, {}
    for repeat in range(repeats):
        names = list(methods)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            started = time.perf_counter()
            out = methods[name](max_new_tokens=max_new_tokens, **common)
            seconds = time.perf_counter() - started
            rows[name] = cut_after_stop(out.sequences[:, batch["input_ids"].shape[1] :].tolist(), stops)
            speeds[name].append(sum(map(len, rows[name])) / seconds)
            times[name] = vars(out.time) if name in engines else None
    document = {
        "environment": environment(base),
        "batch_size": batch_size,
        "prompt_lengths": batch["attention_mask"].sum(1).tolist(),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "methods": {
            name: {
                "tokens": sum(map(len, rows[name])),
                "tokens_per_second": {"median": median(runs), "min": min(runs), "max": max(runs)},
                "ratio_to_hf": [run / reference for run, reference in zip(runs, speeds["hf"], strict=True)],
                "sequences_identical_to_hf": sum(a == b for a, b in zip(rows[name], rows["hf"], strict=True)),
                "last_time_split": times[name],
            }
            for name, runs in speeds.items()
        },
    }
    table = Table("method", "tokens", "tokens/s", "against hf", "identical to hf", "prefill / steps / host, s")
    for name, entry in document["methods"].items():
        speed, ratios, split = entry["tokens_per_second"], entry["ratio_to_hf"], entry["last_time_split"]
        table.add_row(
            name,
            str(entry["tokens"]),
            f"{speed['median']:.1f} ({speed['min']:.1f}-{speed['max']:.1f})",
            f"{cut(median(ratios))}x ({cut(min(ratios))}-{cut(max(ratios))})",
            f"{entry['sequences_identical_to_hf']}/{batch_size}",
            "-" if split is None else " / ".join(f"{seconds:.2f}" for seconds in split.values()),
        )
    Console(highlight=False).print(table)
    if json_path is not None:
        write_atomically(json_path, lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))


if __name__ == "__main__":
    typer.run(main)
