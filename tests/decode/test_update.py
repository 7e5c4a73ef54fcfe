"""Drafts of a predictor that updates final states: for any weights, the output is the model's own."""

import gc
import weakref

import firp
import pytest
import torch
from firp.decoder.view import DecoderView
from firp.drafting.drafters import Drafters
from firp.drafting.transition import condition
from firp.drafting.update import DraftHead
from models import tiny_model, update_predictor

import firp_kernels

OPTIONS = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}


def prompts(seed, batch, vocab):
    return torch.randint(4, vocab, (batch, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["random", "zero", "nan", "inf", "huge"])
@pytest.mark.parametrize("family, listed", [("llama", 0), ("llama", 5), ("granite", 11), ("phi3", 0), ("cohere", 1)])
def test_greedy_tokens_are_the_models_own(family, listed, kind):
    model = tiny_model(3, family, vocab=29, dtype=torch.float32)
    predictor, ids = update_predictor(model, 1, kind, listed=listed), prompts(2, 3, 29)
    expected = model.generate(ids, do_sample=False, **OPTIONS)
    for tree in (
        firp.TreeConfig(9, 4),
        firp.TreeConfig(33, 33),
        firp.TreeConfig(6, 2, "static"),
        firp.TreeConfig(1, 1),
    ):
        found = firp.generate(model, ids, predictor=predictor, tree=tree, do_sample=False, **OPTIONS)
        assert torch.equal(found, expected), tree


def test_compiled_layers_compile_the_update_too():
    model = tiny_model(3, vocab=29, dtype=torch.float32, num_hidden_layers=3)
    predictor, ids = update_predictor(model, 1, layer=1), prompts(2, 1, 29)
    engine = firp.Engine(model, predictor, firp.TreeConfig(5, 2), compile=True)
    eager = firp.Engine(model, predictor, firp.TreeConfig(5, 2))
    found, expected = (
        firp.generate(model, ids, engine=one, do_sample=False, return_dict_in_generate=True, **OPTIONS)
        for one in (engine, eager)
    )
    assert torch.equal(found.sequences, expected.sequences) and found.stats == expected.stats


@pytest.mark.parametrize("head", [None, "two-pass"])
def test_the_nodes_pass_the_head_alone(head):
    model = tiny_model(3, vocab=29, dtype=torch.float32)
    engine = firp.Engine(model, update_predictor(model, 1), firp.TreeConfig(5, 2), head=head)
    state = engine.start([prompts(2, 1, 29)[0]], 20, [])
    engine.step(state)
    scored = engine._step.score(engine._step.forward(state), state.tree)
    assert scored.nodes.shape[1] == 5 and scored.pseudo is None


def test_one_pass_of_the_head_is_refused():
    model = tiny_model(3, vocab=29, dtype=torch.float32)
    with pytest.raises(ValueError, match="head: got 'one-pass' with a predictor that updates pseudo rows before"):
        firp.Engine(model, update_predictor(model, 1), firp.TreeConfig(5, 2), head="one-pass")


def test_sampled_tokens_are_those_of_plain_decoding():
    model = tiny_model(4, vocab=29, dtype=torch.float32)
    ids, options = prompts(5, 2, 29), {"do_sample": True, "temperature": 1.3, "seed": 7, **OPTIONS}
    plain = firp.generate(model, ids, engine=firp.Engine(model), **options)
    engine = firp.Engine(model, update_predictor(model, 2), firp.TreeConfig(8, 3))
    assert torch.equal(firp.generate(model, ids, engine=engine, **options), plain)


def updater_of(model, predictor):
    """Of the drafters that an engine makes."""
    return Drafters(DecoderView(model), firp_kernels.bind(None), predictor, predictor.num_offsets, 9).updater


@pytest.mark.parametrize("family, listed", [("granite", 0), ("granite", 8), ("llama", 29), ("phi3", 3)])
def test_updated_rows_are_scored_as_the_formula_says(family, listed):
    model = tiny_model(5, family, vocab=29, dtype=torch.float64)
    predictor = update_predictor(model, 3, listed=listed)
    updater, view, width = updater_of(model, predictor), DecoderView(model), model.config.hidden_size
    states = 3 * torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.tensor([3, 9])
    found = updater.scores(states, first)
    inputs, bias, outputs = predictor.update_tensors
    tokens = predictor.draft_tokens if listed else torch.arange(29)
    assert torch.equal(updater.head.tokens_at(torch.arange(len(tokens))), tokens)
    for b in range(2):
        known = view.embed(first[b])
        known = known / (known.square().mean() + 1e-6).sqrt()
        for depth in range(3):
            size = states[b, depth].square().mean().sqrt()
            inner = inputs[depth, 0] @ (states[b, depth] / size) + inputs[depth, 1] @ known + bias[depth]
            updated = states[b, depth] + size * (outputs[depth] @ (inner * torch.sigmoid(inner)))
            expected = view.logits(updated[None])[0, tokens]
            torch.testing.assert_close(found[b, depth], expected, rtol=1e-5, atol=1e-5)


def test_outputs_of_zero_change_nothing():
    model = tiny_model(5, vocab=29, dtype=torch.float64)
    predictor = update_predictor(model, 3)
    with torch.no_grad():
        predictor.update_outputs.zero_()
    states = torch.randn(2, 3, model.config.hidden_size, dtype=torch.float64)
    found = updater_of(model, predictor).scores(states, torch.tensor([28, 0]))
    assert torch.equal(found, DecoderView(model).logits(states))


def test_the_transition_leaves_rows_that_know_the_root_as_they_are():
    """Depth 1 of the first sequence; the second one's are given the root as before."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, 3, 7, generator=generator).sort(-1, descending=True).values / 7
    candidates = torch.stack([torch.randperm(29, generator=generator)[:7] for _ in range(6)]).view(2, 3, 7)
    tables, root = torch.randn(2, 29, 4, generator=generator).unbind(), torch.tensor([5, 11])
    ops = firp_kernels.bind(None)
    after, order = condition(ops, probabilities, candidates, root, tables, 5, torch.tensor([True, False]))
    expected, ranks = firp_kernels.condition_marginals(probabilities, candidates, root, *tables, 5)
    assert torch.equal(after[0, 0], probabilities[0, :1, :5].expand(7, -1))
    assert torch.equal(order[0, 0], torch.arange(5, dtype=torch.int32).expand(7, -1))
    for found, usual in ((after, expected), (order, ranks)):
        assert torch.equal(found[0, 1:], usual[0, 1:]) and torch.equal(found[1], usual[1])


def test_only_listed_tokens_are_drafted():
    model = tiny_model(3, vocab=29, dtype=torch.float32)
    predictor = update_predictor(model, 1, listed=6)
    engine, listed = firp.Engine(model, predictor, firp.TreeConfig(9, 4)), set(predictor.draft_tokens.tolist())
    state = engine.start([prompts(2, 1, 29)[0]], 40, [])
    drafted = set()
    for _ in range(8):
        engine.step(state)
        tree = state.tree
        drafted |= set(tree.tokens[0, 1:][tree.parents[0, 1:] >= 0].tolist())
    assert drafted and drafted <= listed


def test_a_head_of_another_kind_scores_all_tokens():
    """Such as one with an adapter: its weight alone would not be what it multiplies by."""
    model = tiny_model(3, vocab=29, dtype=torch.float32)

    class Doubled(torch.nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    head = Doubled(model.config.hidden_size, 29, bias=False)
    head.weight = model.lm_head.weight
    view, predictor = DecoderView(model), update_predictor(model, 1, listed=6)
    model.lm_head = head
    found = DraftHead.of(view, predictor.draft_tokens, torch.nn.functional.linear)
    assert found.weight is None and found.tokens is None


def test_the_predictor_is_left_where_it_is():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = update_predictor(model, 1).double()
    firp.generate(model, prompts(1, 1, 29), predictor=predictor, tree=firp.TreeConfig(4, 2), do_sample=False, **OPTIONS)
    assert {parameter.dtype for parameter in predictor.parameters()} == {torch.float64}


def test_weights_are_found_again_until_they_change():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = update_predictor(model, 1).double()
    view, ops = DecoderView(model), firp_kernels.bind(None)

    def tensors():
        drafters = Drafters(view, ops, predictor, 2, 9)
        assert drafters.weight.shape[0] == 2
        return drafters.weight, drafters.transition[0], drafters.updater.weights[0]

    def same(tensors, others):
        return [a.data_ptr() == b.data_ptr() for a, b in zip(tensors, others, strict=True)]

    first = tensors()
    assert same(tensors(), first) == [True, True, True]
    with torch.no_grad():
        predictor.update_bias += 1
    second = tensors()
    assert same(second, first) == [True, True, False]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert same(tensors(), second) == [True, False, True]


def test_weights_die_with_their_predictor():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = update_predictor(model, 1).double()
    inputs = weakref.ref(updater_of(model, predictor).weights[0]._base)
    assert inputs() is not None
    del predictor
    gc.collect()
    assert inputs() is None
