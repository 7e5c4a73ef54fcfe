"""Draft heads learn: resumed exactly, from rows that runs share, beside `firp train`'s batches."""

import copy
import json
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import firp
import numpy as np
import pytest
import torch
import typer
from firp.train.config import TrainConfig
from models import tiny_model

from benchmarks.baselines.compare import heads_in
from benchmarks.baselines.heads import KINDS, load_heads
from benchmarks.baselines.train import HeadConfig, HeadTrainer, curve, main, train_kind


@pytest.fixture
def setup(tmp_path, monkeypatch):
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: (model, None))
    rng = np.random.default_rng(0)
    lengths = rng.integers(12, 30, 40)
    np.savez(
        tmp_path / "data.npz",
        tokens=rng.integers(4, 11, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.full(40, 4, np.int32),
    )
    return lambda **changes: HeadConfig(
        **{"model": "tiny", "data": str(tmp_path / "data.npz"), "insertion_layer": 2, "num_offsets": 2, "steps": 6,
           "batch_size": 4, "anchors": 4, "max_length": 32, "held_out": 4, "ridge_tokens": 200, **changes}
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_exactly(setup, tmp_path, kind):
    config = setup(kind=kind)
    assert HeadTrainer(config, tmp_path / "whole", progress=False).run()
    while not HeadTrainer(config, tmp_path / "parts", progress=False).run(time_limit_s=0.0):
        pass
    whole, parts = (load_heads(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert whole.weight.any()
    lines = curve(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 6] and lines[-1]["event"] == "held_out"


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_loss(setup, tmp_path, kind):
    trainer = HeadTrainer(setup(kind=kind, ridge_tokens=0), tmp_path / "run", progress=False)
    indices = trainer.train_indices[:4]
    with torch.no_grad():
        trainer.predictor.weight.add_(torch.randn(trainer.predictor.weight.shape) * 0.1)
    weight = trainer.predictor.weight

    def loss():
        scores = trainer.score(indices, seed=1, want_gradient=False)
        return sum(kl * 0.8**j for j, kl in enumerate(scores.means()["kl"].double()))

    trainer.score(indices, seed=1, want_gradient=True)
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight.add_(direction * 0.01)
        above = loss()
        weight.add_(direction * -0.02)
        slope = (above - loss()) / 0.02
    assert slope.item() == pytest.approx(weight.grad.norm().item(), rel=0.02)


def test_a_loss_over_frequent_tokens_leaves_the_others_out(setup, tmp_path):
    """The oracle: the whole loss where a rare token's scores are masked out of both distributions."""
    trainer = HeadTrainer(setup(kind="medusa", loss_vocabulary=5, keep_rows=True), tmp_path / "run", progress=False)
    answers = [trainer.dataset.sequence(i)[4:].tolist() for i in trainer.train_indices]
    ordered = sorted(range(11), key=lambda token: (-sum(row.count(token) for row in answers), token))
    kept = torch.zeros(11, dtype=torch.bool)
    kept[ordered[:5]] = True

    class Masked:
        def __call__(self, hidden):
            return trainer.model.lm_head(hidden).masked_fill(~kept, -1e4)

    assert trainer.store.fill(4, progress=False)
    indices, weight = trainer.train_indices[:4], trainer.predictor.weight
    found = trainer.score(indices, seed=1, want_gradient=True)
    gradient, weight.grad = weight.grad, None
    view = copy.copy(trainer.view)
    view.head = Masked()
    trainer.objective = replace(trainer.objective, loss_view=view)
    expected = trainer.score(indices, seed=1, want_gradient=True)
    torch.testing.assert_close(found.kl, expected.kl)
    torch.testing.assert_close(gradient, weight.grad)
    assert gradient.any()


def test_runs_of_a_command_share_their_rows(setup, tmp_path):
    for name, kind in (("a", "medusa"), ("b", "early-exit")):
        trainer = HeadTrainer(setup(kind=kind, keep_rows=True), tmp_path / name, progress=False)
        assert trainer.store.path == tmp_path / "rows.bin" and trainer.store.done == (0 if name == "a" else 40)
        assert trainer.run()
        kept, made = (
            load_heads(tmp_path / name),
            HeadTrainer(setup(kind=kind), tmp_path / f"{name}-made", progress=False),
        )
        assert made.run()
        for a, b in zip(kept.parameters(), load_heads(tmp_path / f"{name}-made").parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_batches_and_anchors_are_those_of_firp_train(setup, tmp_path, monkeypatch):
    from firp.train.trainer import Trainer

    seen = {}
    for name, make in (("heads", HeadTrainer), ("maps", Trainer)):
        config = setup()
        if name == "maps":
            fields = {key: value for key, value in vars(config).items() if key not in ("kind", "loss_vocabulary")}
            config = TrainConfig(**fields)
        trainer = make(config, tmp_path / name, progress=False)
        calls = seen[name] = []
        objective = trainer.objective

        def note(predictor, tokens, real, anchors, valid, want_gradient, count, calls=calls, objective=objective):
            calls.append((tokens, anchors, valid, want_gradient))
            return objective(predictor, tokens, real, anchors, valid, want_gradient, count)

        trainer.objective = note
        trainer._run(None, 50, 200)
    assert len(seen["heads"]) == len(seen["maps"]) == 8
    for a, b in zip(seen["heads"], seen["maps"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3] == b[3]


def test_the_sweep_takes_the_rate_with_the_least_held_out_loss(setup, tmp_path):
    found = train_kind(setup(kind="medusa"), [1e-3, 1e-2], 3, tmp_path, "cpu", None)
    assert found["learning_rate"] == 1e-2 and set(found["sweep"]) == {"0.001", "0.01"}
    assert found["settings"]["data"] == "data.npz"  # not where it lay on this machine
    assert found["settings"]["steps"] == 6 and [line["step"] for line in found["curve"]] == [0, 6]
    assert found["environment"]["dtype"] == "float32"


def test_heads_have_neither_transition_nor_context(setup):
    for changes in ({"transition_rank": 2}, {"update_width": 2}, {"start_from": "folder"}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}: got .*, expected .*: heads have none"):
            setup(**changes)
    with pytest.raises(ValueError, match="kind: got 'hydra'"):
        setup(kind="hydra")
    with pytest.raises(ValueError, match="loss_vocabulary: got -1, expected at least 0"):
        setup(loss_vocabulary=-1)


def test_the_command_trains_every_kind_and_goes_on_after_a_limit(setup, tmp_path):
    settings = setup()
    arguments = {
        "data": settings.data, "output": tmp_path / "heads", "model": "tiny", "kinds": "medusa,early-exit",
        "learning_rates": "1e-3,1e-2", "sweep_steps": 2, "insertion_layer": 2, "num_offsets": 2, "steps": 4,
        "batch_size": 4, "anchors": 4, "max_length": 32, "ridge_tokens": 200, "held_out": 4, "seed": 0,
        "dtype": "float32", "device": "cpu", "keep_rows": False,
    }  # fmt: skip
    with pytest.raises(typer.Exit):
        main(**arguments, time_limit=0.0)
    main(**arguments, time_limit=None)
    curves = json.loads((tmp_path / "heads/curves.json").read_text())
    assert set(curves) == set(heads_in(tmp_path / "heads")) == set(KINDS)
    assert all(curves[kind]["settings"]["steps"] == 4 and len(curves[kind]["sweep"]) == 2 for kind in KINDS)
    for changes, message in (
        ({"learning_rates": "1e-3,x"}, "learning_rates: got '1e-3,x', expected numbers"),
        ({"learning_rates": "0"}, "learning_rates: got '0', expected numbers above 0"),
        ({"kinds": "medusa,hydra"}, "kinds: got 'medusa,hydra', expected one or more of medusa, early-exit, firp"),
        ({"kinds": "medusa,medusa"}, "kinds: got 'medusa,medusa', expected .*, each once"),
        ({"kinds": "firp", "loss_vocabulary": 5}, "loss_vocabulary: got 5 with firp, expected 0"),
        ({"insertion_layer": 9, "kinds": "early-exit"}, r"insertion_layer: got 9, expected 1\.\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            main(**{**arguments, **changes, "output": tmp_path / "bad"}, time_limit=None)


@pytest.fixture
def train(setup, tmp_path, monkeypatch):
    """The command with a transition that a tiny model can have, into one folder."""
    monkeypatch.setattr(TrainConfig, "__init__", partialmethod(TrainConfig.__init__, transition_rank=4))
    monkeypatch.setattr("firp.train.trainer.write_profile", lambda *_: None)
    arguments = {
        "data": setup().data, "output": tmp_path / "heads", "model": "tiny", "kinds": "firp", "learning_rates": "1e-3",
        "sweep_steps": 2, "insertion_layer": 2, "num_offsets": 2, "steps": 4, "batch_size": 4, "anchors": 4,
        "max_length": 32, "ridge_tokens": 200, "held_out": 4, "seed": 0, "dtype": "float32", "device": "cpu",
        "keep_rows": False, "time_limit": None,
    }  # fmt: skip
    return lambda **changes: main(**arguments | changes)


def test_firp_learns_beside_the_heads_from_their_text_alone(train, setup, tmp_path):
    train()
    train(kinds="medusa", learning_rates="1e-2", loss_vocabulary=5)
    curves = json.loads((tmp_path / "heads/curves.json").read_text())
    assert {kind: found["learning_rate"] for kind, found in curves.items()} == {"firp": 1e-3, "medusa": 1e-2}
    assert len({found["settings"]["text"] for found in curves.values()}) == 1
    assert firp.load_predictor(tmp_path / "heads/firp").weight.any()
    assert set(heads_in(tmp_path / "heads")) == {"medusa"}
    with pytest.raises(ValueError, match=r"seed: got 1, but .* is of 0"):
        train(kinds="early-exit", seed=1)
    path = Path(setup().data)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"prompt_lengths": arrays["prompt_lengths"] + 1})
    with pytest.raises(ValueError, match=r"text: got .*, but .*settings.json is of"):
        train(kinds="early-exit")


def test_an_update_learns_over_maps_that_stay(train, tmp_path, monkeypatch):
    small = {"learning_rate": 0.0, "update_width": 4, "draft_vocabulary": 8}
    monkeypatch.setattr("benchmarks.baselines.train.UPDATED", small)
    with pytest.raises(ValueError, match=r"kinds: got 'firp-update', expected firp with it: .* holds no predictor yet"):
        train(kinds="firp-update")
    train(kinds="firp-update,firp", keep_rows=True)
    maps, updated = (firp.load_predictor(tmp_path / "heads" / kind) for kind in ("firp", "firp-update"))
    assert torch.equal(maps.weight, updated.weight) and not torch.equal(maps.transition, updated.transition)
    assert updated.update_outputs.any() and maps.update_outputs is None
    settings = json.loads((tmp_path / "heads/curves.json").read_text())["firp-update"]["settings"]
    assert settings["start_from"] == "firp" and settings["update_width"] == 4 and settings["steps"] == 4


def test_a_run_of_unknown_settings_and_a_damaged_file_are_refused(train, tmp_path):
    train()
    (tmp_path / "heads/curves.json").write_text("{bad")
    with pytest.raises(ValueError, match=r"curves.json: not JSON: .*; remove it, and the same command writes it again"):
        train()
    (tmp_path / "heads/settings.json").unlink()
    with pytest.raises(ValueError, match=r"output: got .*heads with a run of unknown settings"):
        train()
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=r"output: got .*, expected a folder, not a file"):
            train(output=output)
