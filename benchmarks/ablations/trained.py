"""What a predictor learns from, and its shape: losses, weights of offsets, transitions, k, insertion layers, and what
its maps read, at equal steps and text.

python -m benchmarks.ablations.trained --data text.npz --output runs

Each variant is `firp train` from the closed form, with one thing changed. Another k has other anchors, held-out ones
too, as all its targets are inside an answer; another t or further states have a closed form of their own. Held-out
scores are always of the KL, and tau is replayed on the model's greedy answers to held-out prompts. Run the same command
again to go on with the variants that are missing; an interrupted one resumes from its checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import firp
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.cli.options import choose_device
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import load_profile
from firp.drafting.trees import TreeConfig
from firp.tools.environment import environment
from firp.tools.figures import cut, raised
from firp.tools.files import locked
from firp.train.config import TrainConfig
from firp.train.data import load_dataset
from firp.train.trainer import LOG, PROFILE, Trainer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from benchmarks.ablations.variants import VARIANTS, VariantTrainer
from benchmarks.commands import run
from benchmarks.document import Document, digest, make_folder

OUT = Path(__file__).parents[1] / "results/trained.json"
FIELDS = "kl", "followed1", "tau"
TREES = ((4, 2, 2), (8, 8, 3), (64, 64, 3))


def folder_of(name: str, settings: dict) -> str:
    """A name for the run of a variant: another loss, text or setting has another one, and so no checkpoint of this."""
    made_from = json.dumps([name, settings], sort_keys=True).encode()
    return f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{hashlib.blake2b(made_from, digest_size=4).hexdigest()}"


def fits(name: str, config: TrainConfig, model: PreTrainedModel) -> bool:
    """Whether the model can have a variant; one that it cannot is named."""
    try:
        with torch.device("meta"):
            FirpPredictor.for_model(model, config.num_offsets, config.insertion_layer, **config.sizes)
    except ValueError as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return False
    return True


def figures(make: Callable[[], Trainer]) -> dict:
    """Train to the end; held-out scores, of the start too, and tau of the trees."""
    trainer = make()
    trainer.run()
    found = trainer.output / PROFILE
    profile = load_profile(found) if found.exists() else None
    lines = [json.loads(line) for line in (trainer.output / LOG).read_text().splitlines()]
    scores = {name: lines[-1][name] for name in ("kl", "top1", "top4", "followed1", "followed4")}
    offsets = trainer.config.num_offsets
    trees = [*TREES, *((64, 64, k) for k in range(4, offsets + 1))]
    tau = {
        f"{n}, {p}, {k}": profile.tau(TreeConfig(n, p), k) if profile is not None and k <= offsets else None
        for n, p, k in trees
    }
    return {"start": lines[0]["kl"], **scores, "tau": tau, "seconds": round(trainer.seconds, 1)}


def main(
    data: Annotated[Path, typer.Option(help="Training text: a file written by `firp distill`.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs.")],
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    insertion_layer: Annotated[int, typer.Option(help="t.")] = 20,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each variant.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    anchors: Annotated[int, typer.Option(help="Anchors drawn from each sequence.")] = 32,
    ridge_tokens: Annotated[int, typer.Option(help="Tokens of the closed-form start.")] = 30_000,
    held_out: Annotated[int, typer.Option(help="Sequences kept for accuracy and tau.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the anchors.")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A variant's name; more than once for several.")] = None,
) -> None:
    """Train and measure every variant, or those that `only` names."""
    for name in only or ():
        if name not in VARIANTS:
            raise ValueError(f"only: got {name!r}, expected one of {'; '.join(VARIANTS)}")
    config = TrainConfig(
        model, str(data), insertion_layer, 3, steps, batch_size, anchors, ridge_tokens=ridge_tokens, held_out=held_out,
        seed=seed, dtype=dtype,
    )  # fmt: skip
    dataset = load_dataset(data)
    settings = asdict(config) | {
        "data": digest(dataset.tokens.tobytes()), "tau": TAU_FORMULA,
        "trees": "dynamic: nodes, lookahead nodes, offsets",
    }  # fmt: skip
    where = choose_device(device)
    base, _ = firp.load_model(model, dtype, where)
    with torch.device("meta"):
        FirpPredictor.for_model(base, 1, insertion_layer)  # a bad layer is no variant's fault: refused at once
    chosen = {
        name: variant
        for name, variant in VARIANTS.items()
        if (not only or name in only) and fits(name, replace(config, **variant.settings), base)
    }
    make_folder("json", json_path.parent)
    with locked(json_path.parent):
        document = Document(json_path, settings, environment(base), FIELDS)
        for name, variant in chosen.items():
            make = functools.partial(
                VariantTrainer, variant, config, output / folder_of(name, settings | variant.settings), where
            )
            document.part(name, variant.settings, functools.partial(figures, make))
    show(document.figures)


def show(found: dict[str, dict]) -> None:
    """A line a variant: its first three offsets, and tau of `TREES`."""
    offsets, trees = (1, 2, 3), [", ".join(map(str, tree)) for tree in TREES]
    table = Table(
        "learned", *(f"KL {j}" for j in offsets), *(f"top-1 {j}" for j in offsets), *(f"tau {tree}" for tree in trees)
    )
    for name, figures in found.items():
        kl = [raised(x, 3) for x in figures["kl"]]
        accuracies = [cut(100 * share) for share in figures["followed1"]]
        taus = ("" if figures["tau"][tree] is None else cut(figures["tau"][tree], 3) for tree in trees)
        table.add_row(name, *((cells + [""])[j] for cells in (kl, accuracies) for j in range(3)), *taus)
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    run(main)
