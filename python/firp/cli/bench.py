"""`firp bench`: decoding methods side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from firp.bench.methods import METHODS, check_methods, make_methods
from firp.bench.random_weights import SHAPES
from firp.bench.report import plot as draw
from firp.bench.report import print_table
from firp.bench.runner import report, run_methods, tree_settings
from firp.bench.step_cost import SIZES, measure_step_cost, print_step_cost
from firp.bench.suite_report import print_suite, suite_document
from firp.bench.suites import SUITES, load_suite
from firp.cli import options
from firp.engine.engine import Engine
from firp.tools.files import check_writable, write_atomically
from firp.tools.prompt_files import OWN_PROMPTS, load_prompts
from firp.tools.ranks import launched_rank


def bench(
    model: options.Model = "smollm2-135m",
    predictor: options.Predictor = None,
    prompts: options.Prompts = OWN_PROMPTS,
    suite: Annotated[str | None, typer.Option(help=f"Instead of --prompts, with --file: {', '.join(SUITES)}.")] = None,
    file: Annotated[Path | None, typer.Option(help="Of --suite: your own copy of its file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts taken, spread evenly over the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    methods: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(METHODS)}.")] = "ar,firp,hf,prompt-lookup",
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 3,
    nodes: options.Nodes = None,
    lookahead: options.Lookahead = None,
    tree_kind: options.TreeKind = None,
    all_turns: Annotated[
        bool, typer.Option("--all-turns", help="Whole conversations, not first turns; --suite always does.")
    ] = False,
    raw: options.Raw = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw tokens per second.")] = None,
    random_weights: Annotated[
        str | None, typer.Option(help=f"Instead: step cost at the shape {', '.join(SHAPES)}.")
    ] = None,
    contexts: Annotated[
        str, typer.Option(help="Of --random-weights: tokens before a step, comma-separated.")
    ] = "1024,4096",
) -> None:
    """Run decoding methods on the same prompts, interleaved, and report tau, tokens/s, ratios and equality."""
    for output in (json_path, plot):
        if output is not None and launched_rank() == 0:
            check_writable(output)
    if (suite is None) != (file is None):
        raise ValueError(f"{'suite' if suite is None else 'file'}: got none, expected --suite and --file together")
    for name, other in (("prompts", prompts != OWN_PROMPTS), ("random_weights", random_weights is not None)):
        if suite is not None and other:
            raise ValueError(f"{name}: given with suite, expected one of them")
    if random_weights is not None:
        options.one_process("random_weights")
        if plot is not None:
            raise ValueError("plot: given with random_weights, expected one of them")
        size = lookahead if nodes is None else nodes
        sizes = SIZES if size is None else ((size, size if lookahead is None else lookahead),)
        document = measure_step_cost(
            random_weights,
            dtype,
            options.choose_device(device),
            options.integers("contexts", contexts),
            sizes,
            repeats=repeats,
        )
        print_step_cost(document)
        _write(json_path, document)
        return
    names = [name.strip() for name in methods.split(",")]
    check_methods(names)
    questions = None if suite is None or file is None else load_suite(suite, file, limit)
    loaded = load_prompts(prompts, limit) if questions is None else questions.prompts
    drafter = options.find_predictor(model, predictor) if {"firp", "firp-reference"} & set(names) else None
    tree = None if drafter is None else options.make_tree(drafter, nodes, lookahead, tree_kind)
    base, tokenizer = options.load(model, dtype, options.choose_device(device))
    if questions is not None:
        questions.check_fits(tokenizer, base.config, max_new_tokens, raw)
    made = make_methods(names, base, drafter, tree)
    results = run_methods(
        made, loaded, base, tokenizer, max_new_tokens, repeats, all_turns or questions is not None, raw,
        progress=launched_rank() == 0,
    )  # fmt: skip
    settings = {
        "model": model,
        "predictor": predictor or model,
        "prompts": (prompts if file is None else file).name,
        "num_prompts": len(results.prompts),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
    }
    settings |= {"tree": None} if drafter is None else tree_settings(Engine(base, drafter, tree))
    document = report(results, base, settings)
    if launched_rank() > 0:
        return
    if questions is not None:
        document["suite"] = suite_document(questions, results, tokenizer)
    _write(json_path, document)
    print_table(document)
    if questions is not None:
        print_suite(document["suite"], questions.suite)
    if plot is not None:
        write_atomically(plot, lambda path: draw(document, path))
    if results.interrupted:
        raise KeyboardInterrupt


def _write(json_path: Path | None, document: dict) -> None:
    if json_path is not None:
        write_atomically(json_path, lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))
