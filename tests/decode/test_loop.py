"""The host's side: records read late, stops, buckets, compaction, and runs that need the host at every step."""

import random

import firp
import pytest
import torch
from firp.engine.buffers import Buffers, allocated_slots
from firp.engine.chooser import Greedy
from firp.engine.graphs import GraphRunner
from firp.generation.loop import run
from firp.generation.output import Output
from firp.sampling.choosers import Vectorised
from models import EOS, hf_alone, ragged_batch, tiny_model, tiny_predictor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as hf

NEW_TOKENS = 18


class CountingEngine(firp.Engine):
    """Counts the steps that were launched, and remembers batch sizes and buckets."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.launched = []

    def step(self, state, choose=None):
        self.launched.append((state.batch_size, state.cache.shape[3]))
        return super().step(state, choose)


def decode(engine, prompts, late, choose=None, new_tokens=NEW_TOKENS, criteria=()):
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    out = Output(padded, prompts, new_tokens, [EOS], StoppingCriteriaList(criteria))
    state = engine.start(prompts, new_tokens, [EOS])
    stats = run(engine, state, choose or Greedy(engine.ops), out, late)
    return out.emitted, stats


def prompts_of(seed, batch):
    ids, mask = ragged_batch(random.Random(seed), batch, 7)
    return [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)], ids, mask


@pytest.mark.parametrize("seed", range(6))
def test_late_reads_give_the_same_output_in_one_more_step(seed):
    model = tiny_model(seed)
    prompts, ids, mask = prompts_of(seed, 1 + seed % 4)
    engines = [CountingEngine(model, tiny_predictor(model, seed), firp.TreeConfig(8, 3)) for _ in range(2)]
    (now, stats), (late, late_stats) = (
        decode(engine, prompts, late) for engine, late in zip(engines, (False, True), strict=True)
    )
    assert now == late == hf_alone(model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert (stats.steps, stats.tokens) == (late_stats.steps, late_stats.tokens)
    assert len(engines[1].launched) == len(engines[0].launched) + 1


def test_a_step_after_the_end_changes_nothing():
    model = tiny_model(3)
    engine = firp.Engine(model, tiny_predictor(model, 3), firp.TreeConfig(8, 3))
    prompts, *_ = prompts_of(3, 3)
    state = engine.start(prompts, 9, [EOS])
    tokens = [prompt.tolist() for prompt in prompts]
    while not bool(state.finished.all()):
        record = engine.step(state)
        for b, count in enumerate(record.counts.tolist()):
            tokens[b] += record.tokens[b, :count].tolist()
    assert state.context_lens.tolist() == [len(row) - 1 for row in tokens]
    frozen = [tensor.clone() for tensor in (state.context_lens, state.remaining, state.finished)]
    live = [state.cache[:, :, b, :length].clone() for b, length in enumerate(state.context_lens.tolist())]
    record = engine.step(state)
    assert record.counts.tolist() == [0, 0, 0] and bool((record.tokens == -1).all()) and bool(record.finished.all())
    for before, after in zip(frozen, (state.context_lens, state.remaining, state.finished), strict=True):
        assert torch.equal(before, after)
    for b, length in enumerate(state.context_lens.tolist()):
        assert torch.equal(live[b], state.cache[:, :, b, :length])


def test_a_step_replaces_no_tensor_but_the_tree():
    model = tiny_model(4)
    engine = firp.Engine(model, tiny_predictor(model, 4), firp.TreeConfig(8, 3))
    state = engine.start(prompts_of(4, 2)[0], 20, [EOS])
    names = ("cache", "context_lens", "sequence", "finished", "remaining", "seed", "stop_tokens")
    before = {name: getattr(state, name) for name in names}
    for _ in range(3):
        engine.step(state)
    assert all(getattr(state, name) is tensor for name, tensor in before.items())


@pytest.mark.parametrize("late", [False, True])
def test_the_cache_bucket_grows_in_the_middle_of_a_run(late):
    model = tiny_model(5)
    prompt = torch.randint(4, 7, (200,), generator=torch.Generator().manual_seed(5))
    engine = CountingEngine(model, tiny_predictor(model, 5), firp.TreeConfig(8, 3))
    (emitted, _), wanted = decode_without_stop(engine, prompt, late, 50)
    assert emitted == [wanted]
    buckets = [bucket for _, bucket in engine.launched]
    assert buckets[0] == 256 and buckets[-1] == 512 and buckets == sorted(buckets)


def decode_without_stop(engine, prompt, late, new_tokens):
    out = Output(prompt[None], [prompt], new_tokens, [], StoppingCriteriaList())
    stats = run(engine, engine.start([prompt], new_tokens, []), Greedy(engine.ops), out, late)
    wanted = engine.model.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return (out.emitted, stats), wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("late", [False, True])
def test_ended_sequences_leave_the_batch(late):
    smallest = set()
    for seed in range(5):
        model = tiny_model(seed)
        prompts, ids, mask = prompts_of(seed + 20, 6)
        engine = CountingEngine(model, tiny_predictor(model, seed))
        emitted, _ = decode(engine, prompts, late)
        assert emitted == hf_alone(model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        sizes = [size for size, _ in engine.launched]
        assert sizes == sorted(sizes, reverse=True)
        smallest.add(sizes[-1])
    assert min(smallest) < 6


def test_a_batch_of_captured_steps_shrinks_by_powers_of_two(monkeypatch):
    model = tiny_model(1)
    prompts, ids, mask = prompts_of(21, 7)
    engine = CountingEngine(model, tiny_predictor(model, 1))
    monkeypatch.setattr(engine.runner, "captures", True)
    emitted, _ = decode(engine, prompts, True)
    assert emitted == hf_alone(model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert {size for size, _ in engine.launched} <= {7, 4, 2, 1}


def test_sampling_is_the_same_read_late():
    model = tiny_model(6)
    prompts, *_ = prompts_of(6, 3)
    processors = LogitsProcessorList([hf.TemperatureLogitsWarper(0.9), hf.TopPLogitsWarper(0.9)])
    emitted = []
    for late in (False, True):
        engine = firp.Engine(model, tiny_predictor(model, 6), firp.TreeConfig(8, 3))
        choose = Vectorised(engine.ops, processors, 5, None, [0, 0, 0])
        assert choose.on_device
        emitted.append(decode(engine, prompts, late, choose)[0])
    assert emitted[0] == emitted[1]


def test_choosers_of_one_key_choose_alike():
    def key(*processors, seed=0):
        return Vectorised(None, LogitsProcessorList(processors), seed, None, [0]).key

    assert key(hf.TopPLogitsWarper(0.9), seed=1) == key(hf.TopPLogitsWarper(0.9), seed=2)
    assert key(hf.TopPLogitsWarper(0.9)) != key(hf.TopPLogitsWarper(0.8))
    assert key(hf.TopPLogitsWarper(0.9)) != key(hf.TopPLogitsWarper(0.9), seed=None)
    assert key(hf.TopPLogitsWarper(0.9)) != key(hf.TopKLogitsWarper(5), hf.TopPLogitsWarper(0.9))


def ends_at_the_fifth(ids, _scores, **_):
    return torch.tensor([ids.shape[1] >= 17])


@pytest.mark.parametrize("batch", [1, 3])
def test_stopping_criteria_make_a_run_wait_for_the_host(batch):
    model = tiny_model(7)
    prompts, *_ = prompts_of(7, batch)
    criteria = [ends_at_the_fifth]
    engines = [firp.Engine(model, tiny_predictor(model, 7), firp.TreeConfig(8, 3)) for _ in range(2)]
    expected = decode(engines[0], prompts, False, criteria=criteria)[0]
    with pytest.warns(UserWarning, match="waits for the host at every step of this run: its stopping criteria"):
        emitted = decode(engines[1], prompts, True, criteria=criteria)[0]
    assert emitted == expected
    assert all(len(prompt) + len(row) <= max(17, len(prompt) + 1) for prompt, row in zip(prompts, emitted, strict=True))


def test_processors_that_look_back_make_a_run_wait_for_the_host():
    model = tiny_model(8)
    (prompt,), *_ = prompts_of(8, 1)
    engine = firp.Engine(model, tiny_predictor(model, 8), firp.TreeConfig(8, 3))
    processors = LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(1.4)])
    out = Output(prompt[None], [prompt], NEW_TOKENS, [EOS], StoppingCriteriaList())
    choose = Vectorised(engine.ops, processors, None, out.history, [0])
    with pytest.warns(UserWarning, match="its logits processors look at the tokens so far"):
        run(engine, engine.start([prompt], NEW_TOKENS, [EOS]), choose, out, late=True)
    wanted = model.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.4,
    )
    assert out.emitted == [wanted[0, len(prompt) :].tolist()]


def test_nan_scores_are_reported_late():
    model = tiny_model(7)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="scores after 2 tokens of sequence 0 are NaN"):
        decode(firp.Engine(model), [torch.tensor([4, 5])], late=True)


def test_what_a_run_used_serves_the_next():
    model = tiny_model(9)
    engine = firp.Engine(model, tiny_predictor(model, 9), firp.TreeConfig(8, 3))
    prompts, *_ = prompts_of(9, 2)
    first, _ = decode(engine, prompts, False)
    storage = engine._spare[0].cache.data_ptr()
    engine._spare[0].cache.fill_(float("nan"))
    assert decode(engine, prompts, False)[0] == first
    assert engine._spare[0].cache.data_ptr() == storage
    assert decode(engine, prompts[:1], False)[0] == first[:1]
    # Two runs at a time do not share.
    one, two = engine.start(prompts, 5, []), engine.start(prompts, 5, [])
    assert one.cache.data_ptr() == storage != two.cache.data_ptr()


def test_sizes_of_what_is_allocated():
    assert [allocated_slots(n) for n in (1, 256, 257, 1500, 2048, 2049, 4161)] == [
        256,
        256,
        512,
        1536,
        2048,
        2560,
        5120,
    ]
    buffers = Buffers.allocate(1, 1, 1536, 1, 8, torch.float32, torch.device("cpu"))
    assert [buffers.bucket(n) for n in (1, 256, 257, 1025, 1600)] == [256, 256, 512, 1536, 1536]
    assert buffers.set_stop_tokens([]).tolist() == [-1] * 8
    first = buffers.set_stop_tokens([3, 4])
    assert first.tolist() == [3, 4] + [-1] * 6 and buffers.set_stop_tokens([5]) is first
    assert buffers.set_stop_tokens(list(range(9))).tolist() == list(range(9)) + [-1] * 7


@pytest.mark.parametrize("size", [1, 8, 40])
def test_a_padded_tree_decodes_alike(size):
    """The tree of a captured step has one size; padding nodes and empty slots change no token."""
    model = tiny_model(10)
    engine = firp.Engine(model, tiny_predictor(model, 10), firp.TreeConfig(max(size, 2), 1 + size // 3))
    states = [engine.start(prompts_of(10, 2)[0], 30, [EOS]) for _ in range(2)]
    for _ in range(6):
        records = []
        for padded, state in enumerate(states):
            if padded:
                state.tree = state.tree.padded(41, 15)
            records.append(engine.step(state))
        assert records[0].counts.tolist() == records[1].counts.tolist()
        for b, count in enumerate(records[0].counts.tolist()):
            assert records[0].tokens[b, :count].tolist() == records[1].tokens[b, :count].tolist()


@pytest.mark.parametrize("head", ["one-pass", "two-pass"])
@pytest.mark.parametrize("lookahead", [1, 8])
def test_the_head_in_one_pass_or_two(head, lookahead):
    model = tiny_model(11)
    predictor = tiny_predictor(model, 11)
    prompts, *_ = prompts_of(11, 2)
    default = firp.Engine(model, predictor, firp.TreeConfig(8, lookahead))
    engine = firp.Engine(model, predictor, firp.TreeConfig(8, lookahead), head=head)
    (expected, stats), (emitted, other) = decode(default, prompts, False), decode(engine, prompts, False)
    assert emitted == expected and other.steps == stats.steps


def test_engine_settings_are_checked():
    model = tiny_model(0)
    with pytest.raises(ValueError, match="head: got 'three-pass', expected one of one-pass, two-pass, or None"):
        firp.Engine(model, head="three-pass")
    with pytest.raises(ValueError, match="graphs: got True, but the model is on cpu, expected a CUDA device"):
        firp.Engine(model, graphs=True)
    with pytest.raises(ValueError, match="compile: got True with impl 'reference'"):
        firp.Engine(model, compile=True, impl="reference")


def test_warming_up_takes_every_bucket():
    model = tiny_model(12)
    engine = CountingEngine(model, tiny_predictor(model, 12), firp.TreeConfig(8, 3))
    engine.warm_up((1, 2), max_len=250, progress=False)
    assert set(engine.launched) == {(1, 256), (1, 512), (2, 256), (2, 512)}
    prompts, ids, mask = prompts_of(12, 2)
    assert decode(engine, prompts, False)[0] == hf_alone(model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    with pytest.raises(ValueError, match="max_len: got 1, expected at least 2"):
        engine.warm_up(max_len=1)


def test_a_step_reaches_as_far_as_its_own_tree():
    """Not as far as the largest of the engine's trees; a graph pads a tree to the size that is drafted."""
    model = tiny_model(12)
    engine = firp.Engine(model, tiny_predictor(model, 12), firp.TreeConfig(8, 3))
    state, k = engine.start([torch.tensor([4, 5, 6])], 9, []), engine.num_offsets
    for nodes, lookahead in ((1, 1), (8, 3)):
        assert engine.slots(state, Greedy(engine.ops), 100, 2) == 100 + 2 * (1 + k) + nodes + lookahead * k
        engine.step(state)
    engine.runner, state.drafter = GraphRunner(), engine.drafter(1, firp.TreeConfig(4, 2))
    assert engine.slots(state, Greedy(engine.ops), 100, 0) == 100 + 4 + 2 * k
