"""The rest of what a user of generate() expects: stops, streams, scores, times, batches."""

import itertools
import random
import time

import firp
import pytest
import torch
from models import EOS, hf_alone, new_tokens, ragged_batch, tiny_model, tiny_predictor
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

IDS = torch.tensor([[4, 5, 6]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def drafting(model, seed=1):
    return {"predictor": tiny_predictor(model, seed), "tree": firp.TreeConfig(8, 3)}


def accepting(seed=1, **sizes):
    """A model whose drafts are accepted: seed 1 walks deep paths."""
    model = tiny_model(seed, **sizes)
    return model, drafting(model, seed)


def test_several_ends_of_sequence():
    for stops in ([3, 5], [6], [2, 4, 5]):
        model, draft = accepting()
        expected = model.generate(IDS, eos_token_id=stops, pad_token_id=0, **GREEDY)
        assert torch.equal(firp.generate(model, IDS, eos_token_id=stops, pad_token_id=0, **draft, **GREEDY), expected)


def test_no_end_of_sequence():
    model, draft = accepting()
    model.generation_config.eos_token_id = None
    expected = model.generate(IDS, **GREEDY)
    assert expected.shape[1] == 27 and torch.equal(firp.generate(model, IDS, **draft, **GREEDY), expected)


@pytest.fixture(scope="module")
def tokenizer():
    """One letter a token."""
    letters = {letter: i for i, letter in enumerate(["[PAD]", "[BOS]", " ", "[EOS]", *"abcdef"])}
    tokenizer = Tokenizer(WordLevel(letters, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]")


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_stop_strings(tokenizer, where):
    stopped = 0
    for seed in range(8):
        model, draft = accepting(seed, vocab=10)
        unstopped = model.generate(IDS, **GREEDY)
        strings = [tokenizer.decode(unstopped[0, 4:6]), "no such string"]
        options = dict(GREEDY)
        if where == "argument":
            options["stop_strings"] = strings
        elif where == "config":
            options = {
                "generation_config": GenerationConfig(stop_strings=strings, eos_token_id=EOS, pad_token_id=0, **GREEDY)
            }
        else:
            model.generation_config.stop_strings = strings
        expected = model.generate(IDS, tokenizer=tokenizer, **options)
        assert torch.equal(firp.generate(model, IDS, tokenizer=tokenizer, **draft, **options), expected)
        assert expected.shape[1] <= 6
        stopped += expected.shape[1] < unstopped.shape[1]
    assert stopped >= 4


class StopAt(StoppingCriteria):
    """Stops when the history holds a number of sixes; keeps the lengths it was asked about."""

    def __init__(self, count):
        self.count = count
        self.lengths = []

    def __call__(self, input_ids, scores, **_):
        self.lengths.append(input_ids.shape[1])
        return (input_ids == 6).sum(1) >= self.count


def test_stopping_criteria_see_every_token_once():
    for seed in range(8):
        model, draft = accepting(seed)
        theirs, ours = StopAt(4), StopAt(4)
        expected = model.generate(IDS, stopping_criteria=[theirs], **GREEDY)
        assert torch.equal(firp.generate(model, IDS, stopping_criteria=[ours], **draft, **GREEDY), expected)
        assert ours.lengths == theirs.lengths


class Recorder(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_receives_what_hugging_face_would_put():
    for options in (
        GREEDY,
        {**GREEDY, "stopping_criteria": [StopAt(4)]},
        {**GREEDY, "prefix_allowed_tokens_fn": lambda *_: [4, 5, 6]},
    ):
        model, draft = accepting()
        theirs, ours = Recorder(), Recorder()
        model.generate(IDS, streamer=theirs, **options)
        firp.generate(model, IDS, streamer=ours, **draft, **options)
        assert ours.ended and ours.chunks == theirs.chunks


def test_text_arrives_as_it_is_accepted(tokenizer):
    class Arrivals(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            self.arrived.append(text)

    early = 0
    for seed in range(6):
        model, draft = accepting(seed, vocab=10)
        streamer, events = Arrivals(tokenizer, skip_prompt=True), []
        streamer.arrived = arrived = []
        out = firp.generate(
            model,
            IDS,
            streamer=streamer,
            on_step=lambda _, a=arrived, e=events: e.append("".join(a)),
            **draft,
            **GREEDY,
        )
        assert "".join(arrived) == tokenizer.decode(out[0, 3:])
        assert all(after.startswith(before) for before, after in itertools.pairwise(events))
        early += events[-2] != ""
    assert early >= 1


def test_a_streamer_with_a_batch_is_refused_by_name():
    model, draft = accepting()
    for options in ({"inputs": IDS.repeat(2, 1)}, {"inputs": IDS, "num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(ValueError, match="streamer: got a batch of 2 sequences, expected 1"):
            firp.generate(model, **options, streamer=Recorder(), max_new_tokens=3, **draft)


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.4}, {"prefix_allowed_tokens_fn": lambda *_: [4, 5, 6]}],
    ids=["plain", "processed", "general"],
)
def test_scores_and_logits_are_hugging_faces(options):
    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for seed in (1, 2):
        model, draft = accepting(seed)
        theirs = model.generate(IDS, **keep, **GREEDY, **options)
        ours = firp.generate(model, IDS, **keep, **draft, **GREEDY, **options)
        assert torch.equal(ours.sequences, theirs.sequences)
        for name in ("scores", "logits"):
            assert len(ours[name]) == len(theirs[name]) == ours.sequences.shape[1] - 3
            for a, b in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scores_of_a_batch_are_those_of_each_sequence():
    model, draft = accepting(2, vocab=11)
    ids, mask = ragged_batch(random.Random(2), 4, 11)
    keep = {"return_dict_in_generate": True, "output_scores": True, **GREEDY}
    batch = firp.generate(model, ids, attention_mask=mask, **keep, **draft)
    for b in range(4):
        alone = model.generate(ids[b][mask[b].bool()][None], **keep)
        for i, row in enumerate(alone.scores):
            torch.testing.assert_close(batch.scores[i][b], row[0], rtol=1e-5, atol=1e-5)
        assert all(not scores[b].any() for scores in batch.scores[len(alone.scores) :])


def test_nothing_is_kept_that_was_not_asked_for():
    model, draft = accepting()
    out = firp.generate(model, IDS, return_dict_in_generate=True, **draft, **GREEDY)
    assert out.scores is None and out.logits is None and isinstance(out, firp.FirpOutput)
    assert isinstance(firp.generate(model, IDS, **draft, **GREEDY), torch.Tensor)


def test_max_time_ends_every_sequence():
    model, draft = accepting()
    out = firp.generate(
        model, IDS.repeat(3, 1), max_time=0.0, max_new_tokens=200, do_sample=False, eos_token_id=None, **draft
    )
    assert out.shape[1] == 4
    started = time.perf_counter()
    out = firp.generate(model, IDS, max_time=3600.0, max_new_tokens=20, do_sample=False, eos_token_id=None, **draft)
    assert out.shape[1] == 23 and time.perf_counter() - started < 3600


def test_several_sequences_of_a_prompt():
    """Those of a batch that holds each prompt as often; while greedy they would be copies, which Hugging Face
    refuses."""
    model, draft = accepting(2, vocab=11)
    ids, mask = ragged_batch(random.Random(2), 3, 11)
    options = {"max_new_tokens": 9, "do_sample": True, "top_k": 0, "seed": 3}
    out = firp.generate(model, ids, attention_mask=mask, num_return_sequences=4, **options, **draft)
    assert len(out) == 12 and len(set(map(tuple, out.tolist()))) > 6
    batch = firp.generate(model, ids.repeat_interleave(4, 0), attention_mask=mask.repeat_interleave(4, 0), **options)
    assert torch.equal(out, batch)
    for generate in (model.generate, lambda *args, **given: firp.generate(model, *args, **draft, **given)):
        with pytest.raises(ValueError, match=r"do not support `num_return_sequences` different than 1"):
            generate(ids, attention_mask=mask, num_return_sequences=2, **GREEDY)


def test_unpadded_and_padded_batches_are_alike():
    model, draft = accepting(5, vocab=11)
    ids = torch.randint(4, 11, (4, 7), generator=torch.Generator().manual_seed(5))
    expected = hf_alone(model, ids, torch.ones_like(ids), **GREEDY)
    for extra_left, extra_right in ((0, 0), (3, 0), (0, 4)):
        padded = torch.nn.functional.pad(ids, (extra_left, extra_right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (extra_left, extra_right))
        out = firp.generate(model, padded, attention_mask=mask, **draft, **GREEDY)
        assert new_tokens(out, padded.shape[1]) == expected


def test_finished_sequences_leave_the_batch():
    left = 0
    for seed in range(6):
        model, draft = accepting(seed)
        ids, mask = ragged_batch(random.Random(seed), 6, 7)
        sizes = []

        class Watched(firp.Engine):
            def forward(self, state, sizes=sizes):
                sizes.append(state.batch_size)
                return super().forward(state)

        engine = Watched(model, draft["predictor"], draft["tree"])
        out = firp.generate(model, ids, attention_mask=mask, engine=engine, return_dict_in_generate=True, **GREEDY)
        assert new_tokens(out.sequences, ids.shape[1]) == hf_alone(model, ids, mask, **GREEDY)
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == 6 and out.stats.steps == sum(sizes)
        left += sizes[-1] < 6
    assert left >= 2


def test_the_result_counts_its_steps_and_seconds():
    model, draft = accepting()
    events: list[firp.StepEvent] = []
    ids, mask = ragged_batch(random.Random(4), 3, 7)
    out = firp.generate(
        model, ids, attention_mask=mask, on_step=events.append, return_dict_in_generate=True, **draft, **GREEDY
    )
    assert [event.step for event in events] == list(range(len(events)))
    assert sum(len(event.tokens) for event in events) == out.stats.steps
    streamed = [[token for event in events for token in event.tokens.get(b, [])] for b in range(3)]
    assert streamed == new_tokens(out.sequences, ids.shape[1])
    assert sorted(b for event in events for b in event.ended) == [0, 1, 2]
    tokens = sum(map(len, streamed))
    assert out.stats.tokens == tokens and out.stats.tau == tokens / out.stats.steps > 1
    deeper = [sum(len(new) > depth for event in events for new in event.tokens.values()) for depth in (1, 2, 3)]
    assert out.stats.accepted_per_position == [count / out.stats.steps for count in deeper if count]
    assert out.time.prefill > 0 and out.time.steps > 0 and out.time.host > 0
    assert out.time.total <= events[-1].seconds + out.time.host


@pytest.mark.parametrize("general", [False, True])
def test_a_callback_may_stop_a_run(general):
    model, draft = accepting()

    def cancel(event):
        if event.step == 2:
            raise InterruptedError("the client left")

    options = {"prefix_allowed_tokens_fn": lambda *_: [4, 5, 6]} if general else {}
    with pytest.raises(InterruptedError, match="the client left"):
        firp.generate(model, IDS, on_step=cancel, **draft, **GREEDY, **options)


def test_chat_templates(tokenizer):
    """What a chat template makes of a conversation goes in as it is, as a dictionary too."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
    )
    model, draft = accepting(1, vocab=10)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "fed"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    assert inputs["input_ids"].tolist() == [[9, 8, 7, 2, 4, 2]]
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(firp.generate(model, **inputs, **draft, **GREEDY), expected)
