"""Losses of the maps: what each is, on scores that are easy to reckon with, and a command that goes on."""

import json
import math
from dataclasses import replace

import firp
import pytest
import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from firp.train.objective import Objective
from firp.train.targets import divergence_of
from models import tiny_model, tiny_predictor

from benchmarks.ablations import losses

STUDENT = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
TEACHER = torch.tensor([[[0.25, 0.5, 0.25]]]).log()


def test_total_variation_is_half_the_distance():
    assert losses.total_variation(STUDENT, TEACHER).item() == pytest.approx(0.25)
    assert losses.total_variation(STUDENT, STUDENT).item() == 0


def test_the_mix_weighs_choice_and_distance():
    expected = 0.1 * math.log(4) + 0.9 * 0.5
    assert losses.choice_and_distance(STUDENT, TEACHER).item() == pytest.approx(expected)


def test_a_listed_loss_knows_no_other_token():
    listed = torch.tensor([0, 2])
    moved = STUDENT + torch.tensor([0.0, 5.0, 0.0])
    found = losses.among(listed, moved, TEACHER)
    torch.testing.assert_close(found, losses.among(listed, STUDENT, TEACHER))
    torch.testing.assert_close(found, divergence_of(STUDENT[..., listed], TEACHER[..., listed]))


@pytest.fixture
def command(tmp_path, monkeypatch, random_text):
    """The command on a tiny model, with few variants; its JSON, and how many trainings there were."""

    def load(*_):
        model = tiny_model(1, vocab=31, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        return model, None

    trained, run = [], losses.VariantTrainer.run
    monkeypatch.setattr("firp.train.trainer.load_model", load)
    monkeypatch.setattr("firp.load_model", load)
    monkeypatch.setattr(losses.VariantTrainer, "run", lambda self: (trained.append(self.variant), run(self))[1])
    kept = ("KL", "total variation", f"KL over {losses.LISTED} tokens", "KL, no transition")
    fits = {"transition_rank": 8}
    chosen = {name: losses.VARIANTS[name] for name in kept}
    small = {name: replace(variant, settings=fits | variant.settings) for name, variant in chosen.items()}
    monkeypatch.setattr(losses, "VARIANTS", small)
    data = random_text(40)

    def once() -> dict:
        losses.main(
            data, tmp_path / "runs", tmp_path / "losses.json", "tiny", insertion_layer=2, steps=4,
            batch_size=4, anchors=4, ridge_tokens=100, held_out=4, seed=0, dtype="float32", device="cpu",
        )  # fmt: skip
        return json.loads((tmp_path / "losses.json").read_text())["parts"]

    return once, trained


def test_each_variant_learns_its_own_loss_and_is_scored_alike(command, tmp_path):
    once, trained = command
    parts = once()
    assert list(parts) == list(losses.VARIANTS) and len(trained) == 4
    figures = {name: part["figures"] for name, part in parts.items()}
    starts = {tuple(found["start"]) for found in figures.values()}
    assert len(starts) == 1  # always the KL, of the same start
    starts = ("kl-[0-9a-f]*", "total-variation-*", "kl-over-*", "kl-no-transition-*")
    folders = [sorted((tmp_path / "runs").glob(start)) for start in starts]
    assert [len(found) for found in folders] == [1, 1, 1, 1]
    maps = [firp.load_predictor(found[0]).weight for found in folders]
    learned, distance, listed, alone = maps
    assert not torch.allclose(learned, distance, rtol=1e-5)
    torch.testing.assert_close(learned, listed)  # the list holds all 31 tokens
    assert torch.equal(learned, alone)  # what a transition learns does not reach the maps
    assert all(tau >= 1 for found in figures.values() for tau in found["tau"].values())


def test_a_second_run_trains_what_is_missing(command, tmp_path):
    once, trained = command
    whole = once()
    document = json.loads((tmp_path / "losses.json").read_text())
    del document["parts"]["total variation"]
    (tmp_path / "losses.json").write_text(json.dumps(document))
    trained.clear()
    again = once()
    assert [variant.divergence for variant in trained] == [losses.total_variation]
    assert again["total variation"]["figures"]["kl"] == whole["total variation"]["figures"]["kl"]


def test_another_loss_or_text_has_a_folder_of_its_own():
    """A checkpoint knows neither, so it would be resumed as theirs."""
    made = {losses.folder_of(name, {"data": text}) for name in ("KL", "KL, again") for text in ("one", "two")}
    made.add(losses.folder_of("total variation", {"data": "one"}))
    assert len(made) == 5
    assert losses.folder_of("KL", {"data": "one"}) in made


def test_scores_without_a_gradient_are_of_the_kl(monkeypatch):
    """What a run reports does not depend on what it learns."""
    seen = []
    monkeypatch.setattr("firp.train.objective.examine", lambda *arguments: seen.append(arguments[-1]) or 1 / 0)
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    view, predictor = DecoderView(model), tiny_predictor(model, 1)
    weights = torch.ones(predictor.num_offsets)
    objective = Objective(view, predictor.insertion_layer, weights, None, True, losses.total_variation)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        real = real_rows(view, tokens, predictor.insertion_layer)
    for gradient in (True, False):
        with pytest.raises(ZeroDivisionError):
            objective(predictor, tokens, real, torch.tensor([[2]]), torch.tensor([[True]]), gradient)
    assert seen == [losses.total_variation, divergence_of]
