"""Variants of training: what each loss is, on scores that are easy to reckon with, and a command that goes on."""

import json
import math
from dataclasses import replace

import firp
import pytest
import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from firp.drafting.profile import load_profile
from firp.train.config import TrainConfig
from firp.train.objective import Objective
from firp.train.targets import divergence_of
from models import tiny_model, tiny_predictor

from benchmarks.ablations import trained, variants

STUDENT = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
TEACHER = torch.tensor([[[0.25, 0.5, 0.25]]]).log()


def test_total_variation_is_half_the_distance():
    assert variants.total_variation(STUDENT, TEACHER).item() == pytest.approx(0.25)
    assert variants.total_variation(STUDENT, STUDENT).item() == 0


def test_the_mix_weighs_choice_and_distance():
    expected = 0.1 * math.log(4) + 0.9 * 0.5
    assert variants.choice_and_distance(STUDENT, TEACHER).item() == pytest.approx(expected)


def test_a_listed_loss_knows_no_other_token():
    listed = torch.tensor([0, 2])
    moved = STUDENT + torch.tensor([0.0, 5.0, 0.0])
    found = variants.among(listed, moved, TEACHER)
    torch.testing.assert_close(found, variants.among(listed, STUDENT, TEACHER))
    torch.testing.assert_close(found, divergence_of(STUDENT[..., listed], TEACHER[..., listed]))


