"""Kept rows are the rows the base model computes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from firp.train.data import TextDataset, make_batch
from firp.train.rows import RowStore
from models import tiny_model

LENGTHS = [5, 17, 9, 30, 12]
MAX_LENGTH = 20


@pytest.fixture
def parts():
    model = tiny_model(1, vocab=11, dtype=torch.float64)
    tokens = np.random.default_rng(0).integers(0, 11, sum(LENGTHS)).astype(np.uint16)
    dataset = TextDataset(tokens, np.concatenate([[0], np.cumsum(LENGTHS)]), np.full(len(LENGTHS), 3))
    return DecoderView(model), dataset


def open_store(parts, path, **changes):
    made_from = {"model": "tiny", "data": "data.npz", "dtype": "float64", **changes}
    return RowStore(path / "rows.bin", *parts, insertion_layer=2, max_length=MAX_LENGTH, made_from=made_from)


def test_rows_read_back(parts, tmp_path):
    view, dataset = parts
    open_store(parts, tmp_path).fill(2, progress=False)
    indices = np.array([3, 0, 1])
    read = open_store(parts, tmp_path).read(indices)
    batch = make_batch(dataset, indices, MAX_LENGTH)
    expected = real_rows(view, batch.tokens, 2)
    for b, length in enumerate(batch.lengths.tolist()):
        for name in ("inserted", "final"):
            torch.testing.assert_close(getattr(read, name)[b, :length], getattr(expected, name)[b, :length])
        assert sorted(read.recorded) == sorted(expected.recorded) == list(range(2, view.num_layers))
        for layer, kept in read.recorded.items():
            for rows, wanted in zip(kept, expected.recorded[layer], strict=True):
                torch.testing.assert_close(rows[b, :, :length], wanted[b, :, :length])


def test_a_cut_run_goes_on(parts, tmp_path, monkeypatch):
    open_store(parts, tmp_path / "whole").fill(2, progress=False)
    calls = []

    def stops_in_the_second_batch(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_rows(*args)

    with monkeypatch.context() as patched:
        patched.setattr("firp.train.rows.real_rows", stops_in_the_second_batch)
        with pytest.raises(KeyboardInterrupt):
            open_store(parts, tmp_path / "cut").fill(2, progress=False)
    again = open_store(parts, tmp_path / "cut")
    assert again.done == 2
    again.fill(2, progress=False)
    assert (tmp_path / "cut" / "rows.bin").read_bytes() == (tmp_path / "whole" / "rows.bin").read_bytes()


def test_a_gpu_with_room_keeps_rows_in_its_memory(parts, tmp_path, monkeypatch):
    """The same rows, and no file; a file that is there is used."""
    open_store(parts, tmp_path / "file").fill(2, progress=False)
    monkeypatch.setattr("firp.train.rows.fits_gpu", lambda device, num_bytes: num_bytes < 1 << 20)
    kept, file = open_store(parts, tmp_path / "none"), open_store(parts, tmp_path / "file")
    assert kept.fill(3, progress=False) and file.done == len(LENGTHS)
    assert not (tmp_path / "none").exists()
    torch.testing.assert_close(kept.rows, file.rows)


def test_rows_of_other_text_are_refused(parts, tmp_path):
    view, dataset = parts
    open_store(parts, tmp_path).fill(4, progress=False)
    changed = TextDataset((dataset.tokens + 1) % 11, dataset.offsets, dataset.prompt_lengths)
    with pytest.raises(ValueError, match="text"):
        open_store((view, changed), tmp_path)


def test_rows_past_the_disk_are_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"keep_rows: .* needs 0.0 GB"):
        open_store(parts, tmp_path)
    assert not (tmp_path / "rows.bin").exists()


@pytest.mark.parametrize("field", ["model", "data", "dtype"])
def test_rows_of_other_settings_are_refused(parts, tmp_path, field):
    open_store(parts, tmp_path).fill(4, progress=False)
    with pytest.raises(ValueError, match=field):
        open_store(parts, tmp_path, **{field: "other"})


def test_sequences_without_an_anchor_are_kept_too(tmp_path):
    """Answers that are shorter than the offsets, a whole batch of them and one beside a longer answer."""
    view = DecoderView(tiny_model(1, vocab=23, dtype=torch.float32))
    tokens, offsets = np.arange(4, 22).astype(np.uint16), np.array([0, 4, 8, 18])
    dataset = TextDataset(tokens, offsets, np.array([3, 3, 2], np.int32))
    maps = torch.eye(view.config.hidden_size).repeat(3, 1, 1)
    for size in (1, 2, 3):
        store = RowStore(tmp_path / f"{size}.bin", view, dataset, 2, 16, {}, maps)
        assert store.fill(size, progress=False)
        kept = store.read(np.array([0, 1, 2]))
        assert kept.pseudo.shape == (3, 10, 3, view.config.hidden_size)
        anchors = slice(1, 6)  # of the third
        assert bool(kept.pseudo[2, anchors].isfinite().all()) and bool(kept.pseudo[2, anchors].any(-1).all())
