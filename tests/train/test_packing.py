"""Packed training equals unpacked training at the same anchors, and no document sees another."""

import numpy as np
import pytest
import torch
from firp.decoder.passes import Packing, real_rows
from firp.decoder.view import DecoderView
from firp.train.config import TrainConfig
from firp.train.trainer import Trainer
from models import tiny_model

LENGTHS = torch.tensor([5, 17, 9, 20, 3, 12])


def test_every_sequence_has_places_of_its_own():
    packing = Packing.of(LENGTHS, 20)
    places, real = packing.places(20)
    taken = places[real].tolist()
    assert len(set(taken)) == len(taken) == int(LENGTHS.sum()) and max(taken) < packing.shape[0] * packing.shape[1]
    assert packing.shape == (4, 20)  # 20, 17 + 3, 12 + 5, 9
    for b, length in enumerate(LENGTHS.tolist()):
        assert places[b, :length].diff().eq(1).all() and (places[b, 0] % 20) + length <= 20


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3-sliding", "llama-dynamic", "phi3-longrope", "smollm3"])
def test_packed_rows_are_those_of_each_sequence_alone(family):
    view = DecoderView(tiny_model(1, family, vocab=11))
    tokens = torch.randint(4, 11, (len(LENGTHS), 20), generator=torch.Generator().manual_seed(0))
    packed = real_rows(view, tokens, 2, Packing.of(LENGTHS, 45))
    for b, length in enumerate(LENGTHS.tolist()):
        alone = real_rows(view, tokens[b : b + 1, :length], 2)
        for name in ("inserted", "final"):
            found, expected = getattr(packed, name)[b, :length], getattr(alone, name)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        for layer, kept in alone.recorded.items():
            for rows, expected in zip(packed.recorded[layer], kept, strict=True):
                torch.testing.assert_close(rows[b, :, :length], expected[0], rtol=0, atol=1e-11)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: (model, None))
    random = np.random.default_rng(0)
    lengths = random.integers(6, 30, 40)
    np.savez(
        tmp_path / "data.npz",
        tokens=random.integers(4, 11, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.full(40, 3, np.int32),
    )

    def make(name, **changes):
        settings = {"model": "tiny", "data": str(tmp_path / "data.npz"), "insertion_layer": 2, "num_offsets": 2,
                    "steps": 6, "batch_size": 8, "anchors": 4, "max_length": 64, "held_out": 4, "ridge_tokens": 200,
                    "transition_rank": 3}  # fmt: skip
        return Trainer(TrainConfig(**{**settings, **changes}), tmp_path / name, progress=False)

    return make


@pytest.mark.parametrize("changes", [{}, {"update_width": 8}])
def test_packed_gradients_are_those_of_unpacked_training(trainer, changes):
    """In float32 a gradient differs by rounding alone: less than 1e-5 of its largest entry."""
    gradients = []
    for pack in (False, True):
        run = trainer(f"run-{pack}", pack=pack, **changes)
        with torch.no_grad():
            for parameter in run.predictor.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        run.score(run.order.at(0), seed=3, want_gradient=True)
        gradients.append({name: p.grad.clone() for name, p in run.predictor.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.any(), name
        assert float((gradients[1][name] - expected).abs().max()) < 1e-5 * float(expected.abs().max()), name


def test_packed_training_takes_the_same_steps(trainer):
    plain, packed = trainer("plain"), trainer("packed", pack=True)
    for run in (plain, packed):
        run.initialize()
        for _ in range(6):
            run.train_step()
    torch.testing.assert_close(packed.predictor.weight, plain.predictor.weight, rtol=0, atol=1e-4)


def test_packing_kept_rows_is_refused(trainer):
    with pytest.raises(ValueError, match=r"^pack: got it with keep_rows"):
        trainer("run", pack=True, keep_rows=True)
