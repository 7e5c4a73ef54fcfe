"""What the check of a model object costs: alone, and in a run of 64 tokens with and without it, interleaved.

OMP_NUM_THREADS=2 python benchmarks/model_check.py --json out.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import firp
import typer
from firp.decoder.model_check import check_model
from firp.tools.environment import environment


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def main(
    model: str = "smollm2-135m",
    dtype: str = "bfloat16",
    repeats: int = 15,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Median, minimum and maximum of the check, and of the ratio of a run with it to one without."""
    base, tokenizer = firp.load_model(model, dtype)
    engine = firp.Engine(base, firp.default_predictor(model))
    inputs = tokenizer("The lighthouse keeper opened the bottle and", return_tensors="pt")
    check = engine.view.check_unchanged

    def run() -> object:
        return firp.generate(base, **inputs, engine=engine, max_new_tokens=64, min_new_tokens=64, do_sample=False)

    run()
    first = milliseconds(lambda: check_model(base))
    alone = [milliseconds(check) for _ in range(20 * repeats)]
    ratios, plain = [], []
    for repeat in range(repeats):
        times = {}
        for checked in (True, False) if repeat % 2 else (False, True):
            engine.view.check_unchanged = check if checked else lambda: None
            times[checked] = milliseconds(run)
        ratios.append(times[True] / times[False])
        plain.append(times[False])
    figures = {
        "check_ms": spread(alone),
        "check_again_ms": first,
        "run_ms": spread(plain),
        "ratio": spread(ratios),
        "environment": environment(base),
    }
    print(json.dumps(figures, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    typer.run(main)
