"""The Triton kernels are what decodes: a whole engine over them, by name, gives Hugging Face's greedy tokens."""

import random
from collections import Counter

import firp
import pytest
import torch
from models import hf_alone, new_tokens, ragged_batch, tiny_model, tiny_predictor
from triton.runtime.jit import KernelInterface

from firp_kernels import registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_LAUNCHES = {
    "write_cache": 1, "tree_attention": 2, "predictor_projection": 1, "verify_tree": 2, "emit_tokens": 1,
    "top_marginals": 2, "condition_marginals": 1,
}  # fmt: skip
NEW_TOKENS = 10 if DEVICE == "cuda" else 5


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched."""
    names = []
    subscript = KernelInterface.__getitem__

    def recorded(kernel, grid):
        names.append(kernel.__name__)
        return subscript(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", recorded)
    return names


def count_calls(engine, launches):
    """Per Triton op of the engine: number of calls, and the launches of each call."""
    calls, per_call = Counter(), {name: set() for name in MOST_LAUNCHES}

    def counted(name, op):
        def call(*args):
            before = len(launches)
            out = op(*args)
            calls[name] += 1
            per_call[name].add(len(launches) - before)
            return out

        return call

    for name in MOST_LAUNCHES:
        setattr(engine.ops, name, counted(name, getattr(engine.ops, name)))
    return calls, per_call


@pytest.mark.parametrize("family", ["llama", "mistral"] if DEVICE == "cuda" else ["mistral"])
def test_an_engine_over_triton_kernels_equals_hugging_face(family, launches):
    model = tiny_model(2, family, dtype=torch.float32, num_hidden_layers=2).to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in ragged_batch(random.Random(2), 2, 7))
    impl = dict.fromkeys(MOST_LAUNCHES, "triton")
    engine = firp.Engine(model, tiny_predictor(model, 2, layer=1), firp.TreeConfig(8, 3), impl=impl)
    calls, per_call = count_calls(engine, launches)
    out = firp.generate(
        model,
        ids,
        attention_mask=mask,
        engine=engine,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert new_tokens(out.sequences, ids.shape[1]) == hf_alone(
        model, ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert out.stats.tau > 1.2
    assert {*impl, "write_and_attend", "keep_top_p", "lookup_branch"} == set(registry.TRITON_OPS)
    for name, most in MOST_LAUNCHES.items():
        assert per_call[name] and per_call[name] <= set(range(1, most + 1)), (name, per_call[name])
    steps = calls["verify_tree"]
    assert calls["predictor_projection"] == calls["condition_marginals"] == steps
    assert calls["tree_attention"] == calls["write_cache"] == model.config.num_hidden_layers * steps


def test_sampling_over_triton_kernels_equals_plain_sampling():
    model = tiny_model(3, dtype=torch.float32).to(DEVICE)
    ids = torch.tensor([[4, 5, 6, 4]], device=DEVICE)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "seed": 5, "top_k": 0}
    engine = firp.Engine(
        model,
        tiny_predictor(model, 3),
        firp.TreeConfig(8, 3),
        impl={"verify_tree": "triton", "predictor_projection": "triton"},
    )
    plain = firp.Engine(model, impl={"verify_tree": "triton"})
    assert torch.equal(
        firp.generate(model, ids, engine=engine, **options), firp.generate(model, ids, engine=plain, **options)
    )
