"""Drafts of a predictor with a refiner: for any weights, the output is the model's own."""

import gc
import weakref

import firp
import pytest
import torch
from firp.decoder.view import DecoderView
from firp.drafting.drafters import Drafters
from firp.drafting.refined import RefinedMarginals
from models import refined_predictor, tiny_model

import firp_kernels

OPTIONS = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}


def prompts(seed, batch, vocab):
    return torch.randint(4, vocab, (batch, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["random", "zero", "nan", "inf", "huge"])
@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "cohere"])
def test_greedy_tokens_are_the_models_own(family, kind):
    model = tiny_model(3, family, vocab=29, dtype=torch.float32)
    predictor, ids = refined_predictor(model, 1, kind), prompts(2, 3, 29)
    expected = model.generate(ids, do_sample=False, **OPTIONS)
    for tree in (
        firp.TreeConfig(9, 4),
        firp.TreeConfig(33, 33),
        firp.TreeConfig(6, 2, "static"),
        firp.TreeConfig(1, 1),
    ):
        found = firp.generate(model, ids, predictor=predictor, tree=tree, do_sample=False, **OPTIONS)
        assert torch.equal(found, expected), tree


def test_sampled_tokens_are_those_of_plain_decoding():
    model = tiny_model(4, vocab=29, dtype=torch.float32)
    ids, options = prompts(5, 2, 29), {"do_sample": True, "temperature": 1.3, "seed": 7, **OPTIONS}
    plain = firp.generate(model, ids, engine=firp.Engine(model), **options)
    engine = firp.Engine(model, refined_predictor(model, 2), firp.TreeConfig(8, 3))
    assert torch.equal(firp.generate(model, ids, engine=engine, **options), plain)


def test_children_are_scored_given_their_parent():
    """Each row of the conditioned marginals against the refiner called with that one parent, and the whole head."""
    model = tiny_model(5, "granite", vocab=29, dtype=torch.float32)
    predictor, view = refined_predictor(model, 3), DecoderView(model)
    marginals = RefinedMarginals(view, predictor, firp_kernels.bind(None))
    states = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    root = torch.tensor([5, 11])
    probabilities, candidates, (conditioned, order) = marginals(states, root, 7)
    unit = torch.nn.functional.rms_norm(view.embed(torch.arange(29)), (model.config.hidden_size,), eps=1e-6)
    refiner = predictor.refiner("cpu", torch.float32)
    for b in range(2):
        assert conditioned[b, 0, 0].tolist() == probabilities[b, 0].tolist()
        for depth in (1, 2):
            for c in range(7):
                parent = candidates[b, depth - 1, c]
                inner = refiner.inner(states, unit[root])[b, depth]
                state = refiner.updated(depth, states[b, depth], inner, unit[parent])
                scores = view.logits(state[None, None])[0, 0, candidates[b, depth]]
                expected = scores.softmax(-1) * probabilities[b, depth].sum()
                torch.testing.assert_close(
                    conditioned[b, depth, c], expected[order[b, depth, c].long()], rtol=1e-4, atol=1e-6
                )
                assert conditioned[b, depth, c].diff().le(0).all()


@pytest.mark.parametrize("tokens", [(3,), (0, 28), tuple(range(4, 25, 2))], ids=str)
@pytest.mark.parametrize("family", ["llama", "granite", "cohere"])
def test_greedy_tokens_are_the_models_own_where_few_can_be_drafted(family, tokens):
    model = tiny_model(3, family, vocab=29, dtype=torch.float32)
    predictor, ids = refined_predictor(model, 1, tokens=tokens), prompts(2, 3, 29)
    expected = model.generate(ids, do_sample=False, **OPTIONS)
    for tree in (firp.TreeConfig(9, 4), firp.TreeConfig(6, 2, "static")):
        found = firp.generate(model, ids, predictor=predictor, tree=tree, do_sample=False, **OPTIONS)
        assert torch.equal(found, expected), tree


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ["llama", "granite", "cohere"])
def test_a_list_of_tokens_is_scored_as_the_whole_head_scores_them(family, bias):
    model = tiny_model(5, family, vocab=29, dtype=torch.float32)
    if bias:
        values = torch.randn(29, generator=torch.Generator().manual_seed(1))
        model.get_output_embeddings().bias = torch.nn.Parameter(values, requires_grad=False)
    view, ops, root = DecoderView(model), firp_kernels.bind(None), torch.tensor([5, 11])
    states = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = RefinedMarginals(view, refined_predictor(model, 3), ops)
    every = RefinedMarginals(view, refined_predictor(model, 3, tokens=tuple(range(29))), ops)
    for ours, theirs in zip(every(states, root, 7)[:2], whole(states, root, 7)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    some = tuple(range(1, 29, 3))
    listed = RefinedMarginals(view, refined_predictor(model, 3, tokens=some), ops)
    probabilities, candidates, _ = listed(states, root, 4)
    unit = torch.nn.functional.rms_norm(view.embed(root), (model.config.hidden_size,), eps=1e-6)
    rows = listed.refiner.marginal(states, listed.refiner.inner(states, unit))
    best = view.logits(rows)[..., list(some)].softmax(-1).topk(4)
    torch.testing.assert_close(probabilities, best.values, rtol=1e-4, atol=1e-6)
    assert torch.equal(candidates, torch.tensor(some)[best.indices])


def test_the_predictor_is_left_where_it_is():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = refined_predictor(model, 1).double()
    firp.generate(model, prompts(1, 1, 29), predictor=predictor, tree=firp.TreeConfig(4, 2), do_sample=False, **OPTIONS)
    assert {parameter.dtype for parameter in predictor.parameters()} == {torch.float64}


def test_weights_are_found_again_until_they_change():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = refined_predictor(model, 1, tokens=(3, 8, 20)).double()
    view, ops = DecoderView(model), firp_kernels.bind(None)

    def tensors():
        drafters = Drafters(view, ops, predictor, 2, 9)
        assert drafters.weight.shape[0] == 2
        return drafters.weight, drafters.refined.refiner.inputs, drafters.refined.head.weight

    def places():
        return [tensor.data_ptr() for tensor in tensors()]

    first, kept = places(), tensors()
    assert places() == first
    with torch.no_grad():
        predictor.refiner_bias += 1
    assert [a == b for a, b in zip(places(), first, strict=True)] == [True, False, False]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    torch.testing.assert_close(tensors()[2], 2 * kept[2])


def test_weights_die_with_their_predictor():
    model = tiny_model(6, vocab=29, dtype=torch.float32)
    predictor = refined_predictor(model, 1).double()
    inputs = weakref.ref(Drafters(DecoderView(model), firp_kernels.bind(None), predictor, 3, 9).refined.refiner.inputs)
    assert inputs() is not None
    del predictor
    gc.collect()
    assert inputs() is None
