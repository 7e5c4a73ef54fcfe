"""Odd calls that `model.generate` takes: what comes out is the same, through `firp.generate`, the hook and a folder."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import firp
import pytest
import torch
from models import hf_alone, new_tokens, tiny_model, tiny_predictor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
)

IDS = torch.tensor([[4, 5, 6, 7]])
PAIR, MASK = torch.tensor([[0, 0, 4, 5], [6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
HOLES, HOLES_MASK = torch.tensor([[4, 0, 5, 0, 6], [0, 7, 0, 8, 9]]), torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 1]])
GREEDY = {"max_new_tokens": 12, "do_sample": False}
PADDED = {"inputs": PAIR, "attention_mask": MASK, **GREEDY}
HOLED = {"inputs": HOLES, "attention_mask": HOLES_MASK, **GREEDY}
ONE = {"inputs": IDS, **GREEDY}
CONFIG = {"eos_token_id": 3, "pad_token_id": 0}


class OwnLength(MaxLengthCriteria):
    """Told from the criterion that Hugging Face makes itself."""


class UpTo(StoppingCriteria):
    """Stops at a length, padding included."""

    def __call__(self, input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)


class Preferring(LogitsProcessor):
    """Changes scores in place."""

    def __call__(self, input_ids, scores):
        scores[:, 8] += 0.3
        return scores


def neighbours(_, tokens):
    return [3, *range(4, 11)]


def penalty(left_out, **others):
    return {"logits_processor": [RepetitionPenaltyLogitsProcessor(2.5, prompt_ignore_length=left_out)], **others}


CALLS = {
    "integers of 32 bits": {**ONE, "inputs": IDS.int()},
    "mask of booleans": {**PADDED, "attention_mask": MASK.bool()},
    "mask of floats": {**PADDED, "attention_mask": MASK.float()},
    "mask that Hugging Face infers": {"inputs": PAIR, **GREEDY},
    "padding that is the end of sequence": {"inputs": PAIR.masked_fill(PAIR == 0, 3), "pad_token_id": 3, **GREEDY},
    "padding token inside": {"inputs": torch.tensor([[4, 0, 5, 6]]), **GREEDY},
    "holes": HOLED,
    "holes, minimal length": {**HOLED, "min_length": 9, "eos_token_id": [3, 7, 8, 9]},
    "holes, penalty": {**HOLED, "repetition_penalty": 2.5},
    "holes, general processor, penalty": {**HOLED, "repetition_penalty": 2.5, "prefix_allowed_tokens_fn": neighbours},
    "end of sequence in the prompt": {"inputs": torch.tensor([[4, 3, 5, 3]]), **GREEDY},
    "maximal length and new tokens": {**ONE, "max_length": 6},
    "no limit": {"inputs": IDS, "do_sample": False},
    "no end of sequence, no padding": {**ONE, "eos_token_id": None, "pad_token_id": None},
    "end of sequence as a tensor": {**PADDED, "eos_token_id": torch.tensor([2, 5])},
    "twelve ends of sequence": {**ONE, "eos_token_id": [3, *range(20, 31)]},
    "end of sequence that is no token": {**ONE, "eos_token_id": -1},
    "own length criterion": {**ONE, "stopping_criteria": [MaxLengthCriteria(7)]},
    "own length criterion past the limit": {**ONE, "stopping_criteria": [MaxLengthCriteria(30)]},
    "own length criterion below the prompt": {**ONE, "stopping_criteria": [MaxLengthCriteria(2)]},
    "own length criterion of another type": {**ONE, "stopping_criteria": [OwnLength(7)]},
    "own end of sequence": {**ONE, "stopping_criteria": [EosTokenCriteria(7)]},
    "own end of sequence, none configured": {**ONE, "eos_token_id": None, "stopping_criteria": [EosTokenCriteria(9)]},
    "criterion that counts padding": {**PADDED, "stopping_criteria": [UpTo()]},
    "criterion without a class": {**ONE, "stopping_criteria": [lambda ids, scores: ids.shape[1] >= 8]},
    "minimal length over padding": {**PADDED, "min_length": 10, "eos_token_id": [2, 3, 8]},
    "minimum above the maximum": {**ONE, "min_new_tokens": 20},
    "processor in place": {**PADDED, "logits_processor": [Preferring()]},
    "processor in float64": {**PADDED, "logits_processor": [lambda ids, scores: 1.5 * scores.double().roll(1, -1)]},
    "processor in bfloat16": {**ONE, "logits_processor": [lambda ids, scores: scores.bfloat16().roll(1, -1)]},
    "processor that cuts the vocabulary": {**ONE, "logits_processor": [lambda ids, scores: scores[:, :7]]},
    "processors of all kinds": {
        **PADDED, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_length": 9, "eos_token_id": [2, 9],
        "logits_processor": [lambda ids, scores: scores.roll(1, -1)],
    },
    "no prompt": {**GREEDY},
    "several without a prompt": {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 5},
    "to the last position": {"inputs": IDS, "max_length": 256, "do_sample": False, "eos_token_id": None},
    "processor in the place of the configured one": {**ONE, "repetition_penalty": 1.1, **penalty(None)},
    "penalty without the prompt": {**ONE, **penalty(4)},
    "penalty without the padded prompts": {**PADDED, **penalty(4)},
    "penalty without the padded prompts, the first ends first": {**PADDED, **penalty(4, eos_token_id=[3, 8])},
    "penalty without their first three tokens": {**PADDED, **penalty(3)},
    "everything forbidden": {**ONE, "suppress_tokens": list(range(11))},
    "sampling without choice": {"inputs": PAIR, "attention_mask": MASK, "do_sample": True, "temperature": 1e-6, "max_new_tokens": 12},
    "more candidates than tokens": {"inputs": IDS, "do_sample": True, "temperature": 1e-6, "top_k": 99, "max_new_tokens": 12},
    "several of each, with a penalty": {
        "inputs": torch.cat([IDS, PAIR[1:]]), "do_sample": True, "top_k": 1, "num_return_sequences": 2, "max_new_tokens": 9,
        "repetition_penalty": 1.9,
    },
    "positions as they are": {**PADDED, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)},
    "scores without a dictionary": {**ONE, "output_scores": True},
    "argument over configuration": {"inputs": IDS, "generation_config": GenerationConfig(max_new_tokens=3, **CONFIG), "max_new_tokens": 7},
}  # fmt: skip

# Older releases leave out as many tokens of every sequence.
if "Tensor" in str(inspect.signature(RepetitionPenaltyLogitsProcessor)):
    CALLS |= {
        "penalty without some of each": {**PADDED, **penalty(torch.tensor([3, 4]))},
        "penalty without prompts and more": {**PADDED, **penalty(torch.tensor([6, 5]))},
        "general processor, penalty without some of each": {
            **PADDED, "prefix_allowed_tokens_fn": neighbours, **penalty(torch.tensor([3, 4])),
        },
    }  # fmt: skip


@pytest.fixture
def each_way(exported):
    """The call through `firp.generate`, Hugging Face's hook and a folder of `firp export`, with drafts."""

    def each(model: PreTrainedModel, call: dict) -> list[torch.Tensor]:
        drafts = {"predictor": tiny_predictor(model, 1), "tree": firp.TreeConfig(8, 3)}
        folder = {"custom_generate": exported(11), "trust_remote_code": True, "tree": firp.TreeConfig(8, 3)}
        return [
            firp.generate(model, **call, **drafts),
            model.generate(**call, custom_generate=firp.decode, **drafts),
            model.generate(**call, **folder),
        ]

    return each


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_an_odd_call_gives_what_hugging_face_gives(name, each_way):
    model = tiny_model(1, vocab=11)
    expected = model.generate(**CALLS[name])
    for out in each_way(model, CALLS[name]):
        assert out.dtype == expected.dtype and torch.equal(out, expected)