def load(*_):
    model = tiny_model(1, vocab=31, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model, None


@pytest.fixture
def command(tmp_path, monkeypatch, random_text):
    """The command on a tiny model, with few variants; its JSON, and how many trainings there were."""

    runs, run = [], variants.VariantTrainer.run
    monkeypatch.setattr("firp.train.trainer.load_model", load)
    monkeypatch.setattr("firp.load_model", load)
    monkeypatch.setattr(variants.VariantTrainer, "run", lambda self: (runs.append(self.variant), run(self))[1])
    kept = ("KL", "total variation", f"KL over {variants.LISTED} tokens", "KL, no transition")
    fits = {"transition_rank": 8}
    chosen = {name: trained.VARIANTS[name] for name in kept}
    small = {name: replace(variant, settings=fits | variant.settings) for name, variant in chosen.items()}
    monkeypatch.setattr(trained, "VARIANTS", small)
    data = random_text(40)

    def once(**options) -> dict:
        trained.main(
            data, tmp_path / "runs", tmp_path / "trained.json", "tiny", insertion_layer=2, steps=4,
            batch_size=4, anchors=4, ridge_tokens=100, held_out=4, seed=0, dtype="float32", device="cpu", **options,
        )  # fmt: skip
        return json.loads((tmp_path / "trained.json").read_text())["parts"]

    return once, runs


def test_each_variant_learns_its_own_loss_and_is_scored_alike(command, tmp_path):
    once, runs = command
    parts = once()
    assert list(parts) == list(trained.VARIANTS) and len(runs) == 4
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
    once, runs = command
    whole = once()
    document = json.loads((tmp_path / "trained.json").read_text())
    del document["parts"]["total variation"]
    (tmp_path / "trained.json").write_text(json.dumps(document))
    runs.clear()
    again = once()
    assert [variant.divergence for variant in runs] == [variants.total_variation]
    assert again["total variation"]["figures"]["kl"] == whole["total variation"]["figures"]["kl"]


def test_only_the_named_variants_are_trained(command):
    once, runs = command
    assert list(once(only=["KL, no transition", "KL"])) == ["KL", "KL, no transition"] and len(runs) == 2
    with pytest.raises(ValueError, match="only: got 'KL, no', expected one of KL; total variation;"):
        once(only=["KL, no"])
    assert len(runs) == 2 and list(once(only=["total variation"])) == ["KL", "KL, no transition", "total variation"]


def test_a_variant_that_the_model_cannot_have_is_named_and_left_out(command, capsys):
    once, runs = command
    trained.VARIANTS["KL, t = 29"] = replace(trained.VARIANTS["KL"], settings={"insertion_layer": 29})
    assert "KL, t = 29" not in once() and len(runs) == 4
    assert "left out: KL, t = 29: insertion_layer: got 29, expected 1..3" in capsys.readouterr().err


def test_another_loss_or_text_has_a_folder_of_its_own():
    """A checkpoint knows neither, so it would be resumed as theirs."""
    made = {trained.folder_of(name, {"data": text}) for name in ("KL", "KL, again") for text in ("one", "two")}
    made.add(trained.folder_of("total variation", {"data": "one"}))
    assert len(made) == 5
    assert trained.folder_of("KL", {"data": "one"}) in made


def test_scores_without_a_gradient_are_of_the_kl(monkeypatch):
    """What a run reports does not depend on what it learns."""
    seen = []
    monkeypatch.setattr("firp.train.objective.examine", lambda *arguments: seen.append(arguments[-1]) or 1 / 0)
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    view, predictor = DecoderView(model), tiny_predictor(model, 1)
    weights = torch.ones(predictor.num_offsets)
    objective = Objective(view, predictor.insertion_layer, weights, None, True, variants.total_variation)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        real = real_rows(view, tokens, predictor.insertion_layer)
    for gradient in (True, False):
        with pytest.raises(ZeroDivisionError):
            objective(predictor, tokens, real, torch.tensor([[2]]), torch.tensor([[True]]), gradient)
    assert seen == [variants.total_variation, divergence_of]


SHAPES = {"layers": variants.Variant(reads=(0.5, 0.0)), "units": variants.Variant(units=7)}


@pytest.fixture
def wide(tmp_path, monkeypatch, random_text):
    """A trainer of a variant that no predictor of the package is, by name; else it is `firp train` itself."""

    monkeypatch.setattr("firp.train.trainer.load_model", load)
    config = TrainConfig(
        "tiny", str(random_text(40)), 2, 2, 3, 4, 4, ridge_tokens=100, held_out=4, transition_rank=4
    )  # fmt: skip
    known = SHAPES | {"two tokens": variants.Variant(two_tokens=True)}
    return lambda name: variants.VariantTrainer(known.get(name, variants.Variant()), config, tmp_path / name, "cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_wide_maps_learn_and_have_a_tau(wide, name):
    trainer = wide(name)
    width = trainer.predictor.hidden_size
    found = trained.figures(lambda: trainer)
    assert trainer.predictor.weight[..., width:].abs().max() > 0 and found["tau"]["4, 2, 2"] >= 1
    if name == "units":
        assert not torch.equal(trainer.predictor.units, wide("units").predictor.units)
    assert found["kl"] != found["start"]


def test_a_transition_over_two_tokens_learns_and_has_a_tau(wide):
    trainer = wide("two tokens")
    found = trained.figures(lambda: trainer)
    assert trainer.predictor.second.abs().max() > 0 and found["tau"]["4, 2, 2"] >= 1


@pytest.mark.parametrize("name", SHAPES)
def test_maps_that_read_nothing_more_are_those_of_firp_train(wide, name):
    plain, other = wide("plain"), wide(name)
    with torch.no_grad():
        plain.predictor.weight.add_(torch.randn(plain.predictor.weight.shape) * 0.1)
        other.predictor.weight[..., : plain.predictor.hidden_size] = plain.predictor.weight
    torch.testing.assert_close(plain.evaluate().kl, other.evaluate().kl)
    for trainer in (plain, other):
        trainer.output.mkdir(exist_ok=True)
        trainer.write_result()
    own, same = (load_profile(trainer.output / "acceptance.npz") for trainer in (plain, other))
    assert (own.places == same.places).mean() > 0.99


def test_further_states_stand_beside_the_first(wide):
    trainer = wide("layers")
    tokens = torch.arange(4, 16)[None]  # the embedding of token 0 is zero
    rows = variants.wide_rows(trainer.source, trainer.view, tokens, 2)
    real = real_rows(trainer.view, tokens, 2)
    half = real_rows(trainer.view, tokens, 1).inserted
    norm = real.inserted.norm(dim=-1, keepdim=True)
    embedded = trainer.view.embed(tokens)
    expected = [real.inserted, *(part * (norm / part.norm(dim=-1, keepdim=True)) for part in (half, embedded))]
    torch.testing.assert_close(rows.inserted, torch.cat(expected, -1))
