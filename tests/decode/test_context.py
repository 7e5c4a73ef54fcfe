"""Drafts of a predictor whose transition has a context: for any weights, the output is the model's own."""

import gc
import weakref

import firp
import pytest
import torch
from firp.decoder.view import DecoderView
from firp.drafting.drafters import Drafters
from models import context_predictor, tiny_model

import firp_kernels

OPTIONS = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}


def prompts(seed, batch, vocab):
    return torch.randint(4, vocab, (batch, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["random", "zero", "nan", "inf", "huge"])
@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "cohere"])
def test_greedy_tokens_are_the_models_own(family, kind):
    model = tiny_model(3, family, vocab=29, dtype=torch.float32)
    predictor, ids = context_predictor(model, 1, kind), prompts(2, 3, 29)
    expected = model.generate(ids, do_sample=False, **OPTIONS)
    for tree in (
        firp.TreeConfig(9, 4),
        firp.TreeConfig(33, 33),
        firp.TreeConfig(6, 2, "static"),
        firp.TreeConfig(1, 1),
    ):
        found = firp.generate(model, ids, predictor=predictor, tree=tree, do_sample=False, **OPTIONS)
        assert torch.equal(found, expected), tree


def test_compiled_layers_compile_the_context_too():
    model = tiny_model(3, vocab=29, dtype=torch.float32, num_hidden_layers=3)
    predictor, ids = context_predictor(model, 1, layer=1), prompts(2, 1, 29)
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
    engine = firp.Engine(model, context_predictor(model, 1), firp.TreeConfig(5, 2), head=head)
    state = engine.start([prompts(2, 1, 29)[0]], 20, [])
    engine.step(state)
    scored = engine._step.score(engine._step.forward(state), state.tree)
    assert scored.nodes.shape[1] == 5 and scored.pseudo is None


def test_one_pass_of_the_head_is_refused():
    model = tiny_model(3, vocab=29, dtype=torch.float32)
    with pytest.raises(ValueError, match="head: got 'one-pass' with a predictor that has a context"):
        firp.Engine(model, context_predictor(model, 1), firp.TreeConfig(5, 2), head="one-pass")


def test_sampled_tokens_are_those_of_plain_decoding():
    model = tiny_model(4, vocab=29, dtype=torch.float32)
    ids, options = prompts(5, 2, 29), {"do_sample": True, "temperature": 1.3, "seed": 7, **OPTIONS}
    plain = firp.generate(model, ids, engine=firp.Engine(model), **options)
    engine = firp.Engine(model, context_predictor(model, 2), firp.TreeConfig(8, 3))
    assert torch.equal(firp.generate(model, ids, engine=engine, **options), plain)


def conditioner_of(model, predictor):
    """Of the drafters that an engine makes."""
    return Drafters(DecoderView(model), firp_kernels.bind(None), predictor, predictor.num_offsets, 9).conditioner


def test_candidates_are_scored_as_the_formula_says():
    """Every row of the conditioned marginals, each of one parent, against the formula token by token."""
    model = tiny_model(5, "granite", vocab=29, dtype=torch.float64)
    predictor = context_predictor(model, 3)
    conditioner, view = conditioner_of(model, predictor), DecoderView(model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, model.config.hidden_size, generator=generator, dtype=torch.float64)
    candidates = torch.stack([torch.randperm(29, generator=generator)[:7] for _ in range(6)]).view(2, 3, 7)
    probabilities = torch.rand(2, 3, 7, generator=generator) / 10
    first, root = torch.tensor([3, 9]), torch.tensor([5, 11])
    found, order = conditioner(probabilities, candidates, conditioner.known(states, first), root)
    source, target = conditioner.source, conditioner.target
    rows = torch.nn.functional.rms_norm(view.embed(torch.arange(29)), (model.config.hidden_size,), eps=1e-6)
    states = torch.nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)
    inputs, bias, parents, outputs, _ = predictor.context_tensors
    for b in range(2):
        for depth in range(3):
            known = inputs[depth, 0] @ states[b, depth] + inputs[depth, 1] @ rows[first[b]] + bias[depth]
            for c in range(7):
                parent = candidates[b, depth - 1, c] if depth else root[b]
                inner = known + parents @ rows[parent]
                query = source[parent] + outputs @ (inner * torch.sigmoid(inner))
                given = probabilities[b, depth]
                expected = given.log() + target[candidates[b, depth]] @ query
                expected = expected.softmax(-1) * given.sum()
                ranked = expected[order[b, depth, c].long()]
                torch.testing.assert_close(found[b, depth, c], ranked, rtol=1e-4, atol=1e-6, check_dtype=False)
                assert found[b, depth, c].diff().le(0).all()