def test_the_odd_calls_matter():
    """Every processor, criterion and mask among them changes the output."""
    model = tiny_model(1, vocab=11)
    plain = {name: model.generate(**call) for name, call in (("one", ONE), ("padded", PADDED), ("holed", HOLED))}
    for name, call in CALLS.items():
        if {"logits_processor", "stopping_criteria", "repetition_penalty"} & set(call):
            base = "one" if call["inputs"] is IDS else "padded" if call["inputs"] is PAIR else "holed"
            assert not torch.equal(model.generate(**call), plain[base]), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arguments_by_position():
    model = tiny_model(1, vocab=11)
    given = IDS, GenerationConfig(**CONFIG, **GREEDY), [MinLengthLogitsProcessor(9, 7)], [MaxLengthCriteria(11)]
    expected = model.generate(*given)
    assert expected.shape[1] == 11 and torch.equal(
        firp.generate(model, *given, predictor=tiny_predictor(model, 1)), expected
    )


@pytest.mark.parametrize(
    "name, value, instead", [("use_cache", False, True), ("num_beams", 4, 1), ("output_attentions", True, False)]
)
def test_an_argument_comes_before_the_models_own_configuration(name, value, instead, each_way):
    model = tiny_model(1, vocab=11)
    expected = model.generate(**ONE)
    setattr(model.generation_config, name, value)
    for call in (
        {**ONE, name: instead},
        {"inputs": IDS, "generation_config": GenerationConfig(**{name: instead}, **CONFIG, **GREEDY)},
    ):
        assert all(torch.equal(out, expected) for out in each_way(model, call))


