"""What holds inside a step: the cache, the independence of node rows, and the user's model left alone."""

import copy
import random

import firp
import pytest
import torch
from firp.engine.prefill import prefill
from models import random_tree, tiny_model, tiny_predictor


def prompts_of(rng, lengths, vocab=7):
    return [torch.tensor([rng.randrange(4, vocab) for _ in range(length)]) for length in lengths]


@pytest.mark.parametrize("seed", range(8))
def test_cache_after_every_step_equals_a_fresh_prefill(seed):
    rng = random.Random(seed)
    model = tiny_model(seed, kv_heads=(1, 2, 4)[seed % 3])
    engine = firp.Engine(model, tiny_predictor(model, seed), random_tree(rng))
    prompts = prompts_of(rng, (1, 5, 9))
    state = engine.start(prompts, 15, [])
    tokens = [prompt.tolist() for prompt in prompts]
    while not bool(state.finished.all()):
        record = engine.step(state)
        for b, count in enumerate(record.counts.tolist()):
            tokens[b] += record.tokens[b, :count].tolist()
            if state.finished[b]:
                continue
            committed = int(state.context_lens[b])
            assert tokens[b][:-1] == tokens[b][:committed] and len(tokens[b]) == committed + 1
            fresh = torch.full_like(state.cache[:, :, b : b + 1], float("nan"))
            prefill(engine.view, [torch.tensor(tokens[b][:committed])], fresh)
            torch.testing.assert_close(
                state.cache[:, :, b, :committed], fresh[:, :, 0, :committed], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("attention", ["torch", "tree_attention"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prefill_in_chunks_fills_the_same_cache(family, attention):
    """With a sliding window, and with more rows than one chain holds; slots past the prompt hold NaN."""
    model = tiny_model(3, family)
    engine = firp.Engine(model)
    prompt = torch.randint(4, 7, (150,), generator=torch.Generator().manual_seed(3))
    op = engine.ops.tree_attention if attention == "tree_attention" else None

    def filled(chunk):
        cache = torch.full_like(engine.start([prompt], 5, []).cache, float("nan"))
        prefill(engine.view, [prompt], cache, chunk, op)
        assert cache[:, :, 0, len(prompt) :].isnan().all()
        return cache[:, :, 0, : len(prompt)]

    expected = filled(len(prompt))
    for chunk in (1, 7, 64, 100):
        torch.testing.assert_close(filled(chunk), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        engine.start([prompt], 5, []).cache[:, :, 0, : len(prompt) - 1], expected[:, :, :-1], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_node_rows_do_not_depend_on_pseudo_rows_or_dead_slots(seed, dtype):
    """Bit-identical node rows for two predictors, one of NaN, and with NaN in every dead cache slot."""
    rng = random.Random(seed)
    model = tiny_model(seed, dtype=dtype)
    tree = firp.TreeConfig(8, rng.randint(1, 8))
    prompts = prompts_of(rng, (4, 7))
    engines = [firp.Engine(model, tiny_predictor(model, seed, kind), tree) for kind in ("random", "zero", "nan")]
    state = engines[0].start(prompts, 15, [])
    for _ in range(3):
        engines[0].step(state)
    rows, num_nodes = [], state.tree.tokens.shape[1]
    for engine in engines:
        other = copy.deepcopy(state)
        for b, committed in enumerate(other.context_lens.tolist()):
            other.cache[:, :, b, committed:] = float("nan")
        rows.append(engine._step.forward(other)[:, :num_nodes])
    clean = engines[0]._step.forward(copy.deepcopy(state))[:, :num_nodes]
    real = (state.tree.parents >= 0) | (torch.arange(state.tree.parents.shape[1]) == 0)
    for other in rows:
        assert torch.equal(other[real], clean[real])


def snapshot(model):
    """Every attribute of every module, by identity, and the values of parameters and buffers."""
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in list(model.named_parameters()) + list(model.named_buffers())}
    return attributes, {k: dict(v["_modules"]) for k, v in attributes.items()}, values, model.config.to_dict()


def assert_unchanged(model, before):
    attributes, children, values, config = before
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items()), name
        assert dict(module._modules) == children[name]
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        assert torch.equal(tensor, values[name])
    assert model.config.to_dict() == config


def test_the_model_is_left_alone():
    model = tiny_model(2)
    ids = torch.tensor([[4, 5, 6]])
    before = snapshot(model)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    firp.generate(model, ids, predictor=tiny_predictor(model, 2), max_new_tokens=8, do_sample=False)
    assert_unchanged(model, before)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_the_model_is_left_alone_after_an_exception():
    model = tiny_model(2)
    before = snapshot(model)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        firp.generate(
            model, torch.tensor([[4, 5, 6]]), predictor=tiny_predictor(model, 2), max_new_tokens=8, do_sample=False,
            stopping_criteria=[interrupt],
        )  # fmt: skip
    assert_unchanged(model, before)


def test_the_ancestor_rule_drafts_from_what_is_left():
    """With one lookahead node (the root) an accepted path of m nodes leaves offsets m + 1 .. k: never nothing while m <
    k.
    """
    model = tiny_model(11)
    engine = firp.Engine(model, tiny_predictor(model, 11, "identity"), firp.TreeConfig(8, 1))
    state = engine.start(prompts_of(random.Random(1), (5,)), 40, [])
    seen = set()
    while not bool(state.finished.all()):
        record = engine.step(state)
        deepest = int(state.tree.depths.max())
        assert deepest <= 3 - int(record.counts[0] - 1) or record.counts[0] == 0
        seen.add(deepest)
    assert seen & {1, 2, 3}


def test_nan_scores_of_the_model_are_reported():
    model = tiny_model(7)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="scores after 2 tokens of sequence 0 are NaN"):
        firp.generate(model, torch.tensor([[4, 5]]), max_new_tokens=3, do_sample=False)
