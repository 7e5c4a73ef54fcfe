"""Train draft heads on the text, anchors, batches and steps of `firp train`, at several learning rates.

python -m benchmarks.baselines.train --data text.npz --output heads --steps 1000

Each kind is trained at every rate of the sweep for `--sweep-steps`, then at the best for `--steps`. The best has the
least held-out KL, offsets weighed as in the loss. Run the same command again to resume. `curves.json` holds every curve
and the settings; `KIND/heads.safetensors` are the heads. The kind "firp" is `firp train` itself, and "firp-update" an
update over the maps of `firp/`, which stay as they are; both folders hold a predictor. All kinds in a folder learn from
one text, held-out sequences, batches and anchors: `settings.json` holds these, and other ones are refused.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from firp.cli.options import choose_device
from firp.tools.environment import environment
from firp.tools.files import check_writable, locked, read_object, write_atomically
from firp.train.config import TrainConfig
from firp.train.data import load_dataset
from firp.train.trainer import CHECKPOINT, LOG

from benchmarks.baselines.heads import CURVES, KINDS
from benchmarks.baselines.trainers import HeadConfig, HeadTrainer, SharedRows
from benchmarks.commands import run
from benchmarks.document import digest_of_text, keep_settings, make_folder

EVALUATE_EVERY = 50
FIRP, UPDATE = PREDICTORS = "firp", "firp-update"
UPDATED = {"learning_rate": 0.0, "update_width": 512, "draft_vocabulary": 16_384}
# Of a run, what all kinds in a folder have in common.
SETTINGS = "settings.json"
COMMON = ("model", "num_offsets", "batch_size", "anchors", "max_length", "held_out", "seed", "dtype")


def curve(folder: Path) -> list[dict]:
    """Held-out lines of a run's log, the start among them."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line for line in lines if line["event"] != "train"]


def weighed_kl(line: dict, decay: float) -> float:
    """Held-out loss of a line: KL of offset j weighs decay ** (j - 1); infinite where training diverged."""
    loss = sum(kl * decay**j for j, kl in enumerate(line["kl"]))
    return loss if math.isfinite(loss) else math.inf


def train_kind(
    config: TrainConfig, rates: list[float], sweep_steps: int, output: Path, device: str, deadline: float | None
) -> dict | None:
    """Sweep, then train at the best rate; what `curves.json` holds of the kind, or None where time was over."""
    trainer = None
    kind = config.kind if isinstance(config, HeadConfig) else UPDATE if config.update_width else FIRP
    make = SharedRows if kind in PREDICTORS else HeadTrainer

    def finishes(config: TrainConfig, folder: Path) -> bool:
        nonlocal trainer
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return False
        trainer = make(config, folder, device)
        return trainer.run(left, evaluate_every=EVALUATE_EVERY)

    found: dict = {"sweep": {}}
    for rate in rates if len(rates) > 1 else []:
        folder = output / f"{kind}-sweep-{rate:g}"
        if not finishes(replace(config, learning_rate=rate, steps=sweep_steps), folder):
            return None
        found["sweep"][f"{rate:g}"] = curve(folder)
    last = {float(rate): weighed_kl(lines[-1], config.offset_decay) for rate, lines in found["sweep"].items()}
    best = min(last, key=last.__getitem__) if last else rates[0]
    chosen = replace(config, learning_rate=best)
    if not finishes(chosen, output / kind):
        return None
    text = {"text": digest_of_text(trainer.dataset), "sequences": len(trainer.train_indices)}
    paths = {name: Path(path).name for name in ("data", "start_from") if (path := getattr(chosen, name))}
    settings = asdict(chosen) | paths | text
    found |= {"learning_rate": best, "curve": curve(output / kind), "settings": settings}
    found["environment"] = environment(trainer.model)
    return found


