"""What `firp train` is changed to, one thing at a time, and the runs that train it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast
from unittest import mock

import numpy as np
import torch
from firp.decoder.passes import RealRows, RecordingAttention, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import UnitEmbeddings, make_tables
from firp.train.config import TrainConfig
from firp.train.data import BatchOrder, frequent_tokens, make_batch
from firp.train.objective import Objective
from firp.train.start import set_start
from firp.train.targets import divergence_of
from firp.train.trainer import PROFILE, Trainer
from firp.train.worth import write_profile
from torch import Tensor, nn

from benchmarks.ablations.two_tokens import places_and_ranks
from benchmarks.closed_form import Source, solve, states_after

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
        reads: further states that the maps read, as shares of t: 0.5 is that after layer t / 2, 0 the embedding.
        units: SiLU units of the state after layer t, which all maps read and which learn with them.
    """

    divergence: Divergence = divergence_of
    settings: dict = field(default_factory=dict)
    state_weight: float = 0.0
    two_tokens: bool = False
    reads: tuple[float, ...] = ()
    units: int = 0

    @property
    def wide(self) -> bool:
        """Whether maps read more than one state, as no predictor of the package does."""
        return bool(self.reads or self.units)


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
    **{f"KL, k = {k}": Variant(settings={"num_offsets": k}) for k in (2, 4, 5, 6)},
    "KL, maps read t / 2 too": Variant(reads=(0.5,)),
    "KL, maps read t / 2 and the embedding too": Variant(reads=(0.5, 0.0)),
    "KL, maps read 1,024 units too": Variant(units=1024),
    **{f"KL, t = {t}": Variant(settings={"insertion_layer": t}) for t in (29, 25, 15, 10, 5)},
}


class TwoTokenPredictor(FirpPredictor):
    """A predictor whose transition has a map [d, r] for the token before the one before."""

    second: nn.Parameter

    @property
    def final_tensors(self) -> list[Tensor]:
        return [*super().final_tensors, self.second]

    def second_table(self, view: DecoderView) -> Tensor:
        """[V, r] in the model's dtype, as `token_tables` makes the first."""
        maps = torch.stack([self.second, self.second])
        return make_tables(view.embed, view.decoder.embed_tokens.weight.shape[0], maps, view.dtype, view.device)[0]


class TwoTokenObjective(Objective):
    """The objective whose transition reads two tokens. The row of offset 1 knows the second one, its anchor's own."""

    def query(self, predictor: FirpPredictor, before: Tensor) -> Tensor:
        query = super().query(predictor, before)
        further = cast(UnitEmbeddings, self.embeddings)(before[:, :-1]) @ cast(TwoTokenPredictor, predictor).second
        return torch.cat([query[:, :1], query[:, 1:] + further], 1)


class WidePredictor(FirpPredictor):
    """A predictor whose maps [k, d, s] read what `Source` puts side by side.

    Attributes:
        units: [m, d] SiLU units that learn, or None.
    """

    units: nn.Parameter | None

    @property
    def map_tensors(self) -> list[Tensor]:
        return [*super().map_tensors, *([] if self.units is None else [self.units])]


class VariantTrainer(Trainer):
    """`firp train` with what a variant changes."""

    def __init__(self, variant: Variant, config: TrainConfig, output: Path, device: str) -> None:
        self.variant = variant
        super().__init__(replace(config, **variant.settings), output, device)

    def make_predictor(self) -> FirpPredictor:
        config, variant = self.config, self.variant
        if not variant.two_tokens and not variant.wide:
            return super().make_predictor()
        kind = WidePredictor if variant.wide else TwoTokenPredictor
        made = kind.for_model(self.model, config.num_offsets, config.insertion_layer, **config.sizes)
        size = made.hidden_size
        if isinstance(made, TwoTokenPredictor):
            made.second = nn.Parameter(torch.zeros(size, made.transition_rank))
        if isinstance(made, WidePredictor):
            generator = torch.Generator().manual_seed(config.seed)
            units = torch.randn(variant.units, size, generator=generator) * size**-0.5
            made.units = nn.Parameter(units) if variant.units else None
            further = torch.zeros(config.num_offsets, size, size * len(variant.reads) + variant.units)
            made.weight = nn.Parameter(torch.cat([made.weight.detach(), further], -1))
        return made.to(self.device)

    def parameter_groups(self) -> list[dict]:
        groups = super().parameter_groups()
        if self.variant.two_tokens:
            groups[1]["params"].append(self.predictor.second)
        return groups

    @property
    def source(self) -> Source:
        """What the maps read."""
        layer = self.config.insertion_layer
        units = self.predictor.units if isinstance(self.predictor, WidePredictor) else None
        return Source((layer, *(max(int(layer * share), int(share > 0)) for share in self.variant.reads)), units)

    def set_start(self) -> None:
        """The closed form; units begin at random, and the maps do not read them yet."""
        if not self.variant.wide:
            return super().set_start()
        config, state = self.config, Source(self.source.layers)
        unsolved = replace(config, ridge_tokens=0)
        set_start(self.predictor, unsolved, self.view, self.dataset, self.train_indices, self.ranks, self.progress)
        if not config.ridge_tokens:
            return
        order = BatchOrder(self.dataset, self.train_indices, config.batch_size, config.seed)
        partial, arguments = self.output / "start.partial.pt", (config.num_offsets, config.ridge_tokens)
        found = solve(self.view, self.dataset, order, {"maps": state}, *arguments, partial, ["start"])["maps"]
        partial.unlink(missing_ok=True)
        with torch.no_grad():
            self.predictor.weight[..., : found.shape[-1]] = found

    def real_rows(self, indices: np.ndarray) -> RealRows:
        if not self.variant.wide:
            return super().real_rows(indices)  # type: ignore[return-value]
        tokens = make_batch(self.dataset, indices, self.config.max_length).tokens.to(self.device)
        return wide_rows(self.source, self.view, tokens, self.config.insertion_layer)

    def write_result(self) -> None:
        """No file holds wide maps or a second table: their predictors have a profile alone."""
        changed = {}
        if self.variant.wide:
            changed = {"real_rows": functools.partial(wide_rows, self.source)}
        elif isinstance(self.predictor, TwoTokenPredictor):
            changed = {"places_and_ranks": functools.partial(places_and_ranks, self.predictor.second_table(self.view))}
        else:
            return super().write_result()
        with mock.patch.multiple("firp.drafting.recording", **changed):
            write_profile(self.output / PROFILE, self.view, self.predictor, self.dataset, self.held_out_indices)

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


def wide_rows(source: Source, view: DecoderView, tokens: Tensor, insertion_layer: int) -> RealRows:
    """The model's own rows of sequences, tokens [B, T], where the maps read all that `source` does: [B, T, s]."""
    real = real_rows(view, tokens, insertion_layer)
    with torch.no_grad():
        below = [layer for layer in source.layers if layer != insertion_layer]
        states = states_after(view, tokens, below, RecordingAttention(view.num_layers)) if below else {}
    states |= {insertion_layer: real.inserted}
    return RealRows(source.of(states).to(real.inserted.dtype), real.final, real.recorded)
