"""Ragged prompts as one right-padded batch, as on a GPU: the same cache and the same tokens as one by one."""

import functools
import random

import firp
import pytest
import torch
from firp.engine import memory
from firp.engine.prefill import CHUNK_TOKENS, GPU_CHUNK_TOKENS, default_chunk, most_rows, prefill_batch, prompt_batches
from models import FAMILIES, hf_alone, new_tokens, ragged_batch, tiny_model, tiny_predictor

GREEDY = {"max_new_tokens": 12, "do_sample": False}
LENGTHS = (3, 20, 1, 17, 9, 20)


def prompts_of(seed, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 11, (length,), generator=generator) for length in lengths]


@pytest.fixture
def batched_on_a_cpu(monkeypatch):
    """The engine groups prompts as it does on a GPU; returns the batches it made."""
    made = []

    def batches(lengths, rows):
        made.extend(prompt_batches(lengths, CHUNK_TOKENS))
        return prompt_batches(lengths, CHUNK_TOKENS)

    monkeypatch.setattr("firp.engine.prefill.prompt_batches", batches)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_fills_the_cache_as_single_prompts_do(family):
    """float32: prompts on both sides of sliding windows and RoPE switches; other sequences and far slots stay as they
    are.
    """
    view = firp.Engine(tiny_model(5, family, vocab=11, dtype=torch.float32), impl="reference").view
    prompts, places = prompts_of(5), [4, 0, 6, 1, 3, 2]
    config = view.config
    kv_heads, width = config.num_key_value_heads, getattr(config, "head_dim", None) or 8
    single, batch = (torch.full((view.num_layers, 2, 7, 32, kv_heads, width), float("nan")) for _ in range(2))
    for prompt, place in zip(prompts, places, strict=True):
        prefill_batch(view, [prompt], single, [place], CHUNK_TOKENS)
    prefill_batch(view, prompts, batch, places, CHUNK_TOKENS)
    for prompt, place in zip(prompts, places, strict=True):
        torch.testing.assert_close(
            batch[:, :, place, : len(prompt)], single[:, :, place, : len(prompt)], rtol=1e-5, atol=1e-5
        )
    assert batch[:, :, 5].isnan().all() and batch[:, :, :, max(LENGTHS) :].isnan().all()
    assert batch[:, :, places, : max(LENGTHS)].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_after_a_batch_are_the_models_own(family, batched_on_a_cpu):
    model = tiny_model(5, family, vocab=11, dtype=torch.float32)
    ids, mask = ragged_batch(random.Random(family), 8, 11, longest=20)
    engine = firp.Engine(model, tiny_predictor(model, 5), firp.TreeConfig(8, 4), impl="reference")
    out = firp.generate(model, ids, attention_mask=mask, engine=engine, **GREEDY)
    assert new_tokens(out, ids.shape[1]) == hf_alone(model, ids, mask, **GREEDY)
    assert max(map(len, batched_on_a_cpu)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_comes_after_the_last_keys_and_values(family, monkeypatch):
    """Every layer but the last passes its feed-forward block; keys and values of all are Hugging Face's."""
    model = tiny_model(6, family, vocab=11, dtype=torch.float32)
    engine = firp.Engine(model, impl="reference")
    layers, (prompt,), passed = engine.view.layers, prompts_of(6, (20,)), []
    with monkeypatch.context() as patch:
        for place, layer in enumerate(layers):
            note = lambda *args, place=place, own=layer.mlp.forward: passed.append(place) or own(*args)  # noqa: E731
            patch.setattr(layer.mlp, "forward", note)
        cache = engine.start([prompt], 1, [], checked=True).cache
    assert passed == list(range(len(layers) - 1))
    expected = model(prompt[None], use_cache=True).past_key_values  # the last token's too
    for filled, own in zip(cache, expected.layers, strict=True):
        for got, wanted in zip(filled, (own.keys.transpose(1, 2), own.values.transpose(1, 2)), strict=True):
            torch.testing.assert_close(got[:, 20 - wanted.shape[1] : 19], wanted[:, :-1], rtol=1e-4, atol=1e-5)


def test_prompts_join_while_their_rows_fit():
    """Every prompt once, longest first, at most `rows` rows with padding; too long ones alone, empty ones nowhere."""
    assert prompt_batches([5, 0, 3, 9, 1], 10) == [[3], [0, 2], [4]]
    assert prompt_batches([0, 0], 10) == []
    assert prompt_batches([4, 4, 4], 1) == [[0], [1], [2]]
    rng = random.Random(1)
    for _ in range(50):
        lengths, rows = [rng.randint(0, 300) for _ in range(rng.randint(1, 60))], rng.choice((1, 50, 256, 1024))
        batches = prompt_batches(lengths, rows)
        assert sorted(b for batch in batches for b in batch) == [b for b, length in enumerate(lengths) if length]
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[b] for b in batch) <= rows


def test_padding_is_bounded():
    """512 prompts of any lengths cost few rows more than they hold, and few passes."""
    rng = random.Random(2)
    for spread in (lambda: rng.randint(1, 400), lambda: int(2 ** rng.uniform(0, 10)), lambda: 200):
        lengths = [spread() for _ in range(512)]
        batches = prompt_batches(lengths, GPU_CHUNK_TOKENS)
        rows = sum(len(batch) * max(lengths[b] for b in batch) for batch in batches)
        assert rows <= 1.15 * sum(lengths)
        assert len(batches) <= 1 + 1.3 * sum(lengths) / GPU_CHUNK_TOKENS


def test_a_cpu_takes_prompts_one_by_one(monkeypatch):
    """There a row's last bits may depend on the rows beside it."""
    taken = []
    monkeypatch.setattr("firp.engine.prefill.prefill_batch", lambda view, prompts, *_: taken.append(len(prompts)))
    firp.Engine(tiny_model(1)).start(prompts_of(1), 5, [])
    assert taken == [1] * sum(length > 1 for length in LENGTHS)


def test_memory_counts_the_rows_of_a_batch():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert most_rows(cpu, 256, 512) == 256 and most_rows(cpu, 1 << 16, 512) == CHUNK_TOKENS
    assert most_rows(gpu, 256, 4) == 1024 and most_rows(gpu, 256, 512) == GPU_CHUNK_TOKENS
    plan = functools.partial(memory.plan_memory, tiny_model(1).config, torch.bfloat16, 256, 512)
    assert plan(prefill_rows=GPU_CHUNK_TOKENS).scratch > plan(prefill_rows=256).scratch
    assert default_chunk(gpu) == GPU_CHUNK_TOKENS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_batch_on_a_gpu(dtype):
    """Against the CPU's prefill of the same weights, with the default chunk and with one that some prompts exceed."""
    model = tiny_model(6, vocab=11, dtype=dtype)
    prompts = prompts_of(6, (150, 1, 30, 31, 149, 2))
    expected = firp.Engine(model).start(prompts, 5, []).cache.float()
    engine = firp.Engine(model.to("cuda"), graphs=False, compile=False)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for chunk in (None, 64):
        cache = engine.start(prompts, 5, [], chunk_tokens=chunk).cache.float().cpu()
        for b, prompt in enumerate(prompts):
            kept = len(prompt) - 1
            torch.testing.assert_close(cache[:, :, b, :kept], expected[:, :, b, :kept], rtol=tolerance, atol=tolerance)