def main(
    data: Annotated[str, typer.Option(help="File written by `firp distill`.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs and of curves.json.")],
    model: Annotated[str, typer.Option(help="Base model, as `firp train` takes it.")] = "smollm2-135m",
    kinds: Annotated[str, typer.Option(help="Comma-separated: medusa, early-exit, firp, firp-update.")] = ",".join(
        KINDS
    ),
    learning_rates: Annotated[str, typer.Option(help="Comma-separated peaks; one is taken as it is.")] = (
        "1e-4,3e-4,1e-3,3e-3"
    ),
    sweep_steps: Annotated[int, typer.Option(help="Optimizer steps of each rate of the sweep.")] = 100,
    insertion_layer: Annotated[int, typer.Option(help="t of FIRP; where an early exit reads.")] = 20,
    num_offsets: Annotated[int, typer.Option(help="k: future positions predicted.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps at the best rate.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    anchors: Annotated[int, typer.Option(help="Anchors drawn from each sequence.")] = 64,
    max_length: Annotated[int, typer.Option(help="Sequences are cut to this many tokens.")] = 512,
    ridge_tokens: Annotated[
        int, typer.Option(help="Tokens of the closed form that an early exit and FIRP start from.")
    ] = 100_000,
    held_out: Annotated[int, typer.Option(help="Sequences kept for accuracy.")] = 64,
    loss_vocabulary: Annotated[
        int, typer.Option(help="Loss over so many tokens, the most frequent of the answers; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the anchors.")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    keep_rows: Annotated[bool, typer.Option(help="Keep the base model's rows beside the runs.")] = False,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which to stop with a checkpoint.")] = None,
) -> None:
    """Train Medusa-1 and early-exit heads, and FIRP beside them; defaults are those of `firp train`."""
    try:
        rates = sorted({float(rate) for rate in learning_rates.split(",")})
    except ValueError as error:
        raise ValueError(f"learning_rates: got {learning_rates!r}, expected numbers: {error}") from error
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"learning_rates: got {learning_rates!r}, expected numbers above 0")
    names = kinds.split(",")
    if len(set(names)) < len(names) or not set(names) <= {*KINDS, *PREDICTORS}:
        raise ValueError(f"kinds: got {kinds!r}, expected one or more of {', '.join((*KINDS, *PREDICTORS))}, each once")
    if {FIRP, UPDATE} & set(names) and loss_vocabulary:
        raise ValueError(f"loss_vocabulary: got {loss_vocabulary} with firp, expected 0: its loss is over all tokens")
    if UPDATE in names and FIRP not in names and not (output / FIRP / "config.json").is_file():
        raise ValueError(f"kinds: got {kinds!r}, expected {FIRP} with it: {output / FIRP} holds no predictor yet")
    others = {"ridge_tokens": ridge_tokens, "held_out": held_out, "seed": seed, "dtype": dtype, "keep_rows": keep_rows}
    sizes = model, data, insertion_layer, num_offsets, steps, batch_size, anchors, max_length, rates[0]
    configs: dict[str, TrainConfig] = {
        kind: TrainConfig(*sizes, **others)
        if kind in PREDICTORS
        else HeadConfig(*sizes, **others, kind=kind, loss_vocabulary=loss_vocabulary)
        for kind in sorted(names, key=[*PREDICTORS, *KINDS].index)  # the model may be too small for a transition
    }
    if UPDATE in configs:
        configs[UPDATE] = replace(configs[UPDATE], start_from=str(output / FIRP), **UPDATED)
    if sweep_steps < 1:
        raise ValueError(f"sweep_steps: got {sweep_steps}, expected at least 1")
    if time_limit is not None and not time_limit >= 0:
        raise ValueError(f"time_limit: got {time_limit:g}, expected at least 0 seconds")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    make_folder("output", output)
    path = output / CURVES
    check_writable(path)
    with locked(output):
        text = {"text": digest_of_text(load_dataset(data))}
        common = {name: getattr(configs[names[0]], name) for name in COMMON}
        keep_settings(output / SETTINGS, common | text, list(output.glob(f"*/{CHECKPOINT}")))
        try:
            document = read_object(path) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path}: {error}; remove it, and the same command writes it again") from error
        for kind, config in configs.items():
            own = [config.learning_rate] if kind == UPDATE else rates
            found = train_kind(config, own, sweep_steps, output, choose_device(device), deadline)
            if found is None:
                print("time is over; run the same command again to go on")
                raise typer.Exit(1)
            document[kind] = found
            write_atomically(path, lambda staged: staged.write_text(json.dumps(document, indent=1) + "\n"))
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
