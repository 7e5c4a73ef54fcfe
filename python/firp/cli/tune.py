"""`firp tune`: measure which draft trees decode fastest here, and keep them for this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from firp.cli import options
from firp.decoder.view import DecoderView
from firp.drafting.choices import choice_file, profile_file, save_choice
from firp.drafting.profile import save_profile
from firp.drafting.recording import make_profile
from firp.drafting.transition import token_tables
from firp.tools.environment import environment
from firp.tools.files import check_writable, write_atomically
from firp.tools.hardware import machine_name
from firp.tools.models import load_model
from firp.tools.prompt_files import OWN_PROMPTS, encode, load_prompts
from firp.tune import report
from firp.tune.tuner import TuneConfig, Tuner

DEFAULTS = TuneConfig()


def _joined(values: tuple) -> str:
    return ",".join(map(str, values))


def tune(
    model: options.Model = "smollm2-135m",
    predictor: options.Predictor = None,
    prompts: options.Prompts = OWN_PROMPTS,
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = DEFAULTS.max_new_tokens,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated; a tree is chosen for each.")] = _joined(
        DEFAULTS.batch_sizes
    ),
    nodes: Annotated[str, typer.Option("--nodes", "-N", help="Comma-separated N to try.")] = _joined(DEFAULTS.nodes),
    lookahead: Annotated[str, typer.Option("--lookahead", "-P", help="Comma-separated P to try.")] = _joined(
        DEFAULTS.lookahead
    ),
    offsets: Annotated[
        str | None, typer.Option(help="Comma-separated k to try; default: 1 to the predictor's.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="Comma-separated tree kinds to try.")] = _joined(DEFAULTS.kinds),
    context: Annotated[
        int | None, typer.Option(help="Tokens before a measured step; default: as the prompts have.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of one timing.")] = DEFAULTS.steps,
    repeats: Annotated[int, typer.Option(help="Timings of each finalist.")] = DEFAULTS.repeats,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    raw: options.Raw = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write every figure.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw step times and tokens per second.")] = None,
) -> None:
    """Measure step times and acceptance on your prompts, choose trees per batch size, keep them for this machine."""
    options.one_process("tune")
    config = TuneConfig(
        batch_sizes=options.integers("batch_sizes", batch_sizes),
        nodes=options.integers("nodes", nodes),
        lookahead=options.integers("lookahead", lookahead),
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        offsets=() if offsets is None else options.integers("offsets", offsets),
        max_new_tokens=max_new_tokens,
        context=context,
        steps=steps,
        repeats=repeats,
    )
    drafter = options.find_predictor(model, predictor)
    kept, profiles = choice_file(drafter), profile_file(drafter)
    for output in (kept, profiles, json_path, plot):
        if output is not None:
            check_writable(output)
    loaded = load_prompts(prompts, limit)
    base, tokenizer = load_model(model, dtype, options.choose_device(device))
    ids = [torch.tensor(encode(tokenizer, [{"role": "user", "content": prompt.turns[0]}], raw)) for prompt in loaded]
    tuner = Tuner(base, drafter, ids, config)
    tuner.run()

    name = machine_name(base.device, base.dtype)
    settings = {
        "model": model,
        "predictor": predictor or model,
        "prompts": prompts.name,
        "num_prompts": len(loaded),
    } | vars(config)
    report.print_tables(tuner, name)
    if json_path is not None:
        document = report.document(tuner, environment(base), settings)
        write_atomically(json_path, lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))
    if plot is not None:
        write_atomically(plot, lambda path: report.plot(tuner, name, path))
    view, categories = DecoderView(base), [prompt.category for prompt in loaded]
    answers = list(zip(ids, tuner.answers, categories, strict=True))
    profile = make_profile(view, drafter, answers, token_tables(view, drafter.transition))
    write_atomically(profiles, lambda path: save_profile(path, profile))
    save_choice(kept, name, tuner.choice(), context=tuner.context, prompts=prompts.name)
    print(f"wrote {kept} and {profiles}")
