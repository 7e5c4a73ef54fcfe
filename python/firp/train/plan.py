"""What a training run needs of memory and disk, from shapes."""

from __future__ import annotations

from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.train.config import TrainConfig
from firp.train.data import TextDataset
from firp.train.ranks import TrainingRanks
from firp.train.rows import row_width


def needs(
    config: TrainConfig, view: DecoderView, predictor: FirpPredictor, dataset: TextDataset, ranks: TrainingRanks
) -> list[str]:
    """Lines to print before a run; what a step computes on the way comes on top."""
    model = sum(tensor.numel() * tensor.element_size() for tensor in view.model.parameters())
    trained = sum(tensor.numel() * tensor.element_size() for tensor in predictor.parameters())
    frozen = config.num_offsets if config.keeps_pseudo_rows else 0
    token = row_width(view, config.insertion_layer, frozen) * view.dtype.itemsize
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
