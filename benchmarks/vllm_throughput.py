"""vLLM plainly, with its n-gram speculation and with FIRP, side by side: `python benchmarks/vllm_throughput.py --help`.

It runs in the environment that `make test-vllm` makes. Each method is a vLLM engine in a process of its own, and only
one works at a time: the prompts go to them in turns, in another order in each repeat. All three get the same token ids,
decode greedily without a prefix cache, and were warmed up by the same prompts.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import environment, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DTYPES = ("bfloat16", "float32")
MODEL = "smollm2-135m"
SETTINGS = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Takes prompts; returns seconds, and of each prompt the tokens of each step.
Method = Callable[[list[list[int]]], tuple[float, list[list[list[int]]]]]


def serve(connection: Connection, options: dict[str, Any], new_tokens: int, stops: list[int]) -> None:
    """One engine, without a tokenizer: groups of prompts come in, and seconds and steps go back, until None comes."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(**options).llm_engine
    asked = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        stop_token_ids=stops,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    connection.send("ready")
    while (prompts := connection.recv()) is not None:
        steps: list[list[list[int]]] = [[] for _ in prompts]
        begin = time.perf_counter()
        for name, prompt in enumerate(prompts):
            engine.add_request(str(name), TokensPrompt(prompt_token_ids=prompt), asked)
        while engine.has_unfinished_requests():
            for output in engine.step():
                steps[int(output.request_id)].append(list(output.outputs[0].token_ids))
        connection.send((time.perf_counter() - begin, [[step for step in row if step] for row in steps]))


@contextmanager
def started(options: dict[str, dict[str, Any]], new_tokens: int, stops: list[int]) -> Iterator[dict[str, Method]]:
    """An engine for each of the named options, made one after another."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []

    def method(name: str) -> Method:
        def decode(prompts: list[list[int]]) -> tuple[float, list[list[list[int]]]]:
            connections[name].send(prompts)
            return connections[name].recv()

        return decode

    try:
        for name, given in options.items():
            connections[name], other = context.Pipe()
            process = context.Process(target=serve, args=(other, given, new_tokens, stops), name=name, daemon=True)
            process.start()
            processes.append(process)
            other.close()
            connections[name].recv()  # EOFError where the engine did not start; its own error stands above
        yield {name: method(name) for name in options}
    finally:
        for process in processes:
            process.terminate()
            process.join()


def compare(methods: dict[str, Method], prompts: list[list[int]], batch: int, repeats: int) -> dict:
    """Tokens per second of each method, prefill included, in each repeat; tau; answers equal to plain decoding's."""
    groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
    answers = {name: [steps for group in groups for steps in decode(group)[1]] for name, decode in methods.items()}
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    for repeat in range(repeats):
        seconds, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for index, group in enumerate(groups):
            turn = (repeat + index) % len(names)
            for name in names[turn:] + names[:turn]:
                taken, steps = methods[name](group)
                seconds[name] += taken
                tokens[name] += sum(len(step) for row in steps for step in row)
        for name in names:
            speeds[name].append(tokens[name] / seconds[name])
    flat = {name: [[token for step in row for token in step] for row in rows] for name, rows in answers.items()}
    found = {}
    for name, rows in answers.items():
        counts = [len(step) for row in rows for step in row[1:]]  # the first is the prefill's
        found[name] = {
            "tokens_per_second": speeds[name],
            "over_plain": [a / b for a, b in zip(speeds[name], speeds["plain"], strict=True)],
            "tokens": sum(map(len, flat[name])),
            "tau": sum(counts) / len(counts) if counts else None,
            "answers_equal_to_plain": sum(a == b for a, b in zip(flat[name], flat["plain"], strict=True)),
        }
    return found