def test_padding_on_both_sides_is_stripped(each_way):
    """Hugging Face goes on after the padding there; each row is its prompt alone."""
    model = tiny_model(1, vocab=11)
    ids, mask = torch.tensor([[0, 4, 5, 0], [6, 7, 8, 0]]), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])
    for options in (
        {},
        {"repetition_penalty": 2.5},
        {"prefix_allowed_tokens_fn": neighbours, "repetition_penalty": 2.5},
    ):
        expected = hf_alone(model, ids, mask, **GREEDY, **options)
        for out in each_way(model, {"inputs": ids, "attention_mask": mask, **GREEDY, **options}):
            assert new_tokens(out, 4) == expected


def test_the_configuration_given_is_not_changed(each_way):
    model = tiny_model(1, vocab=11)
    config = GenerationConfig(repetition_penalty=1.2, stop_strings=None, **CONFIG, **GREEDY)
    before = config.to_dict(), model.generation_config.to_dict()
    each_way(model, {"inputs": IDS, "generation_config": config})
    assert (config.to_dict(), model.generation_config.to_dict()) == before


def test_an_empty_cache_is_left_empty(each_way):
    model = tiny_model(1, vocab=11)
    expected, cache = model.generate(**ONE), DynamicCache(config=model.config)
    assert all(torch.equal(out, expected) for out in each_way(model, {**ONE, "past_key_values": cache}))
    assert cache.get_seq_length() == 0


def test_probabilities_of_the_tokens_as_hugging_face_computes_them(each_way):
    model = tiny_model(1, vocab=11)
    keep = {"return_dict_in_generate": True, "output_scores": True}
    for call in (ONE, PADDED):
        wanted, *ours = (
            model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
            for out in (model.generate(**call, **keep), *each_way(model, {**call, **keep}))
        )
        for found in ours:
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_model_and_predictor_may_differ(dtype):
    model = tiny_model(1, vocab=11, dtype=dtype)
    expected = firp.generate(model, **ONE)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        predictor = tiny_predictor(model, 1).to(other)
        assert torch.equal(firp.generate(model, **ONE, predictor=predictor, tree=firp.TreeConfig(8, 3)), expected)


@pytest.mark.parametrize(
    "keep", [{}, {"return_dict_in_generate": True, "output_scores": True}], ids=["alone", "with scores"]
)
def test_criteria_see_the_scores_so_far(keep, each_way):
    model = tiny_model(1, vocab=11)
    seen = []

    def look(ids, scores):
        seen.append((ids.tolist(), None if scores is None else len(scores)))
        return torch.tensor([False])

    model.generate(**ONE, stopping_criteria=[look], **keep)
    expected, seen[:] = list(seen), []
    each_way(model, {**ONE, "stopping_criteria": [look], **keep})
    assert seen == 3 * expected and len(expected) > 3


def test_a_streamer_read_in_another_thread():
    class Letters:
        def decode(self, tokens, **_):
            return "".join(chr(97 + int(token)) for token in tokens)

    model = tiny_model(1, vocab=11)
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    run = threading.Thread(
        target=firp.generate,
        args=(model, IDS),
        kwargs={**GREEDY, "streamer": streamer, "predictor": tiny_predictor(model, 1)},
    )
    run.start()
    text = "".join(streamer)
    run.join()
    assert text == Letters().decode(model.generate(**ONE)[0, 4:])


def test_runs_of_several_threads_on_one_engine():
    model = tiny_model(1, vocab=11)
    engine = firp.Engine(model, tiny_predictor(model, 1), firp.TreeConfig(8, 3))
    prompts = [torch.tensor([[first, 5, 6]]) for first in (4, 5, 6, 7)]
    expected = [model.generate(ids, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: firp.generate(model, prompts[i % 4], engine=engine, **GREEDY), range(16)))
    assert all(torch.equal(out, expected[i % 4]) for i, out in enumerate(found))


def test_a_run_inside_the_callback_of_another():
    model = tiny_model(1, vocab=11)
    engine = firp.Engine(model, tiny_predictor(model, 1), firp.TreeConfig(8, 3))
    inner = []

    def nested(event):
        if event.step == 1:
            inner.append(firp.generate(model, **PADDED, engine=engine))

    assert torch.equal(firp.generate(model, **ONE, engine=engine, on_step=nested), model.generate(**ONE))
    assert torch.equal(inner[0], model.generate(**PADDED))
