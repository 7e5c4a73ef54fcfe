"""Which sequences and anchors a training step takes."""

import numpy as np
import pytest
import torch
from firp.train.data import BatchOrder, TextDataset, epoch_batches, make_batch
from firp.train.objective import sample_anchors


def dataset_of(num_sequences, seed=0):
    lengths = np.random.default_rng(seed).integers(2, 40, num_sequences)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return TextDataset(np.ones(offsets[-1], np.uint16), offsets, np.ones(num_sequences, np.int32))


@pytest.mark.parametrize("num_sequences", [3, 32, 129, 200])
def test_steps_walk_through_whole_epochs(num_sequences):
    """In any order of asking, as after a resume: the batches of each epoch, one after another."""
    dataset, indices = dataset_of(num_sequences), np.arange(1, num_sequences)
    expected = [batch.tolist() for epoch in range(3) for batch in epoch_batches(dataset, indices, 4, 7, epoch)]
    order = BatchOrder(dataset, indices, 4, 7)
    assert [order.at(step).tolist() for step in range(len(expected))] == expected
    for step in (len(expected) - 1, 0, len(expected) // 2):
        assert BatchOrder(dataset, indices, 4, 7).at(step).tolist() == order.at(step).tolist() == expected[step]


def test_valid_anchors_come_first():
    dataset = dataset_of(40)
    batch = make_batch(dataset, np.arange(40), 32)
    anchors, valid = sample_anchors(batch, 3, 12, torch.Generator().manual_seed(1))
    assert torch.equal(valid, torch.arange(12) < valid.sum(1, keepdim=True)) and 0 < int(valid.sum()) < valid.numel()
    for b, count in enumerate(valid.sum(1).tolist()):
        assert len(anchors[b, :count].unique()) == count and bool((anchors[b, :count] + 3 < batch.lengths[b]).all())
