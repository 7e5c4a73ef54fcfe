"""The paper's figures: each against an oracle on a tiny model, kept part by part, drawn from their JSON alone."""

import json
import math

import firp
import numpy as np
import pytest
import torch
from firp.decoder.view import DecoderView
from firp.drafting.recording import record
from firp.tools.figures import cut
from firp.train.targets import rank_of
from models import update_predictor

import benchmarks.closed_form as closed_form
import benchmarks.paper.command as command_module
import benchmarks.paper.setup as setups
from benchmarks.baselines import compare
from benchmarks.paper import figure_1a, figure_1b, figure_3, figure_4, figure_5, table
from benchmarks.paper.command import command, plot
from benchmarks.paper.figures import FIGURES, MODULES

DRAFTERS = ("firp", "firp-maps", "early-exit", "medusa")


def figures(setup, figure):
    return json.loads((setup.out / f"{figure.NAME}.json").read_text())


@pytest.mark.parametrize("figure", MODULES, ids=lambda figure: figure.NAME)
def test_every_figure_is_made_drawn_and_kept(setup, figure, monkeypatch):
    if figure is figure_1a:
        monkeypatch.setattr(figure, "SIZES", (4,))
    made = setup()
    figure.measure(made)
    document = figures(made, figure)
    for part in document["parts"].values():
        assert part["seconds"] >= 0 and part["environment"]["dtype"] == "float32" and part["figures"]
    assert document["settings"]["max_new_tokens"] == 12
    plot(figure, made.out / f"{figure.NAME}.json")
    assert (made.out / f"{figure.NAME}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(made.out.glob("*.pt"))
    monkeypatch.setattr("firp.engine.engine.Engine.start", None)  # nothing is decoded or computed again
    monkeypatch.setattr("firp.decoder.view.DecoderView.run_layers", None)
    figure.measure(setup())
    assert figures(made, figure) == document
    with pytest.raises(ValueError, match=r"limit: got 3, but .* is of 4"):
        figure.measure(setup(limit=3))
    for damaged in ({}, {"settings": {}, "parts": {}}, document | {"parts": {"x": {"figures": {}}}}):
        path = made.out / "damaged.json"
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"damaged\.json: got no figures of .* that can be drawn"):
            plot(figure, path)


def test_figure_1b_is_what_decoding_gives(setup):
    """The replay against this engine, token by token, for the maps with transition, without, and for heads."""
    made = setup()
    figure_1b.measure(made)
    parts = figures(made, figure_1b)["parts"]
    assert set(parts) == {"firp", "firp-maps", "medusa", "early-exit"}
    maps = made.predictor.first_offsets(2)
    bare = firp.FirpPredictor.for_model(made.model, 2, 2)
    with torch.no_grad():
        bare.weight.copy_(maps.weight)
    for name, engine_of in (
        ("firp", lambda size: firp.Engine(made.model, maps, firp.TreeConfig(size, size))),
        ("firp-maps", lambda size: firp.Engine(made.model, bare, firp.TreeConfig(size, size))),
        *((kind, lambda size, h=h: compare.HeadEngine(made.model, h, size)) for kind, h in made.heads.items()),
    ):
        for size in (4, 16):
            engine, tokens, steps = engine_of(size), 0, 0
            for answer in made.answers:
                out = firp.generate(
                    made.model, answer.prompt[None], engine=engine, max_new_tokens=12, do_sample=False,
                    return_dict_in_generate=True,
                )  # fmt: skip
                assert out.sequences[0, len(answer.prompt) :].tolist() == answer.tokens
                tokens, steps = tokens + out.stats.tokens, steps + out.stats.steps
            assert parts[name]["figures"]["tau"][str(size)] == tokens / steps


def test_an_update_is_not_in_the_maps_alone_and_keeps_the_first_order(setup, monkeypatch):
    made = setup()
    updated = update_predictor(made.model, 1, num_offsets=2)
    monkeypatch.setattr(setups.firp, "load_predictor", lambda *_: updated)
    made = setup()
    whole, bare = made.recordings("firp")[0], made.recordings("firp-maps")[0]
    assert whole.knows_next and not bare.knows_next and "firp-maps" in made.drafters
    weights = firp.FirpPredictor.for_model(made.model, 2, updated.insertion_layer)
    weights.load_state_dict({"weight": updated.weight})
    answer = made.answers[0]
    expected = record(made.view, weights, answer.prompt, answer.tokens, 16)
    assert torch.equal(bare.candidates, expected.candidates)
    tables = torch.randn(31, 4), torch.randn(31, 4)
    ranks, drafted = figure_3.ranks_of(whole, tables), figure_3.ranks_of(whole, None)
    assert torch.equal(ranks[:, 0], drafted[:, 0]) and not torch.equal(ranks[:, 1], drafted[:, 1])


