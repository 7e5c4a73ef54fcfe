"""FIRP, Medusa-1 heads and early exit at equal rows, beside plain decoding, prompt lookup and Hugging Face.

python -m benchmarks.baselines.compare --heads heads --rows 8,16,32,64 --json compare.json

Rows are those of a step above the insertion layer: N for heads, N + P * k for FIRP, whose tree is the one with the
highest tau among those that fit, by the acceptance profile beside the predictor. Every method of a part is timed in
turns with plain decoding. Run the same command again to go on with the parts that are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import firp
import torch
import typer
from firp.bench.methods import Method, engine_method, make_methods
from firp.bench.runner import TAU_FORMULA, report, run_methods
from firp.cli.options import choose_device, integers
from firp.drafting.choices import find_profile
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import NODES, AcceptanceProfile, load_profile
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.files import locked
from firp.tools.prompt_files import OWN_PROMPTS, Prompt, load_prompts
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.baselines.decode import HeadEngine
from benchmarks.baselines.heads import Heads, load_heads
from benchmarks.commands import run
from benchmarks.document import Document, digest, make_folder

BESIDE = ("ar", "hf", "prompt-lookup")


def best_tree(profile: AcceptanceProfile, rows: int) -> tuple[firp.TreeConfig, int]:
    """The dynamic tree and k with the highest tau in at most so many rows.

    Raises:
        ValueError: fewer rows than the smallest tree has.
    """
    found = {}
    for k in range(1, profile.num_offsets + 1):
        for nodes in NODES:
            for lookahead in range(1, min(nodes, (rows - nodes) // k) + 1):
                tree = firp.TreeConfig(nodes, lookahead)
                found[tree, k] = profile.tau(tree, k)
    if not found:
        raise ValueError(f"rows: got {rows}, expected at least 3 (two nodes and a pseudo row)")
    return max(found, key=found.__getitem__)


def made_from(predictor: FirpPredictor, heads: dict[str, Heads]) -> dict[str, str]:
    """Names the weights of each drafter."""
    digests = {"firp": predictor.fingerprint()}
    for kind, own in heads.items():
        digests[kind] = digest(b"".join(parameter.detach().numpy().tobytes() for parameter in own.parameters()))
    return digests


def heads_in(folder: Path | None) -> dict[str, Heads]:
    """The heads that `benchmarks.baselines.train` has finished in a folder, by kind."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise FileNotFoundError(f"heads: got {str(folder)!r}, expected an existing folder")
    found = [path for path in sorted(folder.iterdir()) if (path / "heads.json").is_file()]
    loaded = [load_heads(path) for path in found if "-sweep-" not in path.name]
    if not loaded:
        raise ValueError(
            f"heads: got {folder} without any, expected a folder that benchmarks.baselines.train has written"
        )
    return {heads.kind: heads for heads in loaded}


def drafting_methods(
    model: PreTrainedModel,
    predictor: FirpPredictor,
    tree: firp.TreeConfig,
    num_offsets: int,
    heads: dict[str, Heads],
    num_nodes: int,
) -> dict[str, Method]:
    """Plain decoding, FIRP with a tree and the first k offsets, and heads with trees of N nodes."""
    made = {
        "ar": engine_method(firp.Engine(model)),
        "firp": engine_method(firp.Engine(model, predictor.first_offsets(num_offsets), tree)),
    }
    return made | {kind: engine_method(HeadEngine(model, own, num_nodes)) for kind, own in heads.items()}


def interleaved(
    methods: dict[str, Method],
    prompts: list[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    repeats: int,
) -> dict:
    """Figures of `firp bench` over all prompts and by category."""
    results = run_methods(methods, prompts, model, tokenizer, max_new_tokens, repeats)
    document = report(results, model, {})
    return {name: document[name] for name in ("methods", "categories")}


def print_table(document: Document, console: Console) -> None:
    """A line a method and part."""
    table = Table("rows", "method", "tree", "tau", "tokens/s", "against plain", title=f"tau = {TAU_FORMULA}")
    for name, figures in document.figures.items():
        for method, entry in figures["methods"].items():
            speed, ratio = entry["tokens_per_second"]["median"], entry["speedup_vs_ar"]
            spread = f"{cut(ratio['median'])}x ({cut(ratio['min'])}-{cut(ratio['max'])})"
            tree = figures.get("trees", {}).get(method, "")
            table.add_row(name, method, tree, cut(entry["tau"], 3), cut(speed, 1), spread)
    console.print(table)


def main(
    heads: Annotated[Path | None, typer.Option(help="Output folder of benchmarks.baselines.train.")] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = Path("compare.json"),
    rows: Annotated[str, typer.Option(help="Comma-separated rows of a step above the insertion layer.")] = "8,16,32,64",
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    predictor: Annotated[str | None, typer.Option(help="Default: the one shipped for the model.")] = None,
    prompts: Annotated[Path, typer.Option(help="JSONL of held-out prompts; default: the project's.")] = OWN_PROMPTS,
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 3,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Compare drafters at equal rows; tokens per second of all but Hugging Face's are of one runtime."""
    sizes = sorted(set(integers("rows", rows)))
    if sizes[0] < 3:
        raise ValueError(f"rows: got {sizes[0]}, expected at least 3 (two nodes and a pseudo row)")
    trained = heads_in(heads)
    drafts = firp.default_predictor(model) if predictor is None else firp.load_predictor(predictor)
    path = find_profile(drafts)
    if path is None:
        raise ValueError("predictor: got one without an acceptance profile, expected one (`firp tune` records it)")
    profile, chosen = load_profile(path), load_prompts(prompts, limit)
    base, tokenizer = firp.load_model(model, dtype, choose_device(device))
    settings = {
        "model": model, "dtype": dtype, "prompts": prompts.name, "prompts_digest": digest(prompts.read_bytes()),
        "limit": limit, "max_new_tokens": max_new_tokens, "repeats": repeats, "tau": TAU_FORMULA,
        "device": base.device.type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    shared = (chosen, base, tokenizer, max_new_tokens, repeats)

    def part(size: int) -> dict:
        tree, k = best_tree(profile, size)
        methods = drafting_methods(base, drafts, tree, k, trained, size)
        own = f"{tree.num_nodes} nodes, {tree.num_lookahead} lookahead, k = {k}"
        trees = {"firp": own, **{kind: f"{size} nodes, k = {own.num_offsets}" for kind, own in trained.items()}}
        return interleaved(methods, *shared) | {"trees": trees}

    make_folder("json", json_path.parent)
    with locked(json_path.parent):
        document = Document(json_path, settings, environment(base))
        document.part("any", {}, lambda: interleaved(make_methods(list(BESIDE), base, None, None), *shared))
        for size in sizes:
            document.part(str(size), made_from(drafts, trained), lambda size=size: part(size))
    print_table(document, Console(highlight=False))


if __name__ == "__main__":
    run(main)
