"""Ablations: what a map reads, how it is scored, and a command that goes on."""

import json

import firp
import numpy as np
import pytest
import torch
from firp.decoder.passes import pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.train.data import BatchOrder, load_dataset
from models import tiny_model

import benchmarks.ablations.held_out as held_out_module
from benchmarks import closed_form
from benchmarks.ablations.__main__ import main
from benchmarks.ablations.held_out import HeldOut
from benchmarks.ablations.units import gather, train_units
from benchmarks.closed_form import Source, solve, unit


@pytest.fixture
def model():
    model = tiny_model(2, vocab=31, dtype=torch.float32).requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", tokens=rng.integers(4, 31, 1200).astype(np.uint16), offsets=np.arange(0, 1201, 30),
        prompt_lengths=np.full(40, 4, np.int32), greedy=np.arange(40) % 2 == 0,
    )  # fmt: skip
    return tmp_path / "data.npz"


def test_a_source_scales_further_states_to_the_first(model):
    states = {0: torch.randn(2, 3, 32), 2: 5 * torch.randn(2, 3, 32)}
    units = torch.randn(7, 32)
    found = Source((2, 0), units).of(states)
    assert found.shape == (2, 3, 71) and Source((2, 0), units).width(32) == 71
    torch.testing.assert_close(found[..., :32], states[2])
    torch.testing.assert_close(found[..., 32:64].norm(dim=-1), states[2].norm(dim=-1))
    torch.testing.assert_close(unit(found[..., 32:64]), unit(states[0]))
    torch.testing.assert_close(found[..., 64:], torch.nn.functional.silu(unit(states[2]) @ units.T))


def test_sums_of_another_run_are_not_gone_on_with(model, data, tmp_path, monkeypatch):
    """A pass is cut off; the same one goes on, one with another model or other sequences begins again."""
    monkeypatch.setattr("benchmarks.closed_form.BATCHES_BETWEEN_FILES", 1)
    dataset, partial = load_dataset(data), tmp_path / "partial.pt"

    def maps(model, sequences, tokens=400):
        order = BatchOrder(dataset, np.arange(sequences), 2, 0)
        return solve(DecoderView(model), dataset, order, {"t": Source((2,))}, 2, tokens, partial, [])["t"]

    def cut_off(model, sequences):
        steps = iter(range(3))
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            make_batch = closed_form.make_batch
            patch.setattr(closed_form, "make_batch", lambda *others: (next(steps), make_batch(*others))[1])
            maps(model, sequences)

    other = tiny_model(5, vocab=31, dtype=torch.float32).requires_grad_(False)
    whole = {}
    for run in ((model, 40), (other, 40), (model, 30)):
        whole[run] = maps(*run)
        partial.unlink()
    for begun, gone_on in (((model, 40), (model, 40)), ((model, 40), (other, 40)), ((model, 40), (model, 30))):
        partial.unlink(missing_ok=True)
        cut_off(*begun)
        assert partial.is_file()
        assert torch.equal(maps(*gone_on), whole[gone_on])


def test_accuracy_is_that_of_the_models_own_choice(model, data):
    """The oracle: every anchor alone, against the model's own scores."""
    dataset, view = load_dataset(data), DecoderView(model)
    weight, indices = torch.randn(2, 32, 32), [3, 7, 20]
    found = HeldOut(view, dataset, indices, 2).accuracy({"t": (Source((2,)), weight)})["t"]
    hits, kl, count = torch.zeros(2), torch.zeros(2), 0
    for index in indices:
        tokens = dataset.sequence(index)
        real, teacher = real_rows(view, tokens[None], 2), model(tokens[None]).logits[0].log_softmax(-1)
        for anchor in range(3, 28):
            scores = view.logits(pseudo_rows(view, weight, real, torch.tensor([[anchor]]), 2))[0, 0].log_softmax(-1)
            goal = teacher[anchor + 1 : anchor + 3]
            hits += scores.argmax(-1) == goal.argmax(-1)
            kl += (goal.exp() * (goal - scores)).sum(-1)
            count += 1
    assert found["anchors"] == count
    torch.testing.assert_close(torch.tensor(found["top1"]), hits / count)
    torch.testing.assert_close(torch.tensor(found["kl"]), kl / count, rtol=1e-4, atol=1e-4)


def test_tau_is_that_of_decoding(model, data, monkeypatch):
    monkeypatch.setattr(held_out_module, "NEW_TOKENS", 12)
    held_out = HeldOut(DecoderView(model), load_dataset(data), [1, 2, 5], 2)
    weight = torch.randn(2, 32, 32)
    predictor = firp.FirpPredictor.for_model(model, 2, 2)
    with torch.no_grad():
        predictor.weight.copy_(weight)
    found = held_out.tau(weight, [1, 2])
    engine, tokens, steps = firp.Engine(model, predictor, firp.TreeConfig(8, 8)), 0, 0
    for prompt in held_out.prompts:
        out = firp.generate(
            model, prompt[None], engine=engine, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
        )
        tokens, steps = tokens + out.stats.tokens, steps + out.stats.steps
    assert found["8, 8"]["2"] == pytest.approx(tokens / steps)


def test_units_lower_the_distance_that_the_closed_form_has(model, data):
    dataset, view = load_dataset(data), DecoderView(model)
    order = BatchOrder(dataset, np.arange(40), 8, 0)
    maps = solve(view, dataset, order, {"t": Source((2,))}, 2, 800, data.with_suffix(".pt"), [])["t"]
    states, usable = gather(view, dataset, order, 2, 2, 800)
    source, weight = train_units(states, usable, maps, 16, 2)

    def distance(source, weight):
        found = torch.einsum("kos,ns->nko", weight, source.of({2: states[usable]}))
        return (found - states[usable[:, None] + torch.arange(1, 3)]).square().sum(-1).mean()

    assert weight.shape == (2, 32, 48) and len(usable) >= 800
    assert distance(source, weight) < distance(Source((2,)), maps)


def test_the_command_keeps_every_part(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.ablations.__main__.firp.load_model", lambda *_: (model, None))
    monkeypatch.setattr("benchmarks.ablations.__main__.UNITS", 8)
    monkeypatch.setattr(held_out_module, "NEW_TOKENS", 6)
    path = tmp_path / "out/ablations.json"
    arguments = {"model": "tiny", "insertion_layer": 2, "tokens": 120, "held_out": 6, "device": "cpu"}
    main(data, path, **arguments)
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == [
        "sources", "tokens / 30", "tokens / 10", "tokens / 3", "units", "greedy answers", "sampled answers"
    ]  # fmt: skip
    sources = parts["sources"]["figures"]
    assert len(sources) == 5 and all(len(part["top1"]) == 6 for part in sources.values())
    assert set(sources["t"]["tau"]["8, 8"]) == set("123456")
    assert parts["units"]["figures"]["t"]["anchors"] == parts["units"]["figures"]["t, 8 trained units"]["anchors"]
    monkeypatch.setattr("firp.decoder.view.DecoderView.run_layers", None)  # nothing is computed again
    before = path.read_bytes()
    main(data, path, **arguments)
    assert path.read_bytes() == before and not list(tmp_path.rglob("*.pt"))
    for changes, message in (
        ({"tokens": 29}, "tokens: got 29, expected at least 30"),
        ({"insertion_layer": 4}, "insertion_layer: got 4, expected 1..3"),
    ):
        with pytest.raises(ValueError, match=message):
            main(data, path, **arguments | changes)
