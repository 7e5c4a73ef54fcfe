"""Checkpoint, log and kept rows of an earlier run are whole and of this run, or refused by one error that names
them."""

import json
import pickle
import re
import zipfile

import firp
import numpy as np
import pytest
import torch
from firp.train.config import TrainConfig
from firp.train.trainer import CHECKPOINT, LOG, ROWS, Trainer
from models import tiny_model

TEXT = {
    "tokens": np.arange(60, dtype=np.uint16) % 7 + 4,
    "offsets": np.arange(0, 61, 12),
    "prompt_lengths": np.full(5, 4, np.int32),
}


def flipped(path, where):
    """Flip one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 16
    path.write_bytes(data)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Makes a trainer in a folder whose first run stopped after a step."""
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: (model, None))
    np.savez(tmp_path / "text.npz", **TEXT)

    def trainer(**changes):
        settings = {"model": "tiny", "data": str(tmp_path / "text.npz"), "insertion_layer": 2, "num_offsets": 2,
        "steps": 3,
                    "batch_size": 2, "anchors": 4, "max_length": 32, "held_out": 1, "ridge_tokens": 0,
                    "transition_rank": 3}  # fmt: skip
        return Trainer(TrainConfig(**{**settings, **changes}), tmp_path / "run", progress=False)

    return trainer


def test_text_past_the_vocabulary_is_refused(train, tmp_path):
    np.savez(tmp_path / "text.npz", **{**TEXT, "tokens": TEXT["tokens"] + 1})
    with pytest.raises(ValueError, match=r"^data: got token 11, expected 0..10 \(the model's vocabulary\)"):
        train()


def test_the_export_loads_as_it_was_trained(train, tmp_path):
    trainer = train()
    assert trainer.run()
    loaded = firp.FirpPredictor.from_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.predictor.parameters(), strict=True))
    assert loaded.base_model == trainer.predictor.base_model and loaded.transition_rank == 3


def changed(**changes):
    def apply(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return apply


def inside(name, change):
    def apply(path):
        state = torch.load(path, weights_only=True)
        change(state[name])
        torch.save(state, path)

    return apply


def other_moments(optimizer):
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)


UNREADABLE = "cannot read the checkpoint"
ANOTHER = "is not of this run"

# case -> (what is done to the checkpoint, what the error says)
CHECKPOINTS = {
    "empty": (lambda path: path.write_bytes(b""), UNREADABLE),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), UNREADABLE),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), UNREADABLE),
    "a bit of a tensor flipped": (lambda path: flipped(path, 0.5), "does not match its checksum"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"step": 1})), UNREADABLE),
    "another zip": (lambda path: zipfile.ZipFile(path, "w").close(), UNREADABLE),
    "a model's state": (
        lambda path: torch.save({"weight": torch.zeros(2)}, path),
        "got ['weight'], expected the fields config, step",
    ),
    "a list": (lambda path: torch.save([1], path), "got list, expected the fields"),
    "an object of code": (lambda path: torch.save(TrainConfig("a", "b", 1), path), UNREADABLE),
    "a configuration of another type": (changed(config=[1]), "config: got list, expected dict"),
    "a step of another type": (changed(step="2"), "step: got str, expected int"),
    "a step past the end": (changed(step=4), "step: got 4, expected 0..3 (steps)"),
    "a negative step": (changed(step=-1), "step: got -1, expected 0..3 (steps)"),
    "seconds of another type": (changed(seconds=None), "seconds: got NoneType, expected float"),
    "maps of another size": (inside("predictor", lambda state: state.update(weight=torch.zeros(2, 8, 8))), ANOTHER),
    "no transition": (inside("predictor", lambda state: state.pop("transition")), ANOTHER),
    "a tensor of another type": (inside("predictor", lambda state: state.update(weight="zeros")), ANOTHER),
    "an empty optimizer": (changed(optimizer={}), ANOTHER),
    "an optimizer of one group": (inside("optimizer", lambda state: state["param_groups"].pop()), ANOTHER),
    "moments of another size": (inside("optimizer", other_moments), "exp_avg: got shape [3], expected [2, 32, 32]"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_damaged_or_foreign_checkpoint_is_named(train, tmp_path, case):
    spoil, message = CHECKPOINTS[case]
    assert not train().run(time_limit_s=0.0)
    path = tmp_path / "run" / CHECKPOINT
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        train().run()
    said = str(caught.value)
    assert (
        said.startswith("output: ")
        and str(path) in said
        and message in said
        and said.endswith("remove it to begin again")
    )
    assert path.read_bytes() == before


def test_a_log_line_that_was_cut_off_is_dropped(train, tmp_path):
    assert not train().run(time_limit_s=0.0)
    log = tmp_path / "run" / LOG
    whole = log.read_bytes()
    log.write_bytes(whole + whole.splitlines()[-1][:20])
    trainer = train()
    trainer.open_log(trainer.load_checkpoint())
    assert log.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b"nonsense", b"\xff\xfe", b"[]", b"{}", b"3", b'{"step": null}', b'{"step": "many"}', b"[" * 100_000]
)
def test_a_line_that_is_not_of_a_log_is_named(train, tmp_path, line):
    assert not train().run(time_limit_s=0.0)
    log = tmp_path / "run" / LOG
    log.write_bytes(line + b"\n" + log.read_bytes())
    with pytest.raises(ValueError, match=f"^output: {re.escape(str(log))}, line 1: no line of a training log"):
        train().run()


