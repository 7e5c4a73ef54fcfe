"""Draft heads in the predictor's place of `firp train`, and FIRP itself beside them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from firp.decoder.passes import RealRows, real_rows
from firp.decoder.view import DecoderView
from firp.train.config import TrainConfig
from firp.train.data import Batch, frequent_tokens
from firp.train.objective import ANCHORS_AT_ONCE, OffsetScores, sums_of
from firp.train.rows import RowStore
from firp.train.start import solve_ridge
from firp.train.targets import divergence_of, rank_of
from firp.train.trainer import ROWS, Trainer
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines.heads import KINDS, Heads


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
    """`firp train` with its rows in the folder above: all runs of a command read the same, but for pseudo rows."""

    def open_store(self) -> RowStore:
        config = self.config
        if config.keeps_pseudo_rows:
            return super().open_store()
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
        if not 1 <= layer <= self.view.num_layers:
            raise ValueError(f"insertion_layer: got {layer}, expected 1..{self.view.num_layers}")
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
