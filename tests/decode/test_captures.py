"""Captures, replays and late reads on a GPU made of CPU tensors: the same code that a GPU runs."""

import functools
import gc
from types import SimpleNamespace

import firp
import pytest
import torch
from captured_runs import LONG, SHORT, captured, decoded, emitted, expected, looks_up, parts, with_stats
from fake_cuda import FakeCuda
from firp.sampling.choosers import Vectorised
from models import PREDICTORS, tiny_model, tiny_predictor
from transformers import LogitsProcessorList

from firp_kernels.ops import lookup_branch


@pytest.mark.parametrize("plain", [False, True], ids=["firp", "plain"])
@pytest.mark.parametrize("device", [0, 1], ids=["current device", "another device"])
def test_replayed_steps_read_late_equal_eager_ones(monkeypatch, device, plain):
    runs = [(SHORT, 15), (LONG, 15), (SHORT, 15)]
    wanted = expected(*runs, plain=plain)
    cuda = FakeCuda(monkeypatch, device)
    with cuda.tensors():
        engine = captured(*parts(plain))
        assert [emitted(engine, *arguments) for arguments in runs] == wanted
    assert cuda.current_device == 0


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(monkeypatch)
    with fake.tensors():
        yield fake


PROMPTS = {
    length: torch.randint(4, 12, (length,), generator=torch.Generator().manual_seed(length)) for length in range(90)
}
LENGTHS = [(1,), (2,), (33,), (34,), (31, 5, 17), (31, 31, 31), (60, 2, 1), (5, 60, 7)]


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_replayed_prompts_equal_eager_ones(cuda, family):
    """Every replay of a shape, for any prompts that it was captured with and any contents of the cache."""
    model = tiny_model(3, family, vocab=12, dtype=torch.float32)
    engine, eager = captured(model), firp.Engine(model, graphs=False, compile=False)
    fill(engine, (1, 89, 1))  # Buffers that fit all.
    for lengths in LENGTHS * 2:
        prompts = [PROMPTS[length] for length in lengths]
        wanted = eager.start(prompts, 5, []).cache
        engine._spare[0].cache.fill_(float("nan"))
        found = fill(engine, lengths).cache
        for place, length in enumerate(lengths):
            torch.testing.assert_close(found[:, :, place, : length - 1], wanted[:, :, place, : length - 1])
            assert found[:, :, place, 96:].isnan().all()
    # Padded lengths of 32 at a time; an empty prompt takes no row.
    assert sorted(engine._spare[0].prefills) == [(1, 32), (1, 64), (1, 96), (2, 64), (3, 32), (3, 64)]


def fill(engine, lengths):
    state = engine.start([PROMPTS[length] for length in lengths], 5, [])
    engine.release(state)
    return state


def test_long_or_many_prompts_pass_eagerly(cuda, monkeypatch):
    engine = captured(*parts(plain=True))
    fill(engine, (5,) * 9)
    engine.release(engine.start([PROMPTS[50]], 5, [], chunk_tokens=64))
    monkeypatch.setattr("firp.engine.graphs.CAPTURED_ROWS", 63)
    fill(engine, (34,))
    assert not engine._spare[0].prefills
    fill(engine, (33,))
    assert list(engine._spare[0].prefills) == [(1, 32)]


def test_modules_of_other_libraries_fill_the_cache_eagerly(cuda):
    """They may look at values where rows are many."""
    engine = captured(*parts(plain=True))
    engine.view._seen.unknown.append("model.layers.0.mlp")
    fill(engine, (5,))
    assert not engine._spare[0].prefills


def test_a_warm_engine_captures_nothing_more(cuda):
    engine = captured(*parts())
    engine.warm_up((1, 2), 90, progress=False)
    held = engine._spare[0]
    prefills, graphs = set(held.prefills), set(held.graphs)
    assert prefills == {(n, length) for n in (1, 2) for length in (32, 64, 96)}
    for lengths in ((50,), (5, 70), (80,)):
        emitted(engine, [PROMPTS[length] for length in lengths], 9)
        assert engine._spare[0] is held and set(held.prefills) == prefills and set(held.graphs) == graphs


