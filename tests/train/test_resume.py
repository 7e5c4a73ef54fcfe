"""Interrupted training goes on bit for bit; interrupted files are whole or not there."""

import firp
import numpy as np
import pytest
import torch
from firp.tools.files import write_atomically
from firp.train.config import TrainConfig
from firp.train.trainer import CHECKPOINT, Trainer
from models import tiny_model


@pytest.fixture
def setup(tmp_path, monkeypatch):
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: (model, None))
    random = np.random.default_rng(0)
    lengths = random.integers(12, 30, 40)
    np.savez(
        tmp_path / "data.npz",
        tokens=random.integers(4, 11, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.full(40, 4, np.int32),
    )
    return lambda **changes: TrainConfig(
        **{"model": "tiny", "data": str(tmp_path / "data.npz"), "insertion_layer": 2, "num_offsets": 2, "steps": 6,
           "batch_size": 4, "anchors": 4, "max_length": 32, "held_out": 4, "ridge_tokens": 200,
           "transition_rank": 3, **changes}
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"keep_rows": True}, {"update_width": 8}])
def test_resume_is_exact(setup, tmp_path, changes):
    config = setup(**changes)
    whole = Trainer(config, tmp_path / "whole", progress=False)
    assert whole.run()
    while not Trainer(config, tmp_path / "parts", progress=False).run(time_limit_s=0.0):
        pass
    whole, parts = (firp.load_predictor(tmp_path / name) for name in ("whole", "parts"))
    tensors = dict(whole.named_parameters())
    assert all(torch.equal(tensor, getattr(parts, name)) for name, tensor in tensors.items())
    assert tensors["update_outputs" if config.update_width else "transition"][-1].any()
    logs = [(tmp_path / name / "train_log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(logs[0]) == len(logs[1])


def test_kept_pseudo_rows_train_as_computed_ones_do(setup, tmp_path):
    """Where the maps stay as they are, pseudo rows are computed once."""
    assert Trainer(setup(num_offsets=2), tmp_path / "maps", progress=False).run()
    kinds = {"kept": {"keep_rows": True}, "computed": {}}
    for name, changes in kinds.items():
        config = setup(
            learning_rate=0.0, start_from=str(tmp_path / "maps"), update_width=8, **changes,
        )  # fmt: skip
        assert Trainer(config, tmp_path / name, progress=False).run()
    maps, kept, computed = (firp.load_predictor(tmp_path / name) for name in ("maps", *kinds))
    assert torch.equal(kept.weight, maps.weight)
    assert kept.update_outputs.any()
    torch.testing.assert_close(kept.update_outputs, computed.update_outputs, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "kept" / "rows.bin").stat().st_size == sum_of_tokens(setup()) * 3 * kept.hidden_size * 4


def sum_of_tokens(config):
    lengths = np.diff(np.load(config.data)["offsets"])
    return int(np.minimum(lengths, config.max_length).sum())


def test_rows_kept_for_other_maps_are_refused(setup, tmp_path):
    for name, seed in (("maps", 0), ("others", 1)):
        assert Trainer(setup(seed=seed), tmp_path / name, progress=False).run()
    options = {"learning_rate": 0.0, "update_width": 8, "keep_rows": True}
    assert Trainer(setup(start_from=str(tmp_path / "maps"), **options), tmp_path / "run", progress=False).run()
    with pytest.raises(ValueError, match=r"maps of start_from: got '\w+', but .*rows.bin was made with .*; remove it"):
        Trainer(setup(start_from=str(tmp_path / "others"), **options), tmp_path / "run", progress=False)


def test_pseudo_rows_kept_for_other_answers_are_refused(setup, tmp_path):
    """They are there where an answer lets an anchor stand."""
    assert Trainer(setup(), tmp_path / "maps", progress=False).run()
    options = {
        "start_from": str(tmp_path / "maps"), "learning_rate": 0.0, "update_width": 8,
        "keep_rows": True,
    }  # fmt: skip
    assert Trainer(setup(**options), tmp_path / "run", progress=False).run()
    data = dict(np.load(tmp_path / "data.npz"))
    np.savez(tmp_path / "data.npz", **{**data, "prompt_lengths": data["prompt_lengths"] - 1})
    with pytest.raises(ValueError, match=r"answers: got '\w+', but .*rows.bin was made with"):
        Trainer(setup(**options), tmp_path / "run", progress=False)


def test_a_context_of_another_width_is_refused(setup, tmp_path):
    assert Trainer(setup(update_width=8), tmp_path / "first", progress=False).run()
    start = {"start_from": str(tmp_path / "first"), "update_width": 4}
    with pytest.raises(ValueError, match="update_width: got 4, but start_from has 8"):
        Trainer(setup(**start), tmp_path / "second", progress=False).run()


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_limit_that_is_no_number_of_seconds_is_refused(setup, tmp_path, limit):
    with pytest.raises(ValueError, match=r"time_limit: got .*, expected at least 0"):
        Trainer(setup(), tmp_path / "run", progress=False).run(time_limit_s=limit)


def test_a_killed_step_leaves_the_last_checkpoint(setup, tmp_path, monkeypatch):
    trainer = Trainer(setup(), tmp_path / "run", progress=False)
    trainer.run(time_limit_s=0.0)
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()

    def torn(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint()
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert not [path for path in (tmp_path / "run").iterdir() if CHECKPOINT in path.name and path.name != CHECKPOINT]


def test_other_settings_do_not_resume(setup, tmp_path):
    Trainer(setup(), tmp_path / "run", progress=False).run(time_limit_s=0.0)
    with pytest.raises(ValueError, match="learning_rate"):
        Trainer(setup(learning_rate=1e-5), tmp_path / "run", progress=False).run()


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_steps_destroys_no_finished_run(setup, tmp_path, more):
    Trainer(setup(), tmp_path / "run", progress=False).run()
    steps = setup().steps
    with pytest.raises(ValueError, match=f"steps: got {steps + more}, .* trained with {steps}; choose another output"):
        Trainer(setup(steps=steps + more), tmp_path / "run", progress=False).run()


def test_a_damaged_checkpoint_is_named(setup, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="output: cannot read the checkpoint"):
        Trainer(setup(), tmp_path / "run", progress=False).run()


@pytest.mark.parametrize(
    "field, value",
    [
        ("insertion_layer", 0),
        ("insertion_layer", 4),
        ("num_offsets", 0),
        ("steps", 0),
        ("held_out", 40),
        ("transition_rank", 33),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("inf")),
        ("transition_learning_rate", float("nan")),
        ("update_width", -1),
        ("ridge_tokens", -1),
        ("seed", -1),
    ],
)
def test_bad_settings(setup, tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        Trainer(setup(**{field: value}), tmp_path / "run", progress=False)


def test_a_transition_alone_leaves_the_maps(setup, tmp_path):
    assert Trainer(setup(transition_rank=0), tmp_path / "maps", progress=False).run()
    maps = firp.load_predictor(tmp_path / "maps")
    assert maps.transition is None
    config = setup(learning_rate=0.0, start_from=str(tmp_path / "maps"))
    assert Trainer(config, tmp_path / "both", progress=False).run()
    both = firp.load_predictor(tmp_path / "both")
    assert torch.equal(both.weight, maps.weight) and both.transition[1].any()


def test_another_rank_is_refused(setup, tmp_path):
    assert Trainer(setup(), tmp_path / "first", progress=False).run()
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"transition_rank: got {rank}, but start_from has 3"):
            Trainer(
                setup(start_from=str(tmp_path / "first"), transition_rank=rank), tmp_path / "second", progress=False
            ).run()


def test_write_atomically_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError):
        write_atomically(path, lambda staging: (_ for _ in ()).throw(OSError("disk full")))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