def test_figure_3_counts_the_places_of_the_answers_own_tokens(setup):
    made = setup(heads_folder=None)
    figure_3.measure(made)
    parts = figures(made, figure_3)["parts"]
    assert set(parts) == {"firp", "firp-maps"}
    hits, count = torch.zeros(2, 10), 0
    view, weight = DecoderView(made.model), made.predictor.weight
    for answer in made.answers:
        tokens = torch.cat([answer.prompt, torch.tensor(answer.tokens)])
        real = setups_rows(view, tokens, made.predictor.insertion_layer)
        for anchor in range(len(answer.prompt) - 1, len(tokens) - 3):
            rows = figure_5.pseudo_rows(view, weight, real, torch.tensor([[anchor]]), made.predictor.insertion_layer)
            order = view.logits(rows)[0, 0].argsort(-1, descending=True)
            for j in range(2):
                hits[j] += (order[j] == tokens[anchor + j + 2]).nonzero().item() < torch.arange(1, 11)
            count += 1
    assert parts["firp-maps"]["figures"]["positions"] == count
    torch.testing.assert_close(torch.tensor(parts["firp-maps"]["figures"]["top"]), hits / count)


def setups_rows(view, tokens, layer):
    from firp.decoder.passes import real_rows

    return real_rows(view, tokens[None], layer)


def test_the_transition_follows_the_texts_own_token(setup):
    made = setup(heads_folder=None)
    answer = made.answers[0]
    recording = record(made.view, made.predictor, answer.prompt, answer.tokens, 31)
    source, target = made.tables
    ranks = figure_3.ranks_of(recording, made.tables)
    for i in range(len(ranks)):
        for j in range(2):
            scores = torch.full((31,), -math.inf)
            logs = (
                recording.probabilities[i, j].log()
                + target[recording.candidates[i, j]] @ source[recording.tokens[i + j + 1]]
            )
            scores[recording.candidates[i, j]] = logs
            assert ranks[i, j] == rank_of(scores, recording.tokens[i + j + 2])


def test_figure_4_compares_the_states_of_one_layer_at_a_time(setup):
    made = setup()
    answer = made.answers[0]
    real, pseudo, anchor = figure_4.states(made, answer)
    ids = torch.cat([answer.prompt, torch.tensor(answer.tokens)])[None]
    found = made.model(ids, output_hidden_states=True).hidden_states
    first = len(answer.prompt) - 1
    torch.testing.assert_close(real[0, 0], found[2][0, first + 1 : first + 3])
    torch.testing.assert_close(real[1, 3], found[3][0, first + 4 : first + 6])
    torch.testing.assert_close(anchor[1, :, 0], found[3][0, first:-2])
    torch.testing.assert_close(pseudo[0, 2], made.predictor(found[2][0, first + 2]))
    rows = figure_5.pseudo_rows(made.view, made.predictor.weight, setups_rows(made.view, ids[0], 2),
                                torch.arange(first, ids.shape[1] - 2)[None], 2)  # fmt: skip
    torch.testing.assert_close(pseudo[-1], rows[0])


def test_figure_5_solves_the_maps_of_firp_train(setup):
    from firp.train.data import load_dataset, make_batch
    from firp.train.ridge import RidgeAccumulator, hidden_at_insertion

    made = setup(ridge_tokens=10_000)
    dataset = load_dataset(made.data)
    assert figure_5.depths(4) == [1, 2, 3]
    order = figure_5.BatchOrder(dataset, np.arange(20), figure_5.BATCH, figure_5.SEED)
    sources = {"two": closed_form.Source((2,)), "three": closed_form.Source((3,))}
    maps = closed_form.solve(made.view, dataset, order, sources, 1, 10_000, made.out / "partial.pt", [])
    accumulator, step = RidgeAccumulator(1, 32, torch.device("cpu")), 0
    while accumulator.count < 10_000:
        batch = make_batch(dataset, order.at(step), 512)
        accumulator.add(hidden_at_insertion(made.view, batch, 2), batch.lengths)
        step += 1
    torch.testing.assert_close(maps["two"], accumulator.solve())


