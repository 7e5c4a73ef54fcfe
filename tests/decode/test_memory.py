"""Memory planned from shapes: it counts what is there, and refuses what does not fit before any work."""

import firp
import pytest
import torch
from firp.engine import memory
from firp.engine.weights import weights_of
from models import FAMILIES, tiny_model, tiny_predictor


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_cache_are_counted_to_the_byte(family, tied):
    model = tiny_model(0, family, tied=tied, dtype=torch.bfloat16)
    assert weights_of(model.config, torch.bfloat16).bytes == sum(p.numel() * 2 for p in model.parameters())
    predictor = tiny_predictor(model, 0)
    engine = firp.Engine(model, predictor, firp.TreeConfig(8, 3))
    state = engine.start([torch.tensor([4, 5, 6])] * 2, 50, [])
    plan = memory.plan_memory(model.config, torch.bfloat16, memory.slots_for(53, engine.max_rows), 2, 8, 3, 3)
    assert plan.cache == state.buffers.cache.numel() * 2
    assert plan.predictor == engine._step.drafters.weight.numel() * 2
    assert plan.total == plan.weights + plan.predictor + plan.run
    assert plan.scores >= 2 * (8 + 9) * 7 * 2


def test_plain_decoding_needs_less():
    config = tiny_model(0).config
    plain = memory.plan_memory(config, torch.bfloat16, 512)
    firp_ = memory.plan_memory(config, torch.bfloat16, 512, 1, 16, 16, 3)
    assert plain.predictor == plain.graphs == 0
    assert plain.cache == firp_.cache and plain.scores < firp_.scores
    captured = [memory.plan_memory(config, torch.bfloat16, slots, captures=True) for slots in (2048, 4096)]
    # One pool holds the graphs of all buckets, and those of prompts, which are not captured beyond.
    assert captured[0].graphs == captured[1].graphs >= captured[0].scores > 0


def test_a_run_that_does_not_fit_is_refused_before_any_work(monkeypatch):
    model = tiny_model(1)
    engine = firp.Engine(model, tiny_predictor(model, 1))
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    monkeypatch.setattr(engine._step, "run", None)
    monkeypatch.setattr(engine.runner, "prefill", None)
    with pytest.raises(
        ValueError,
        match=r"max_new_tokens: 2 sequences of 256 cache slots need 1\.\d\d MiB \(cache 0\.50 MiB, .* free on cpu",
    ):
        firp.generate(model, torch.tensor([[4, 5], [5, 6]]), engine=engine, max_new_tokens=8, do_sample=False)


def test_bytes_in_words():
    said = {0: "0.00 GiB", 1 << 19: "0.50 MiB", 100 << 20: "100.00 MiB", 1 << 30: "1.00 GiB", 3 << 29: "1.50 GiB"}
    assert {number: memory.gib(number) for number in said} == said


def test_over_long_requests_are_refused_before_any_work(monkeypatch):
    model = tiny_model(1)
    engine = firp.Engine(model)
    monkeypatch.setattr(engine.runner, "prefill", None)
    with pytest.raises(
        ValueError, match="got 254 after a prompt of 3 tokens, expected at most 253: the model's context holds 256"
    ):
        firp.generate(model, torch.tensor([[4, 5, 6]]), engine=engine, max_new_tokens=254, do_sample=False)


def test_free_memory_is_known():
    assert memory.available_memory(torch.device("cpu")) > 1 << 20
