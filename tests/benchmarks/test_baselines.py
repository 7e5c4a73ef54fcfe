"""Draft heads: the output is the model's own, a file is read strictly."""

import json
import random

import firp
import pytest
import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from models import FAMILIES, hf_alone, new_tokens, ragged_batch, tiny_model

from benchmarks.baselines.decode import HeadEngine
from benchmarks.baselines.heads import CONFIG, KINDS, WEIGHTS, Heads, load_heads

NEW_TOKENS = 18


def random_heads(model, kind, seed, num_offsets=3, layer=2, size=0.3):
    layer = model.config.num_hidden_layers if kind == "medusa" else layer
    heads = Heads(kind, num_offsets, model.config.hidden_size, layer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return heads


def check(engine, rng, vocab=7):
    """A ragged batch equals Hugging Face's single runs; returns drafted tokens that were accepted."""
    ids, mask = ragged_batch(rng, rng.randint(1, 4), vocab)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    out = firp.generate(engine.model, ids, attention_mask=mask, engine=engine, return_dict_in_generate=True, **options)
    expected = hf_alone(engine.model, ids, mask, **options)
    assert new_tokens(out.sequences, ids.shape[1]) == expected
    assert out.stats.tokens == sum(map(len, expected))
    return out.stats.tokens - out.stats.steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_heads_give_the_models_own_output(kind, seed):
    rng = random.Random(seed)
    model = tiny_model(seed, kv_heads=(1, 2, 4)[seed % 3], tied=bool(seed % 2), dtype=torch.float32)
    accepted = 0
    for run in range(4):
        num_offsets = rng.randint(1, 4)
        heads = random_heads(model, kind, 10 * seed + run, num_offsets, rng.randint(1, 4))
        tree = rng.choice((1, 2, 5, 8, 33)), rng.choice(("dynamic", "static"))
        accepted += check(HeadEngine(model, heads, *tree), rng)
    assert accepted > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3-sliding", "granite", "cohere", "olmo2"])
def test_other_families(kind, family):
    model = tiny_model(5, family, dtype=torch.float32)
    check(HeadEngine(model, random_heads(model, kind, 3), 8), random.Random(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_hostile_heads(kind, value):
    model = tiny_model(6, dtype=torch.float32)
    heads = random_heads(model, kind, 0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.fill_(value)
    check(HeadEngine(model, heads, 8), random.Random(2))


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_output_is_that_of_plain_decoding(kind):
    model = tiny_model(7)
    ids, mask = ragged_batch(random.Random(5), 3, 7)
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 0.8, "seed": 4}
    plain = firp.generate(model, ids, **options)
    assert torch.equal(
        plain, firp.generate(model, ids, engine=HeadEngine(model, random_heads(model, kind, 1), 8), **options)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_after_a_step_holds_the_heads_best_tokens(kind):
    """The oracle: the heads over Hugging Face's own hidden state of the last accepted token."""
    model = tiny_model(8, vocab=31, dtype=torch.float32)
    heads = random_heads(model, kind, 2)
    engine = HeadEngine(model, heads, 4, "static")  # (0,), (0, 0), (1,): the two best of depth 1, the best of depth 2
    state = engine.start([torch.tensor([4, 5, 6])], 12, [])
    tokens, depths = [4, 5, 6], 0
    for _ in range(5):
        record = engine.step(state)
        tokens += record.tokens[0, : record.counts[0]].tolist()
        states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        # The last of them is after the final norm, where Medusa's heads begin.
        if kind == "medusa":
            x = states[-1][0, -1]
            inner = torch.einsum("koi,i->ko", heads.weight, x) + heads.bias
            scores = model.lm_head(x + torch.nn.functional.silu(inner))
        else:
            rows = torch.einsum("koi,i->ko", heads.weight, states[heads.source_layer][0, -1])
            scores = model.lm_head(model.model.norm(rows))
        best = scores.topk(2).indices
        drafted = {(int(d), int(t)) for d, t in zip(state.tree.depths[0], state.tree.tokens[0], strict=True) if d}
        assert drafted == {(1, int(best[0, 0])), (1, int(best[0, 1])), (2, int(best[1, 0]))}
        depths += len(drafted)
    assert depths == 15


def test_untrained_medusa_heads_give_the_models_own_scores():
    model = tiny_model(9, vocab=31, dtype=torch.float32)
    view, heads = DecoderView(model), Heads("medusa", 2, 32, 4)
    final = real_rows(view, torch.arange(4, 12)[None], 2).final
    assert torch.equal(heads.scores(view, final)[..., 1, :], view.logits(final))


def test_bad_heads_are_refused():
    model = tiny_model(1)
    for heads, message in (
        (Heads("medusa", 2, 32, 3), r"source_layer: got 3, expected 4 \(the last\)"),
        (Heads("early-exit", 2, 32, 5), r"source_layer: got 5, expected 1..4"),
        (Heads("early-exit", 2, 16, 2), "hidden_size differs: they were made for 16 .*, the model has 32"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadEngine(model, heads, 4)
    with pytest.raises(ValueError, match="kind: got 'hydra', expected one of medusa, early-exit"):
        Heads("hydra", 2, 32, 4)
    with pytest.raises(ValueError, match="num_offsets: got True, expected an integer"):
        Heads("medusa", True, 32, 4)


def test_saved_heads_are_read_strictly(tmp_path):
    heads = random_heads(tiny_model(1), "medusa", 1)
    heads.save(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), load_heads(tmp_path).parameters(), strict=True))
    fields = json.loads((tmp_path / CONFIG).read_text())
    for changes, message in (
        ({"num_offsets": 2}, r"weight.*expected.*\(2, 32, 32\)"),
        ({"kind": "early-exit"}, "bias"),
        ({"source_layer": 0}, "source_layer: got 0, expected an integer of at least 1"),
        ({"extra": 1}, "got the fields"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(fields | changes))
        with pytest.raises(ValueError, match=message):
            load_heads(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    (tmp_path / WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot read"):
        load_heads(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no heads.json, expected a folder"):
        load_heads(tmp_path / "none")


def test_families_used_here_exist():
    assert {"qwen3-sliding", "granite", "cohere", "olmo2"} <= set(FAMILIES)
