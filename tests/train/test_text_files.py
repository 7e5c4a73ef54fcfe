"""Distilled text, and its finished batches, are whole and of this run, or refused by one error that names them."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from firp.train import distill as distilling
from firp.train.data import load_dataset
from firp.train.distill import DistillConfig, distill
from models import tiny_model

TEXT = {
    "tokens": np.arange(60, dtype=np.uint16) % 7 + 4,
    "offsets": np.arange(0, 61, 12),
    "prompt_lengths": np.full(5, 4, np.int32),
}


# case -> (arrays that differ, what the error says)
WRONG_TEXT = {
    "no tokens": ({"tokens": None}, "tokens"),
    "no offsets": ({"offsets": None}, "offsets"),
    "tokens of fractions": ({"tokens": TEXT["tokens"] * 1.0}, "tokens: got float64 of shape (60,), expected integers [n]"),
    "tokens in rows": ({"tokens": TEXT["tokens"].reshape(5, 12)}, "tokens: got uint16 of shape (5, 12), expected integers [n]"),
    "tokens of words": ({"tokens": np.array(["a"] * 60)}, "tokens: got <U1"),
    "negative tokens": ({"tokens": TEXT["tokens"].astype(np.int64) - 5}, "tokens: got -1, expected at least 0"),
    "tokens missing at the end": ({"tokens": TEXT["tokens"][:50]}, "offsets: got 0 to 60, expected 0 to 50 (tokens)"),
    "an offset too few": ({"offsets": TEXT["offsets"][1:]}, "offsets: got 5, expected 6"),
    "offsets that start late": ({"offsets": TEXT["offsets"].clip(1)}, "offsets: got 1 to 60, expected 0 to 60"),
    "offsets that go back": ({"offsets": np.array([0, 24, 12, 36, 48, 60])}, "prompt_lengths: got 4 in sequence 1, expected 1..-12"),
    "offsets of booleans": ({"offsets": TEXT["offsets"] > 0}, "offsets: got bool"),
    "an empty prompt": ({"prompt_lengths": np.array([4, 4, 0, 4, 4])}, "prompt_lengths: got 0 in sequence 2, expected 1..12"),
    "a prompt past its text": ({"prompt_lengths": np.array([4, 4, 4, 13, 4])}, "prompt_lengths: got 13 in sequence 3, expected 1..12"),
    "a prompt length of the smallest integer": ({"prompt_lengths": np.full(5, -(2**63))}, "prompt_lengths: got -9223372036854775808 in sequence 0"),
    "no sequences": ({"tokens": TEXT["tokens"][:0], "offsets": np.zeros(1, int), "prompt_lengths": TEXT["prompt_lengths"][:0]}, "expected at least one sequence"),
    "pickled objects": ({"tokens": np.array([{}] * 60, dtype=object)}, "allow_pickle=False"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TEXT)
def test_text_of_wrong_arrays_is_named(tmp_path, case):
    changes, message = WRONG_TEXT[case]
    path = tmp_path / "text.npz"
    np.savez(path, **{name: array for name, array in {**TEXT, **changes}.items() if array is not None})
    with pytest.raises(ValueError) as caught:
        load_dataset(path)
    said = str(caught.value)
    assert said.startswith(f"data: cannot read {str(path)!r} as the output of `firp distill`: ") and message in said


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"nonsense" * 99),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(pickle.dumps(TEXT)),
        lambda path: np.save(path.open("wb"), TEXT["tokens"]),
        lambda path: path.write_text(json.dumps({"tokens": [1]})),
    ],
)
def test_a_damaged_file_of_text_is_named(tmp_path, spoil):
    path = tmp_path / "text.npz"
    np.savez_compressed(path, **TEXT)
    spoil(path)
    with pytest.raises(
        ValueError, match=f"^data: cannot read {re.escape(repr(str(path)))} as the output of `firp distill`: "
    ):
        load_dataset(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_flipped_bit_changes_the_text(tmp_path, save):
    path = tmp_path / "text.npz"
    save(path, **TEXT)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = vars(load_dataset(path))
        except ValueError:
            refused += 1
        else:
            assert all(np.array_equal(found[name], array) for name, array in TEXT.items()), place
    assert refused > len(whole) / 2


def test_whole_text_is_read(tmp_path):
    np.savez(tmp_path / "text.npz", **TEXT, ids=np.array(["a"] * 5))
    assert load_dataset(tmp_path / "text.npz").sequence(4).tolist() == TEXT["tokens"][48:].tolist()


class Stopped(Exception):
    pass


@pytest.fixture
def run_distill(tmp_path, monkeypatch):
    """Runs `distill` on six prompts in batches of two, with answers that need no model; stops in batch `stop`."""
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr(distilling, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(distilling, "encode", lambda _, messages: [4 + len(messages[0]["content"]) % 7] * 3)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"x" * i}", "id": "p{i}"}}\n' for i in range(1, 7)))

    def run(stop=None, **changes):
        def answer(engine, tokenizer, rows, greedy, config, batch):
            if batch == stop:
                raise Stopped
            return [[5 + batch, 6]] * len(rows)

        monkeypatch.setattr(distilling, "_answer", answer)
        config = DistillConfig(**{"model": "tiny", "prompts": str(prompts), "batch_size": 2, **changes})
        return distill(config, tmp_path / "text.npz", progress=False)

    return run


def test_distilling_goes_on_with_the_batches_that_are_there(run_distill, tmp_path):
    with pytest.raises(Stopped):
        run_distill(stop=0)
    assert len(list((tmp_path / "text.npz.parts").glob("*.npz"))) == 2
    dataset = load_dataset(run_distill())
    assert len(dataset) == 6 and [dataset.sequence(i)[3].item() for i in range(6)] == [5, 5, 6, 6, 7, 7]
    assert not (tmp_path / "text.npz.parts").exists()


def part(change):
    def apply(parts):
        with np.load(parts / "000001.npz") as file:
            arrays = dict(file)
        change(arrays)
        np.savez(parts / "000001.npz", **arrays)

    return apply


# case -> (what is done to the parts, what the error says)
PARTS = {
    "an empty part": (lambda parts: (parts / "000001.npz").write_bytes(b""), "000001.npz is no batch of this run"),
    "half a part": (lambda parts: (parts / "000001.npz").write_bytes((parts / "000001.npz").read_bytes()[:99]), "000001.npz is no batch of this run"),
    "another batch's part": (lambda parts: shutil.copy(parts / "000002.npz", parts / "000001.npz"), "ids: got those of other prompts"),
    "a part without answers": (part(lambda arrays: arrays.pop("tokens")), "tokens"),
    "a part of other prompts": (part(lambda arrays: arrays["tokens"].fill(9)), "tokens: got other prompts"),
    "a part of shorter text": (part(lambda arrays: arrays.update(tokens=arrays["tokens"][:-1])), "offsets: got 0 to 10, expected 0 to 9"),
    "a part without booleans": (part(lambda arrays: arrays.update(greedy=np.zeros(2))), "greedy: expected a boolean"),
    "no settings": (lambda parts: (parts / "config.json").unlink(), "holds text without config.json"),
    "empty settings": (lambda parts: (parts / "config.json").write_bytes(b""), "config.json: not JSON"),
    "settings of a list": (lambda parts: (parts / "config.json").write_text("[]"), "config.json: got list, expected an object"),
    "settings of nothing": (lambda parts: (parts / "config.json").write_text("{}"), "model: got 'tiny', but "),
    "unknown settings": (lambda parts: (parts / "config.json").write_text((parts / "config.json").read_text().replace("{", '{"top_k": 3, ', 1)), "top_k: got None, but "),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_damaged_or_foreign_batches_are_named(run_distill, tmp_path, case):
    spoil, message = PARTS[case]
    with pytest.raises(Stopped):
        run_distill(stop=0)
    spoil(tmp_path / "text.npz.parts")
    with pytest.raises(ValueError) as caught:
        run_distill()
    said = str(caught.value)
    assert message in said and str(tmp_path / "text.npz.parts") in said
    assert not (tmp_path / "text.npz").exists()


def test_batches_of_other_settings_are_refused(run_distill):
    with pytest.raises(Stopped):
        run_distill(stop=0)
    with pytest.raises(ValueError, match=r"^seed: got 1, but .* was begun with 0"):
        run_distill(seed=1)