def record_of(run, **changes):
    path = run / f"{ROWS}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def taller(run):
    with open(run / ROWS, "ab") as file:
        file.write(b"\0" * 64)


# case -> (what is done to the output folder, what the error says)
KEPT_ROWS = {
    "cut off": (lambda run: (run / ROWS).write_bytes((run / ROWS).read_bytes()[:-4]), "bytes, expected"),
    "empty": (lambda run: (run / ROWS).write_bytes(b""), "got 0 bytes, expected"),
    "longer": (taller, "bytes, expected"),
    "zeros": (lambda run: (run / ROWS).write_bytes(bytes((run / ROWS).stat().st_size)), "got rows of another checksum"),
    "a bit flipped": (lambda run: flipped(run / ROWS, 0.5), "got rows of another checksum"),
    "no record": (lambda run: (run / f"{ROWS}.json").unlink(), "cannot be read: No such file"),
    "an empty record": (lambda run: (run / f"{ROWS}.json").write_bytes(b""), "not JSON"),
    "half a record": (lambda run: (run / f"{ROWS}.json").write_bytes((run / f"{ROWS}.json").read_bytes()[:40]),
    "not JSON"),
    "a record of a list": (lambda run: (run / f"{ROWS}.json").write_text("[]"), "got list, expected an object"),
    "a record of nested brackets": (lambda run: (run / f"{ROWS}.json").write_text("[" * 100_000), "nested too deeply"),
    "a record without fields": (lambda run: (run / f"{ROWS}.json").write_text("{}"),
    "made_from: got NoneType, expected an object"),
    "more done than there is": (lambda run: record_of(run, done=6), "done, crc32: got (6, "),
    "less than nothing done": (lambda run: record_of(run, done=-1), "done, crc32: got (-1, "),
    "done of a boolean": (lambda run: record_of(run, done=True), "done, crc32: got (True, "),
    "done of a string": (lambda run: record_of(run, done="5"), "done, crc32: got ('5', "),
    "no checksum": (lambda run: record_of(run, crc32=None), ", None), expected integers"),
    "another checksum": (lambda run: record_of(run, crc32=1), "got rows of another checksum"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT_ROWS)
def test_damaged_or_foreign_rows_are_named(train, tmp_path, case):
    spoil, message = KEPT_ROWS[case]
    assert train(keep_rows=True).store.fill(2, progress=False)
    run = tmp_path / "run"
    spoil(run)
    before = (run / ROWS).read_bytes()
    with pytest.raises(ValueError) as caught:
        train(keep_rows=True)
    said = str(caught.value)
    assert said.startswith(f"keep_rows: {run / ROWS} is not as {ROWS}.json tells: ") and message in said
    assert (run / ROWS).read_bytes() == before


def test_rows_that_were_removed_are_computed_again(train, tmp_path):
    assert train(keep_rows=True).run()
    rows = tmp_path / "run" / ROWS
    before = rows.read_bytes()
    rows.unlink()
    store = train(keep_rows=True).store
    assert store.done == 0 and json.loads(store.record.read_text())["done"] == 0
    assert store.fill(2, progress=False) and rows.read_bytes() == before