def test_figure_5_goes_on_where_it_was_cut_off(setup, monkeypatch):
    made, add, calls = setup(ridge_tokens=3000), closed_form.RidgeAccumulator.add, []
    cut_at = [None]

    def note(self, *rows):
        calls.append(rows)
        if len(calls) == cut_at[0]:
            raise KeyboardInterrupt
        add(self, *rows)

    monkeypatch.setattr(closed_form.RidgeAccumulator, "add", note)
    figure_5.measure(made)
    whole, count = figures(made, figure_5), len(calls)
    (made.out / "figure-5.json").unlink()
    calls.clear()
    cut_at[0] = 25  # three depths a batch: in the ninth
    with pytest.raises(KeyboardInterrupt):
        figure_5.measure(setup(ridge_tokens=3000))
    calls.clear()
    cut_at[0] = None
    figure_5.measure(setup(ridge_tokens=3000))
    assert len(calls) == count - 3 * closed_form.BATCHES_BETWEEN_FILES
    again = figures(made, figure_5)
    assert {n: p["figures"] for n, p in again["parts"].items()} == {n: p["figures"] for n, p in whole["parts"].items()}
    (made.out / "figure-5.json").unlink()
    (made.out / "figure-5.partial.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"partial\.pt: cannot be read: .*; remove it to begin again"):
        figure_5.measure(setup(ridge_tokens=3000))


def test_answers_that_end_at_once_have_no_positions(setup):
    made, short = setup(heads_folder=None), []
    for answer in made.answers[:2]:
        short.append(setups.Answer(answer.category, answer.prompt, answer.tokens[:1]))
    made.__dict__["answers"] = [*short, *made.answers[2:]]
    for figure in (figure_1b, figure_3, figure_4, figure_5):
        figure.measure(made)
    assert figures(made, figure_3)["parts"]["firp"]["figures"]["positions"] == 2 * (12 - 2)
    assert figures(made, figure_5)["parts"]["predictor"]["figures"]["positions"] == 2 * (12 - 1)
    made.__dict__["answers"] = short
    with pytest.raises(ValueError, match="got no answer of more than 2 tokens"):
        figure_4._similarities(made)


def test_figures_of_heads_say_how_they_were_trained(setup, tmp_path):
    settings = {"steps": 5, "learning_rate": 1e-3, "seed": 0, "dtype": "float32"}
    (tmp_path / "heads/curves.json").write_text(json.dumps({"medusa": {"settings": settings}}))
    found = setup().made_from("medusa")["training"]
    assert found == {"steps": 5, "learning_rate": 1e-3, "seed": 0} and setup().made_from("early-exit")["training"] == {}


def test_depths_are_between_the_ends():
    assert figure_5.depths(30) == [5, 10, 15, 20, 25, 29] and figure_5.depths(2) == [1]


def test_bad_arguments(setup, tmp_path):
    with pytest.raises(ValueError, match="limit: got 0, expected at least 1"):
        setup(limit=0)
    with pytest.raises(FileNotFoundError, match=r"heads: got .*none', expected an existing folder"):
        _ = setup(heads_folder=tmp_path / "none").heads
    with pytest.raises(ValueError, match="data: got none, expected training text"):
        figure_5.measure(setup(data=None))
    with pytest.raises(ValueError, match="only: got 'figure-2', expected some of figure-1a, "):
        command(FIGURES, "")(only="figure-2", out=tmp_path)
    with pytest.raises(FileNotFoundError, match="run without --plot-only"):
        command(FIGURES, "")(only="figure-3", out=tmp_path, plot_only=True, device="cpu")
    assert {figure_1a, table} <= set(MODULES)


def test_the_page_shows_the_committed_figures():
    page = (command_module.OUT.parents[2] / "docs/paper.md").read_text()

    parts = {
        name: json.loads((command_module.OUT / f"{name}.json").read_text())["parts"]
        for name in ("figure-1b", "figure-3", "figure-4", "figure-5")
    }
    drafters = [parts["figure-1b"][name]["figures"] for name in DRAFTERS]
    for size, rows in drafters[0]["rows"].items():
        assert f"| {size} | {rows} | {' | '.join(cut(d['tau'][size], 3) for d in drafters)} |\n" in page
    for drafter in drafters:
        assert " | ".join(cut(tau["16"], 2) for _, tau in sorted(drafter["categories"].items())) + " |\n" in page
    for name in DRAFTERS:
        for step, top in enumerate(parts["figure-3"][name]["figures"]["top"], start=1):
            assert f"| {step} | {' | '.join(cut(100 * top[n - 1], 1) for n in (1, 2, 3, 4, 5, 10))} |\n" in page
    states = parts["figure-4"]["firp"]["figures"]
    for series, step in (("pseudo", 0), ("anchor", 0), *(("pseudo, centred", step) for step in range(3))):
        values = dict(zip(states["layers"], states["cosine"][series][step], strict=True))
        assert " | ".join(cut(values[layer], 3) for layer in (20, 22, 24, 26, 28, 29, 30)) + " |\n" in page
    for part in parts["figure-5"].values():
        assert f"| {' | '.join(cut(100 * part['figures']['top'][n], 1) for n in ('1', '4', '10'))} |\n" in page
