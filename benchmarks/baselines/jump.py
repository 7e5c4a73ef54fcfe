"""The jump drafter of `economize` 0.3.2 (Apache-2.0, from PyPI), trained by its own recipe and decoded by its own loop.

pip install --no-deps economize==0.3.2
python -m benchmarks.baselines.jump --data text.npz --output jump --steps 1000

It is trained on the text and steps of `firp train`, its loss at the answers' positions alone. A cycle is one exact pass
over what was not computed yet, and up to `--cycle-lengths` - 1 draft steps, each through some of the layers. So tokens
per exact pass say less than for drafters without steps of their own: its layer passes are counted beside them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import firp
import torch
import typer
from firp.cli.options import choose_device, integers
from firp.generation.batch import stop_ids
from firp.tools.environment import environment
from firp.tools.figures import cut
from firp.tools.files import locked, write_atomically
from firp.tools.prompt_files import OWN_PROMPTS, encode, load_prompts
from firp.train.data import TextDataset, load_dataset, split_held_out
from rich.console import Console
from rich.table import Table

from benchmarks.commands import check_length, run
from benchmarks.document import digest_of_text, keep_settings, make_folder

VERSION = "0.3.2"
PREDICTORS, ADAPTATIONS = ("linear", "mlp"), ("frozen", "lora", "full")
SKIPPED = f"skipped: economize is not installed; pip install --no-deps economize=={VERSION}"


def examples(dataset: TextDataset, indices: list[int], max_length: int) -> list[Any]:
    """Sequences whose answers, and the end of their prompts, are targets."""
    from economize.train import Example

    made = []
    for index in indices:
        tokens = dataset.sequence(index)[:max_length]
        answer = dataset.answer_mask(index)[:max_length]
        mask = answer.long()
        mask[:-1] |= answer[1:].long()  # the last token before an answer predicts its first
        made.append(Example(tokens, mask))
    return made


def layers(num_layers: int) -> dict[str, int]:
    """Where its authors put a jump in 24 layers (m = 16, u = r = 17), at the same share of others."""
    target = round(16 * num_layers / 24)
    return {"target_layer": target, "source_layer": target + 1, "exit_layer": target + 1}


def summary(results: list[Any]) -> dict:
    """Tokens per exact pass, prefill and its token left out, and passes through layers for each token.

    Args:
        results: one `DecodeResult` a prompt.
    """
    tokens, exact, drafts, passes, row_passes = 0, 0, 0, 0, 0
    for result in results:
        events = [event for event in result.cost.events if event.module is None][1:]  # the first is the prompt
        tokens += result.tokens.numel() - 1
        exact += sum(event.kind == "exact" for event in events)
        drafts += sum(event.kind.startswith("draft") for event in events)
        passes += sum(len(event.layer_indices) for event in events)
        row_passes += sum(event.layer_tokens for event in events)
    depth = results[0].num_layers
    return {
        "tokens": tokens, "exact_passes": exact, "draft_steps": drafts, "tau": tokens / max(exact, 1),
        "forwards_per_token": passes / depth / max(tokens, 1),
        "tokens_per_forward_of_layers": tokens * depth / max(passes, 1),
        "row_forwards_per_token": row_passes / depth / max(tokens, 1),
    }  # fmt: skip


def history_of(run: Path) -> list[dict]:
    """What a run logged, by all its processes: a killed one may have logged steps that the next one took again."""
    lines = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return list({line["step"]: line for line in lines}.values())


def main(
    data: Annotated[Path, typer.Option(help="File written by `firp distill`.")],
    output: Annotated[Path, typer.Option(help="Folder of the run and of jump.json.")],
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Sequences are cut to this many tokens.")] = 512,
    held_out: Annotated[int, typer.Option(help="Sequences that are not trained on.")] = 64,
    predictor: Annotated[str, typer.Option(help="Its predictor: linear or mlp.")] = "linear",
    adaptation: Annotated[str, typer.Option(help="Its layers on the jump path: frozen, lora or full.")] = "full",
    cycle_lengths: Annotated[str, typer.Option(help="Comma-separated tokens of a cycle.")] = "2,3,4,6",
    prompts: Annotated[Path, typer.Option(help="JSONL of held-out prompts; default: the project's.")] = OWN_PROMPTS,
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed of training.")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Train and decode economize's jump drafter; skipped by name where the package is not installed."""
    if importlib.util.find_spec("economize") is None:
        print(SKIPPED)
        return
    import economize
    from economize.train import SequenceSource, fit

    if economize.__version__ != VERSION:
        raise ValueError(f"economize: got version {economize.__version__}, expected {VERSION}")
    for name, given, expected in (("predictor", predictor, PREDICTORS), ("adaptation", adaptation, ADAPTATIONS)):
        if given not in expected:
            raise ValueError(f"{name}: got {given!r}, expected one of {', '.join(expected)}")
    for name, given, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if given < least:
            raise ValueError(f"{name}: got {given}, expected at least {least}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected 0..{2**32 - 1}")
    check_length(max_new_tokens)
    lengths = integers("cycle_lengths", cycle_lengths)
    chosen, dataset = load_prompts(prompts, limit), load_dataset(data)
    base, tokenizer = firp.load_model(model, dtype, choose_device(device))
    dataset.check_vocabulary(base.config.vocab_size)
    training, _ = split_held_out(dataset, held_out)
    settings = {
        "economize": VERSION, "model": model, "data": data.name, "text": digest_of_text(dataset),
        "sequences": len(training), "held_out": held_out, "steps": steps, "batch_size": batch_size,
        "max_length": max_length, "predictor": predictor, "adaptation": adaptation, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    placed = layers(base.config.num_hidden_layers)
    config = economize.JumpConfig(**placed, predictor=predictor, adaptation=adaptation)
    encoded = (encode(tokenizer, [{"role": "user", "content": prompt.turns[0]}]) for prompt in chosen)
    rows = [torch.tensor(row, device=base.device) for row in encoded]
    make_folder("output", output)
    with locked(output):
        keep_settings(output / "settings.json", settings, [output / "run"])
        drafting = economize.apply(base, config)
        source = SequenceSource(examples(dataset, training.tolist(), max_length), batch_size, seed=seed)
        trained = fit(
            drafting, source, steps=steps, batch_size=batch_size, output_dir=output / "run", resume=True,
            save_every=100, seed=seed,
        )  # fmt: skip
        history = history_of(output / "run")
        drafting.eval() if hasattr(drafting, "eval") else None
        found: dict[str, dict] = {}
        for length in lengths:
            options = {"decoding": economize.DecodeConfig(cycle_length=length), "stop": stop_ids(base)}
            results = [drafting.decode(row, max_new_tokens, **options) for row in rows]
            found[str(length)] = summary(results)
        document = {
            "environment": environment(base),
            "settings": {
                **settings, **placed, "prompts": prompts.name, "limit": limit, "max_new_tokens": max_new_tokens,
            },
            "parameters": sum(parameter.numel() for parameter in drafting.technique_parameters()),
            "training": {"steps": trained.steps, "seconds": round(history[-1]["time"], 1), "history": history},
            "cycle_lengths": found,
        }  # fmt: skip
        write_atomically(output / "jump.json", lambda staged: staged.write_text(json.dumps(document, indent=1) + "\n"))
    table = Table("tokens of a cycle", "tau (per exact pass)", "draft steps", "tokens per forward of layers")
    for name, figures in found.items():
        each = figures["tokens_per_forward_of_layers"]
        table.add_row(name, cut(figures["tau"], 3), str(figures["draft_steps"]), cut(each, 3))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run(main)