def test_larger_buffers_capture_into_a_pool_of_their_own(cuda):
    """While a record of the smaller ones is still held, and a library holds what it made on their stream."""
    engine = captured(*parts())
    state = engine.start(SHORT, 20, [])
    record = [engine.step(state) for _ in range(2)][-1]
    tokens = record.tokens.clone()
    engine.release(state)
    del state
    assert emitted(engine, LONG) == emitted(firp.Engine(*parts(), graphs=False, compile=False), LONG)
    assert torch.equal(record.tokens, tokens)


def test_an_engine_grows_while_another_replays(cuda):
    engines = [captured(*parts()), captured(*parts(plain=True))]
    wanted = [emitted(engine, SHORT) for engine in engines]
    emitted(engines[0], LONG)
    del engines[0]._spare[:]
    gc.collect()
    assert emitted(engines[1], SHORT) == wanted[1]
    assert emitted(engines[0], SHORT) == wanted[0]


def test_two_runs_of_one_engine_share_nothing(cuda):
    engine = captured(*parts())
    alone = [emitted(engine, prompts) for prompts in (SHORT, LONG)]
    states = [engine.start(prompts, 10, [3]) for prompts in (SHORT, LONG)]
    tokens = [[[] for _ in prompts] for prompts in (SHORT, LONG)]
    for _ in range(10):
        for state, rows in zip(states, tokens, strict=True):
            record = engine.step(state)
            for row, new, count in zip(rows, record.tokens.tolist(), record.counts.tolist(), strict=True):
                row += new[:count]
    assert tokens == alone
    assert states[0].buffers.pool != states[1].buffers.pool and states[0].buffers.stream is not states[1].buffers.stream


def test_one_stream_serves_all_captures_and_pools_end_with_their_graphs(cuda):
    engine = captured(*parts())
    emitted(engine, [torch.tensor([5, 4] * 110)], 30)
    assert len(engine._spare[0].graphs) > 1 and cuda.made == 1 and len(cuda.pools) == 1
    emitted(engine, LONG)
    cuda.empty_cache()
    assert cuda.made == 2 and len(cuda.pools) == 1
    del engine
    gc.collect()
    cuda.empty_cache()
    assert not cuda.pools


def tensors_of(model):
    return {
        "a weight": model.model.layers[1].mlp.up_proj.weight,
        "the head": model.lm_head.weight,
        "rotary frequencies": model.model.rotary_emb.inv_freq,
    }


@pytest.mark.parametrize("name", ["a weight", "the head", "rotary frequencies"])
def test_storage_that_moved_is_noticed(cuda, name):
    """Tensors that keep their identity over other storage, as `model.cpu()` and back leave them."""
    model, *others = parts()
    engine = captured(model, *others)
    wanted = emitted(engine, SHORT)
    graphs = engine._spare[0].graphs
    assert emitted(engine, SHORT) == wanted and engine._spare[0].graphs is graphs
    tensor = tensors_of(model)[name]
    before = tensor.data
    tensor.data = before.clone()
    before.fill_(float("nan"))
    assert emitted(engine, SHORT) == wanted and engine._spare[0].graphs is not graphs


def test_storage_that_moved_under_a_run_is_noticed_by_the_next(cuda):
    model, *others = parts()
    engine = captured(model, *others)
    wanted = emitted(engine, SHORT)
    state = engine.start(SHORT, 10, [3])
    engine.step(state)
    weight = model.lm_head.weight
    before = weight.data
    weight.data = before.clone()
    engine.release(state)
    before.fill_(float("nan"))
    assert emitted(engine, SHORT) == wanted


