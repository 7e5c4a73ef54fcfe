"""What `transformers serve` does with a model folder, by its own manager of generations: no server, no network."""

import asyncio

import pytest
import torch
from firp.decoder.seen import ENGINE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

serving = pytest.importorskip("transformers.cli.serving.utils", reason="this transformers has no such server")

PROMPTS = ["w1 w2 w3", "w9 w8"]


@pytest.fixture(scope="module")
def served(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(tiny / "model")


@pytest.fixture
def manager():
    return serving.GenerationState().get_manager("model")


def options(max_new_tokens):
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)


def expected(served, prompt, max_new_tokens=20):
    model, tokenizer = served
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = type(model).generate(model, **inputs, generation_config=options(max_new_tokens))
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def start(served, manager, prompt, max_new_tokens=20):
    """The queue and the streamer of one request."""
    model, tokenizer = served
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return manager.generate_streaming(model, tokenizer, inputs, options(max_new_tokens), request_id=prompt)


async def read(queue):
    """All of one answer, or the error that ended it."""
    parts = []
    while (item := await asyncio.wait_for(queue.get(), 60)) is not None:
        if isinstance(item, serving._StreamError):
            return item
        parts.append(item)
    return "".join(parts)


def test_two_requests_at_once_are_streamed(served, manager):
    async def ask():
        return await asyncio.gather(*(read(start(served, manager, prompt)[0]) for prompt in PROMPTS))

    assert asyncio.run(ask()) == [expected(served, prompt) for prompt in PROMPTS]
    assert getattr(served[0], ENGINE).engine.predictor is not None


def test_a_reader_that_leaves_ends_the_answer_and_nothing_else(served, manager):
    async def ask():
        queue, streamer = start(served, manager, PROMPTS[0], 200)
        await asyncio.wait_for(queue.get(), 60)
        streamer.cancel()
        rest = await read(queue)
        return rest, streamer.total_tokens, await read(start(served, manager, PROMPTS[1])[0])

    engine = getattr(served[0], ENGINE, None)
    _, tokens, after = asyncio.run(ask())
    assert tokens < 200 and after == expected(served, PROMPTS[1])
    assert engine is None or getattr(served[0], ENGINE) is engine


def test_a_prompt_past_the_context_is_a_clear_error(served, manager):
    async def ask(prompt, max_new_tokens):
        return await read(start(served, manager, prompt, max_new_tokens)[0])

    error = asyncio.run(ask("w5 " * 300, 20))
    assert error.msg.startswith("input_ids: got a prompt of 300 tokens, expected at most 255")
    assert asyncio.run(ask(PROMPTS[0], 20)) == expected(served, PROMPTS[0])


def test_answers_that_are_not_streamed(served, manager):
    model, tokenizer = served

    async def ask(prompt):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        return await manager.generate_non_streaming(model, tokenizer, inputs, options(20), request_id="1")

    text, length, _ = asyncio.run(ask(PROMPTS[0]))
    assert (text, length) == (expected(served, PROMPTS[0]), 3)
    with pytest.raises(ValueError, match="input_ids: got a prompt of 300 tokens"):
        asyncio.run(ask("w5 " * 300))


def test_without_the_flag_for_continuous_batching_generate_decodes(served):
    from transformers.cli.serving.utils import CBGenerateManager, GenerateManager, Modality

    for asked, kind in ((False, GenerateManager), (True, CBGenerateManager)):
        state = serving.GenerationState(continuous_batching=asked)
        batching = state.use_continuous_batching(served[0], Modality.LLM)
        assert batching == asked and type(state.get_manager("model", use_cb=batching)) is kind