def engine_options(model: Path, checkpoint: Path, dtype: str, batch: int, length: int, drafts: int) -> dict:
    """What each method's engine is made with."""
    common = {
        "model": str(model), "dtype": dtype, "max_num_seqs": batch, "max_model_len": length, "enforce_eager": True,
        "enable_prefix_caching": False, "skip_tokenizer_init": True,
    }  # fmt: skip
    speculative = {
        "plain": None,
        "n-gram": {
            "method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 2, "prompt_lookup_max": 4,
        },
        "FIRP": {"model": str(checkpoint), "num_speculative_tokens": drafts},
    }  # fmt: skip
    return {name: {**common, "speculative_config": given} for name, given in speculative.items()}


def print_table(found: dict[str, dict], title: str, prompts: int, console: Console) -> None:
    from firp.tools.figures import cut

    table = Table("method", "tokens/s", "over plain", "tau", "answers equal to plain", title=title)
    for name, figures in found.items():
        ratios = figures["over_plain"]
        table.add_row(
            name,
            f"{median(figures['tokens_per_second']):.1f}",
            f"{cut(median(ratios))}x ({cut(min(ratios))}-{cut(max(ratios))})",
            "-" if figures["tau"] is None else cut(figures["tau"]),
            f"{figures['answers_equal_to_plain']} of {prompts}",
        )
    console.print(table)


def numbers(text: str, name: str) -> list[int]:
    """Positive integers, comma-separated."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ValueError(f"{name}: got {text!r}, expected positive integers, comma-separated")
    return found


@app.command()
def main(
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or both, comma-separated")] = ",".join(DTYPES),
    batch: Annotated[str, typer.Option(help="requests at once, comma-separated")] = "1,8",
    limit: Annotated[int, typer.Option(help="prompts", min=1)] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of an answer", min=2)] = 64,
    drafts: Annotated[int, typer.Option(help="num_speculative_tokens of both speculative methods", min=1)] = 3,
    repeats: Annotated[int, typer.Option(help="interleaved repeats", min=1)] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """Tokens per second, prefill included, of vLLM on this CPU: plain, with n-gram speculation, and with FIRP."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        unknown = [name for name in dtype.split(",") if name not in DTYPES]
        if unknown:
            raise ValueError(f"dtype: got {unknown[0]!r}, expected {' or '.join(DTYPES)}")
        sizes = numbers(batch, "batch")
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vllm is not installed; make test-vllm makes an environment, build/vllm")
    except ValueError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
    os.environ |= SETTINGS
    import firp
    import vllm
    from firp.integrations.vllm_checkpoint import write_vllm_checkpoint
    from firp.tools.models import load_config
    from firp.tools.prompt_files import OWN_PROMPTS, encode, load_prompts

    settings = {
        "model": MODEL, "prompts": limit, "max_new_tokens": max_new_tokens, "num_speculative_tokens": drafts,
        "repeats": repeats,
    }  # fmt: skip
    versions = {"vllm": vllm.__version__}
    document: dict[str, Any] = {"environment": environment("cpu") | versions, "settings": settings, "dtypes": {}}
    with TemporaryDirectory() as root:
        model, tokenizer = firp.load_model(MODEL, "float32", "cpu")
        model.save_pretrained(Path(root) / "model")
        ends = model.generation_config.eos_token_id
        stops = ends if isinstance(ends, list) else [ends]
        del model
        write_vllm_checkpoint(Path(root) / "firp", firp.default_predictor(MODEL), load_config(MODEL))
        turns = [[{"role": "user", "content": prompt.turns[0]}] for prompt in load_prompts(OWN_PROMPTS, limit)]
        prompts = [encode(tokenizer, turn, False) for turn in turns]
        length = max(map(len, prompts)) + max_new_tokens + drafts + 1
        for name in dtype.split(","):
            document["dtypes"][name] = {}
            for size in sizes:
                options = engine_options(Path(root) / "model", Path(root) / "firp", name, size, length, drafts)
                with started(options, max_new_tokens, stops) as methods:
                    found = compare(methods, prompts, size, repeats)
                document["dtypes"][name][f"batch {size}"] = found
                print_table(found, f"{name}, batch {size}", len(prompts), console)
                if json_path is not None:
                    write_json(document, json_path)
    if json_path is None:
        console.print_json(json.dumps(document))


if __name__ == "__main__":
    app()
