"""What maps and transition learn from: other losses, weights of offsets, ranks and tokens before, at equal steps, text
and anchors.

python -m benchmarks.ablations.losses --data text.npz --output runs

Each variant is `firp train` from the same closed-form start, with one thing changed. Held-out scores are always of
the KL, and tau is replayed on the model's greedy answers to held-out prompts. Run the same command again
to go on with the variants that are missing; an interrupted one resumes from its checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, cast

import firp
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.cli.options import choose_device
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import load_profile
from firp.drafting.transition import UnitEmbeddings
from firp.drafting.trees import TreeConfig
from firp.tools.environment import environment
from firp.tools.files import locked
from firp.train.config import TrainConfig
from firp.train.data import frequent_tokens, load_dataset
from firp.train.objective import Objective
from firp.train.targets import divergence_of
from firp.train.trainer import LOG, PROFILE, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.commands import run
from benchmarks.document import Document, digest

OUT = Path(__file__).parents[1] / "results/losses.json"
TREES = ((4, 2, 2), (8, 8, 3), (64, 64, 3))
LISTED = 8192
Divergence = Callable[[Tensor, Tensor], Tensor]


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the L1 distance of two distributions, from scores [n, k, V]: [n, k]. It is what sampling rejects."""
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


def choice_and_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """0.1 times the cross-entropy of the model's choice, and 0.9 times the L1 distance."""
    choice = teacher.argmax(-1, keepdim=True)
    entropy = -student.log_softmax(-1).gather(-1, choice)[..., 0]
    return 0.1 * entropy + 1.8 * total_variation(student, teacher)


def among(listed: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The KL of both distributions over the listed tokens alone."""
    return divergence_of(student[..., listed], teacher[..., listed])


def state_distance(states: Tensor, own: Tensor) -> Tensor:
    """The squared distance of final states from the model's own, both [n, k, d], over the square of these: [n, k]."""
    states, own = states.float(), own.float()
    return (states - own).square().sum(-1) / own.square().sum(-1)


@dataclass(frozen=True)
class Variant:
    """What is learned, and settings of `firp train` that differ.

    Attributes:
        state_weight: of `state_distance` beside the divergence.
        two_tokens: whether the transition reads the token before the one before, too.
    """

    divergence: Divergence = divergence_of
    settings: dict = field(default_factory=dict)
    state_weight: float = 0.0
    two_tokens: bool = False


VARIANTS = {
    "KL": Variant(),
    "total variation": Variant(total_variation),
    "0.1 cross-entropy of the choice, 0.9 L1": Variant(choice_and_distance),
    f"KL over {LISTED} tokens": Variant(among),
    "KL, offset i weighs exp(-i / 4)": Variant(settings={"offset_decay": math.exp(-0.25)}),
    "KL, no transition": Variant(settings={"transition_rank": 0}),
    "KL, transition of rank 256": Variant(settings={"transition_rank": 256}),
    "KL and the distance of states": Variant(state_weight=1.0),
    "KL, transition over two tokens": Variant(two_tokens=True),
}


class TwoTokenPredictor(FirpPredictor):
    """A predictor whose transition has a map [d, r] for the token before the one before."""

    second: nn.Parameter

    @property
    def final_tensors(self) -> list[Tensor]:
        return [*super().final_tensors, self.second]


class TwoTokenObjective(Objective):
    """The objective whose transition reads two tokens. The row of offset 1 knows the second one, its anchor's own."""

    def query(self, predictor: FirpPredictor, before: Tensor) -> Tensor:
        query = super().query(predictor, before)
        further = cast(UnitEmbeddings, self.embeddings)(before[:, :-1]) @ cast(TwoTokenPredictor, predictor).second
        return torch.cat([query[:, :1], query[:, 1:] + further], 1)


class VariantTrainer(Trainer):
    """`firp train` with the loss of a variant."""

    def __init__(self, variant: Variant, config: TrainConfig, output: Path, device: str) -> None:
        self.variant = variant
        super().__init__(replace(config, **variant.settings), output, device)

    def make_predictor(self) -> FirpPredictor:
        if not self.variant.two_tokens:
            return super().make_predictor()
        config = self.config
        made = TwoTokenPredictor.for_model(self.model, config.num_offsets, config.insertion_layer, **config.sizes)
        made.second = nn.Parameter(torch.zeros(made.hidden_size, made.transition_rank))
        return made.to(self.device)

    def parameter_groups(self) -> list[dict]:
        groups = super().parameter_groups()
        if self.variant.two_tokens:
            groups[1]["params"].append(self.predictor.second)
        return groups

    def write_result(self) -> None:
        """No replay has drafts after two tokens."""
        if not self.variant.two_tokens:
            super().write_result()

    def make_objective(self) -> Objective:
        divergence = self.variant.divergence
        if divergence is among:
            size = self.model.config.vocab_size
            listed = frequent_tokens(self.dataset, self.train_indices, min(LISTED, size), size)
            divergence = functools.partial(among, listed.to(self.device))
        made = super().make_objective()
        kind = TwoTokenObjective if self.variant.two_tokens else Objective
        weight = self.variant.state_weight
        distance = (lambda states, own: weight * state_distance(states, own)) if weight else None
        return kind(**vars(made) | {"divergence": divergence, "state_distance": distance})


def folder_of(name: str, settings: dict) -> str:
    """A name for the run of a variant: another loss, text or setting has another one, and so no checkpoint of this."""
    made_from = json.dumps([name, settings], sort_keys=True).encode()
    return f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{hashlib.blake2b(made_from, digest_size=4).hexdigest()}"


def figures(make: Callable[[], Trainer]) -> dict:
    """Train to the end; held-out scores, of the start too, and tau of the trees."""
    trainer = make()
    trainer.run()
    found = trainer.output / PROFILE
    profile = load_profile(found) if found.exists() else None
    lines = [json.loads(line) for line in (trainer.output / LOG).read_text().splitlines()]
    scores = {name: lines[-1][name] for name in ("kl", "top1", "top4", "followed1", "followed4")}
    tau = {f"{n}, {p}, {k}": profile and profile.tau(TreeConfig(n, p), k) for n, p, k in TREES}
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
) -> None:
    """Train and measure every variant."""
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
    json_path.parent.mkdir(parents=True, exist_ok=True)
    with locked(json_path.parent):
        document = Document(json_path, settings, environment(base))
        for name, variant in VARIANTS.items():
            make = functools.partial(
                VariantTrainer, variant, config, output / folder_of(name, settings | variant.settings), where
            )
            document.part(name, variant.settings, functools.partial(figures, make))
    show(document.figures)


def show(found: dict[str, dict]) -> None:
    first = next(iter(found.values()))
    offsets = range(1, 1 + len(first["kl"]))
    table = Table(
        "learned",
        *(f"KL {j}" for j in offsets),
        *(f"top-1 {j}" for j in offsets),
        *(f"tau {tree}" for tree in first["tau"]),
    )
    for name, figures in found.items():
        accuracies = (f"{100 * share:.2f}" for share in figures["followed1"])
        table.add_row(
            name,
            *(f"{x:.3f}" for x in figures["kl"]),
            *accuracies,
            *("" if x is None else f"{x:.3f}" for x in figures["tau"].values()),
        )
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    run(main)