def test_records_hold_scores_only_where_they_are_kept(cuda):
    engine = captured(*parts())
    wanted = decoded(firp.Engine(*parts(), graphs=False, compile=False), SHORT, 20, False, keep_logits=True)
    emitted(engine, SHORT)
    for _, record in engine._spare[0].graphs.values():
        assert record.logits is record.scores is None
    kept = decoded(engine, SHORT, 20, False, keep_logits=True)
    assert kept.emitted == wanted.emitted
    torch.testing.assert_close(kept.logits, wanted.logits)


def view_of(device="cuda:1", dtype=torch.bfloat16, **config):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, config=SimpleNamespace(**config))


TREES = firp.TreeConfig(4, 4), firp.TreeConfig(16, 16)
REPEATING = [torch.tensor([4, 5, 6, 4, 5, 6, 4, 5])], [torch.tensor([4, 5, 6, 4, 5, 6, 4]), torch.tensor([9])], SHORT


@functools.cache
def looking_up_model():
    return tiny_model(3, vocab=12, dtype=torch.float32)


@functools.cache
def plainly(run, sampled):
    """What eager steps without a predictor emit after the prompts of REPEATING[run]."""
    plain, prompts = firp.Engine(looking_up_model(), graphs=False, compile=False), REPEATING[run]
    return decoded_by(plain, prompts, False, sampled)[0]


def decoded_by(engine, prompts, late, sampled):
    out, stats = with_stats(engine, prompts, 40, late, choose=sampling(engine, prompts) if sampled else None)
    return out.emitted, stats


def sampling(engine, prompts):
    return Vectorised(engine.ops, LogitsProcessorList(), 11, None, [0] * len(prompts))


@pytest.mark.parametrize(
    ("kind", "late", "sampled"),
    [
        *((kind, True, False) for kind in PREDICTORS), ("random", False, False), ("random", True, True),
        ("inverted", True, True),
    ],
)  # fmt: skip
def test_branches_within_captured_steps_leave_the_tokens(cuda, kind, late, sampled):
    model = looking_up_model()
    engine = looks_up(captured(model, tiny_predictor(model, 3, kind)), *TREES)
    deepest = 0
    for run in (0, 1, 2, 0):
        emitted, stats = decoded_by(engine, REPEATING[run], late, sampled)
        assert emitted == plainly(run, sampled)
        deepest = max(deepest, len(stats.emitted_at_least))
    assert sampled or deepest > engine.num_offsets, "a branch is deeper than the predictor's offsets"


def test_a_branch_takes_the_place_of_the_last_nodes(cuda, monkeypatch):
    """The tree keeps its size, and the history is that of prompt and output."""
    model, tree = tiny_model(3, vocab=12, dtype=torch.float32), TREES[1]
    engine = looks_up(firp.Engine(model, tiny_predictor(model, 3), graphs=False, compile=False), tree)
    draft, drafted, branches = engine._step.draft, [], 0
    monkeypatch.setattr(engine._step, "draft", lambda *arguments: drafted.append(draft(*arguments)) or drafted[-1])
    state = engine.start(REPEATING[1], 60, [])
    state.drafter = engine.drafter(2, tree)
    texts = [prompt.tolist() for prompt in REPEATING[1]]
    for _ in range(12):
        record = engine.step(state)
        for b, (text, tokens) in enumerate(zip(texts, record.tokens.tolist(), strict=True)):
            text += tokens[: int(record.counts[b])]
            assert state.history[b, : len(text)].tolist() == text
        before = [*vars(drafted[-1]).values()]
        arguments = state.history.clone(), state.context_lens, record.tokens, record.counts, *before[:4], 8, 2, 8, 8
        wanted = *lookup_branch.reference(*arguments), before[4]
        assert state.tree.size == (16, 16)
        assert all(torch.equal(found, part) for found, part in zip(vars(state.tree).values(), wanted, strict=True))
        branches += not torch.equal(before[0], wanted[0])
    assert branches
