"""Train draft heads on the text, anchors, batches and steps of `firp train`, at several learning rates.

python -m benchmarks.baselines.train --data text.npz --output heads --steps 1000

Each kind is trained at every rate of the sweep for `--sweep-steps`, then at the best for `--steps`. The best has the
least held-out KL, offsets weighed as in the loss. Run the same command again to resume. `curves.json` holds every curve
and the settings; `KIND/heads.safetensors` are the heads. The kind "firp" is `firp train` itself, so that both learn
from one text; `firp/` is then a predictor.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from firp.cli.options import choose_device
from firp.decoder.passes import RealRows, real_rows
from firp.decoder.view import DecoderView
from firp.tools.environment import environment
from firp.tools.files import locked, read_object, write_atomically
from firp.train.config import TrainConfig
from firp.train.data import Batch, frequent_tokens
from firp.train.objective import ANCHORS_AT_ONCE, OffsetScores, sums_of
from firp.train.rows import RowStore
from firp.train.start import solve_ridge
from firp.train.targets import divergence_of, rank_of
from firp.train.trainer import LOG, ROWS, Trainer
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines.heads import CURVES, KINDS, Heads
from benchmarks.commands import run
from benchmarks.document import digest

EVALUATE_EVERY = 50
FIRP = "firp"


@dataclass(frozen=True)
class HeadConfig(TrainConfig):
    """`TrainConfig` of heads; `insertion_layer` is where an early exit reads, and which rows are kept.

    Attributes:
        kind: of `KINDS`.
        loss_vocabulary: the loss is over so many tokens, the most frequent ones of the answers; 0: over all.
    """

    transition_rank: int = 0
    kind: str = KINDS[0]
    loss_vocabulary: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_vocabulary < 0:
            raise ValueError(f"loss_vocabulary: got {self.loss_vocabulary}, expected at least 0 (0: all tokens)")
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name, value in (("transition_rank", 0), ("update_width", 0), ("draft_vocabulary", 0), ("start_from", None)):
            if getattr(self, name) != value:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {value}: heads have none")


@dataclass(frozen=True)
class HeadObjective:
    """KL(model at i + j || heads[j] at i) over anchors i and offsets j, weighed as the predictor's maps are.

    Attributes:
        view: the base model.
        loss_view: the same, or with a head of fewer tokens: both distributions of the loss are over its tokens.
        offset_weights: [k].
    """

    view: DecoderView
    loss_view: DecoderView
    offset_weights: Tensor

    def __call__(
        self,
        heads: Heads,
        tokens: Tensor,
        real: RealRows,
        anchors: Tensor,
        valid: Tensor,
        want_gradient: bool,
        count: int | None = None,
    ) -> OffsetScores:
        """As `firp.train.objective.Objective`; without a gradient over all tokens."""
        view = self.loss_view if want_gradient else self.view
        length, device = tokens.shape[1], tokens.device
        k = len(self.offset_weights)
        flat = (torch.arange(len(anchors), device=device)[:, None] * length + anchors)[valid]
        flat = flat.sort().values  # in the order of the text, so that neighbours share what the model's head scores
        states = real.final if heads.kind == "medusa" else real.inserted
        sums = torch.zeros(6, k, device=device)
        count = max(len(flat), 1) if count is None else count
        for index in flat.split(ANCHORS_AT_ONCE[device.type == "cuda"]):
            positions = index[:, None] + torch.arange(1, k + 1, device=device)
            targets, inverse = positions.unique(return_inverse=True)
            with torch.no_grad():
                teacher = view.logits(real.final.flatten(0, 1)[targets])[inverse].float()
            with torch.set_grad_enabled(want_gradient):
                scores = heads.scores(view, states.flatten(0, 1)[index]).float()
                divergence = divergence_of(scores, teacher)
                loss = (divergence * self.offset_weights).sum() / count
            if want_gradient:
                loss.backward(inputs=list(heads.parameters()))
            rank = rank_of(scores.detach(), teacher.argmax(-1))
            sums += sums_of(divergence, rank, rank)
        return OffsetScores.of(sums, count)


def with_head_of(view: DecoderView, tokens: Tensor) -> DecoderView:
    """The view with those rows of its head alone, tokens [n]."""
    narrow, head = copy.copy(view), view.model.get_output_embeddings()
    weight, bias = head.weight[tokens], getattr(head, "bias", None)
    bias = None if bias is None else bias[tokens]
    narrow.head = lambda hidden: functional.linear(hidden, weight, bias)
    return narrow


def exit_rows(view: DecoderView, batch: Batch, layer: int) -> tuple[Tensor, ...]:
    """What `RidgeAccumulator.add` takes of a batch: states at the layer predict later final ones."""
    rows = real_rows(view, batch.tokens, layer)
    return rows.inserted, batch.lengths, rows.final


class SharedRows(Trainer):
    """`firp train` with its rows in the folder above: all runs of a command read the same."""

    def open_store(self) -> RowStore:
        config = self.config
        made_from = {name: getattr(config, name) for name in ("model", "data", "dtype")}
        path = self.output.parent / ROWS
        return RowStore(path, self.view, self.dataset, config.insertion_layer, config.max_length, made_from)


class HeadTrainer(SharedRows):
    """`firp train` with heads in the predictor's place: same files, same order of batches and anchors, same schedule.

    An early exit starts from the ridge regression onto final hidden states, as maps do onto those of their own layer.
    Medusa's heads start from the model's own scores.
    """

    config: HeadConfig

    def make_predictor(self) -> Heads:  # type: ignore[override]
        config = self.config
        layer = self.view.num_layers if config.kind == "medusa" else config.insertion_layer
        heads = Heads(config.kind, config.num_offsets, self.model.config.hidden_size, layer, config.model)
        heads.check_view(self.view)
        return heads.to(self.device)

    def parameter_groups(self) -> list[dict]:
        parameters = list(self.predictor.parameters())
        return [{"params": parameters, "peak": self.config.learning_rate, "weight_decay": 0.0}]

    def make_objective(self) -> HeadObjective:  # type: ignore[override]
        config = self.config
        weights = config.offset_decay ** torch.arange(config.num_offsets, device=self.device)
        loss_view = self.view
        if config.loss_vocabulary:
            size = self.model.config.vocab_size
            if config.loss_vocabulary > size:
                raise ValueError(f"loss_vocabulary: got {config.loss_vocabulary}, expected at most {size} (vocab_size)")
            tokens = frequent_tokens(self.dataset, self.train_indices, config.loss_vocabulary, size)
            loss_view = with_head_of(self.view, tokens.to(self.device))
        return HeadObjective(self.view, loss_view, weights)

    @torch.no_grad()
    def set_start(self) -> None:
        if self.config.kind == "early-exit" and self.config.ridge_tokens:
            maps = solve_ridge(
                self.config, self.view, self.dataset, self.train_indices, self.ranks, self.progress, exit_rows
            )
            self.predictor.weight.copy_(maps)

    def write_result(self) -> None:
        self.predictor.save(self.output)


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
    kind, make = (config.kind, HeadTrainer) if isinstance(config, HeadConfig) else (FIRP, SharedRows)

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
    text = {"text": digest(trainer.dataset.tokens.tobytes()), "sequences": len(trainer.train_indices)}
    settings = asdict(chosen) | {"data": Path(chosen.data).name} | text
    found |= {"learning_rate": best, "curve": curve(output / kind), "settings": settings}
    found["environment"] = environment(trainer.model)
    return found


def main(
    data: Annotated[str, typer.Option(help="File written by `firp distill`.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs and of curves.json.")],
    model: Annotated[str, typer.Option(help="Base model, as `firp train` takes it.")] = "smollm2-135m",
    kinds: Annotated[str, typer.Option(help="Comma-separated: medusa, early-exit, firp.")] = ",".join(KINDS),
    learning_rates: Annotated[str, typer.Option(help="Comma-separated peaks; one is taken as it is.")] = (
        "1e-4,3e-4,1e-3,3e-3"
    ),
    sweep_steps: Annotated[int, typer.Option(help="Optimizer steps of each rate of the sweep.")] = 100,
    insertion_layer: Annotated[int, typer.Option(help="t: where an early exit reads.")] = 20,
    num_offsets: Annotated[int, typer.Option(help="k: future positions predicted.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps at the best rate.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    anchors: Annotated[int, typer.Option(help="Anchors drawn from each sequence.")] = 64,
    max_length: Annotated[int, typer.Option(help="Sequences are cut to this many tokens.")] = 512,
    ridge_tokens: Annotated[int, typer.Option(help="Tokens of an early exit's closed-form start.")] = 100_000,
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
    if unknown := [kind for kind in names if kind not in (*KINDS, FIRP)]:
        raise ValueError(f"kind: got {unknown[0]!r}, expected one of {', '.join((*KINDS, FIRP))}")
    if FIRP in names and loss_vocabulary:
        raise ValueError(f"loss_vocabulary: got {loss_vocabulary} with firp, expected 0: its loss is over all tokens")
    common = {"ridge_tokens": ridge_tokens, "held_out": held_out, "seed": seed, "dtype": dtype, "keep_rows": keep_rows}
    sizes = model, data, insertion_layer, num_offsets, steps, batch_size, anchors, max_length, rates[0]
    configs: dict[str, TrainConfig] = {
        kind: TrainConfig(*sizes, **common)
        if kind == FIRP
        else HeadConfig(*sizes, **common, kind=kind, loss_vocabulary=loss_vocabulary)
        for kind in names
    }
    if sweep_steps < 1:
        raise ValueError(f"sweep_steps: got {sweep_steps}, expected at least 1")
    if time_limit is not None and not time_limit >= 0:
        raise ValueError(f"time_limit: got {time_limit:g}, expected at least 0 seconds")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    path = output / CURVES
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        document = read_object(path) if path.is_file() else {}
        for kind, config in configs.items():
            found = train_kind(config, rates, sweep_steps, output, choose_device(device), deadline)
            if found is None:
                print("time is over; run the same command again to go on")
                raise typer.Exit(1)
            document[kind] = found
            write_atomically(path, lambda staged: staged.write_text(json.dumps(document, indent=1) + "\n"))
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