def test_states_are_updated_as_the_formula_says():
    model = tiny_model(5, "granite", vocab=29, dtype=torch.float64)
    predictor = context_predictor(model, 3)
    conditioner, view, width = conditioner_of(model, predictor), DecoderView(model), model.config.hidden_size
    states = 3 * torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.tensor([3, 9])
    found = conditioner.updated(states, conditioner.known(states, first))
    inputs, bias, _, _, updates = predictor.context_tensors
    for b in range(2):
        known = torch.nn.functional.rms_norm(view.embed(first[b]), (width,), eps=1e-6)
        for depth in range(3):
            size = (states[b, depth].square().mean() + 1e-6).sqrt()
            inner = inputs[depth, 0] @ (states[b, depth] / size) + inputs[depth, 1] @ known + predictor.context_bias[depth]
            expected = states[b, depth] + size * (updates[depth] @ (inner * torch.sigmoid(inner)))
            torch.testing.assert_close(found[b, depth], expected, rtol=1e-6, atol=1e-6)


def test_outputs_of_zero_leave_the_transition_as_it_is():
    model = tiny_model(5, vocab=29, dtype=torch.float64)
    predictor = context_predictor(model, 3)
    with torch.no_grad():
        predictor.context_outputs.zero_()
    conditioner = conditioner_of(model, predictor)
    candidates = torch.arange(21).view(1, 3, 7)
    given, root = torch.rand(1, 3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([28])
    known = conditioner.known(torch.ones(1, 3, model.config.hidden_size, dtype=torch.float64), root)
    found, order = conditioner(given, candidates, known, root)
    tables = conditioner.source, conditioner.target
    expected, ranks = firp_kernels.condition_marginals(given, candidates, root, *tables, 7)
    assert torch.equal(order, ranks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_predictor_is_left_where_it_is():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = context_predictor(model, 1).double()
    firp.generate(model, prompts(1, 1, 29), predictor=predictor, tree=firp.TreeConfig(4, 2), do_sample=False, **OPTIONS)
    assert {parameter.dtype for parameter in predictor.parameters()} == {torch.float64}


def test_weights_are_found_again_until_they_change():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = context_predictor(model, 1).double()
    view, ops = DecoderView(model), firp_kernels.bind(None)

    def tensors():
        drafters = Drafters(view, ops, predictor, 2, 9)
        assert drafters.weight.shape[0] == 2
        return drafters.weight, drafters.transition[0], drafters.conditioner.context.inputs

    def same(tensors, others):
        return [a.data_ptr() == b.data_ptr() for a, b in zip(tensors, others, strict=True)]

    first = tensors()
    assert same(tensors(), first) == [True, True, True]
    with torch.no_grad():
        predictor.context_bias += 1
    second = tensors()
    assert same(second, first) == [True, True, False]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert same(tensors(), second) == [True, False, True]


def test_weights_die_with_their_predictor():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = context_predictor(model, 1).double()
    inputs = weakref.ref(conditioner_of(model, predictor).context.inputs)
    assert inputs() is not None
    del predictor
    gc.collect()
    assert inputs() is None
