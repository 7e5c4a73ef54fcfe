"""What a training run needs of memory, disk and operations, from shapes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from firp.decoder.model_rules import head_counts
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import MAX_RANKS
from firp.engine.weights import Weights
from firp.engine.work import product
from firp.train.config import TrainConfig
from firp.train.data import TextDataset
from firp.train.ranks import TrainingRanks
from firp.train.rows import kept_width, row_width


def needs(
    config: TrainConfig, view: DecoderView, predictor: FirpPredictor, dataset: TextDataset, ranks: TrainingRanks
) -> list[str]:
    """Lines to print before a run; what a step computes on the way comes on top."""
    model = sum(tensor.numel() * tensor.element_size() for tensor in view.model.parameters())
    trained = sum(tensor.numel() * tensor.element_size() for tensor in predictor.parameters())
    token = row_width(view.config, config.insertion_layer) * view.dtype.itemsize
    if config.keeps_pseudo_rows:
        token = kept_width(view.config, config.num_offsets) * view.dtype.itemsize
    share = -(-config.batch_size // ranks.size) * config.max_length
    tokens = sum(min(dataset.length(i), config.max_length) for i in range(len(dataset)))
    lines = [
        f"memory of each of {ranks.size} ranks: base model {model / 1e6:,.1f} MB; predictor with gradient and AdamW "
        f"{4 * trained / 1e6:,.1f} MB; rows {token / 1e3:,.1f} KB a token, up to {share * token / 1e6:,.1f} MB",
        f"disk: checkpoint and predictor {4 * trained / 1e6:,.1f} MB",
    ]
    if config.keep_rows:
        lines[1] += f"; kept rows {token / 1e3:,.1f} KB a token, {tokens * token / 1e6:,.1f} MB"
    return lines


@dataclass(frozen=True)
class TrainingWork:
    """Operations of products in one visit of a sequence; a multiplication and an addition are two.

    Attributes:
        base: the base model's own rows; once in all with kept rows, else at every visit.
        targets: the head over the positions that anchors predict.
        pseudo: pseudo rows through the maps, the layers above and the head, the update and the token transition.
        backward: gradients of the maps, the update and the transition. The base model's weights get none.
    """

    base: int
    targets: int
    pseudo: int
    backward: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def training_work(
    config: PreTrainedConfig,
    weights: Weights,
    tokens: int,
    anchors: int,
    num_offsets: int,
    insertion_layer: int,
    transition_rank: int,
    update_width: int,
) -> TrainingWork:
    """Work for a sequence of so many tokens and anchors. Attention is counted in full, masked scores too; a position
    that several anchors predict, once for each.

    Args:
        weights: of the whole model.
        num_offsets, insertion_layer, transition_rank, update_width: k, t, r, w.
    """
    heads, _, head_dim = head_counts(config)
    attended = 4 * heads * head_dim  # operations of a row and a position that it sees
    depth, rows = len(weights.layers) - insertion_layer, anchors * num_offsets

    def through(layers: tuple, count: int) -> int:
        return sum(product(layer, count, weights.active_experts).operations for layer in layers)

    base = through(weights.layers, tokens) + len(weights.layers) * tokens * tokens * attended
    maps = 2 * rows * config.hidden_size**2
    above, head = through(weights.layers[insertion_layer:], rows), product(weights.head, rows).operations
    seen, chains = depth * rows * tokens * attended, depth * rows * num_offsets * attended
    candidates = min(MAX_RANKS, config.vocab_size)
    transition = 2 * rows * (1 + candidates) * config.hidden_size * transition_rank
    update = 2 * rows * update_width * 3 * config.hidden_size
    inner = 2 * rows * update_width * config.hidden_size  # of what is computed in between
    return TrainingWork(
        base=base,
        targets=head,
        pseudo=maps + above + head + seen + chains + transition + update,
        # Of a frozen product only its input's gradient; both inputs of a chain's own scores have one.
        backward=maps + above + head + seen + 2 * chains + transition + update + inner,
    )
