"""What a training run starts from: another predictor, or the closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor, load_predictor
from firp.train.config import TrainConfig
from firp.train.data import Batch, TextDataset, epoch_batches, frequent_tokens, make_batch
from firp.train.ranks import TrainingRanks
from firp.train.ridge import RidgeAccumulator, hidden_at_insertion

SOURCE_SCALE = 0.01
INPUT_SCALE = 0.7


@torch.no_grad()
def set_start(
    predictor: FirpPredictor,
    config: TrainConfig,
    view: DecoderView,
    dataset: TextDataset,
    indices: np.ndarray,
    ranks: TrainingRanks,
    progress: bool,
) -> None:
    """Give `predictor` its first weights, the same on every rank.

    Raises:
        ValueError: `start_from` predicts something else, or no sequence is long enough.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if predictor.transition is not None:
        predictor.transition[0] = torch.randn(predictor.transition.shape[1:], generator=generator) * SOURCE_SCALE
    inputs = predictor.update_inputs
    if inputs is not None:
        inputs.copy_(torch.randn(inputs.shape, generator=generator) * INPUT_SCALE * inputs.shape[-1] ** -0.5)
    listed = predictor.draft_tokens
    if listed is not None:
        listed.copy_(frequent_tokens(dataset, indices, len(listed), predictor.vocab_size))
    if config.start_from is not None:
        start = start_of(config, view)
        for name, tensor in predictor.state_dict().items():
            if getattr(start, name) is not None:
                tensor.copy_(getattr(start, name))
    elif config.ridge_tokens:
        predictor.weight.copy_(solve_ridge(config, view, dataset, indices, ranks, progress))
    ranks.copy_first(predictor.parameters())


def start_of(config: TrainConfig, view: DecoderView) -> FirpPredictor:
    """The predictor that `config.start_from` names.

    It may have no transition, update or list of tokens yet, but not one of another size.

    Raises:
        ValueError: it predicts other offsets, or at another layer; the field is named.
    """
    assert config.start_from is not None
    start = load_predictor(config.start_from)
    start.check_model(view.model)
    kept = [name for name in ("transition_rank", "update_width", "draft_vocabulary") if getattr(start, name)]
    for name in ("insertion_layer", "num_offsets", *kept):
        if getattr(start, name) != getattr(config, name):
            raise ValueError(f"{name}: got {getattr(config, name)}, but start_from has {getattr(start, name)}")
    return start


def inserted_rows(view: DecoderView, batch: Batch, layer: int) -> tuple[torch.Tensor, ...]:
    """What `RidgeAccumulator.add` takes of a batch: each hidden state at the layer predicts the later ones there."""
    return hidden_at_insertion(view, batch, layer), batch.lengths


@torch.no_grad()
def solve_ridge(
    config: TrainConfig,
    view: DecoderView,
    dataset: TextDataset,
    indices: np.ndarray,
    ranks: TrainingRanks,
    progress: bool,
    rows: Callable[[DecoderView, Batch, int], tuple[torch.Tensor, ...]] = inserted_rows,
) -> torch.Tensor:
    """Maps [k, d, d] of the closed form, from batches that are shared out among the ranks."""
    accumulator = RidgeAccumulator(config.num_offsets, view.config.hidden_size, view.device)
    batches, tokens = [], 0
    for batch in epoch_batches(dataset, indices, config.batch_size, config.seed, 0):
        lengths = torch.tensor([min(dataset.length(i), config.max_length) for i in batch])
        batches.append(batch)
        tokens += accumulator.usable(lengths)
        if tokens >= config.ridge_tokens:
            break
    with tqdm(total=tokens, desc="ridge", unit="tok", disable=None if progress else True) as bar:
        for chosen in ranks.share(batches):
            batch = make_batch(dataset, chosen, config.max_length).to(view.device)
            before = accumulator.count
            accumulator.add(*rows(view, batch, config.insertion_layer))
            bar.update((accumulator.count - before) * ranks.size)
    ranks.sum([accumulator.covariance, accumulator.cross])
    accumulator.count = tokens
    return accumulator.solve()
