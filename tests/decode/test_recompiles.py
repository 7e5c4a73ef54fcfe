"""Compiled layers of Hugging Face run every batch size in a few graphs, and no request dies of a recompile limit."""

import functools
from types import SimpleNamespace

import firp
import pytest
import torch
from firp.engine import engine as engine_module
from firp.engine import layers
from firp.generation.batch import answer
from models import tiny_model, tiny_predictor

PROMPT = [4, 5, 6, 4]
# One row or many, one sequence or many: 6 of layers, below the insertion layer and above, 4 of rotary positions and 4
# of the final norm for all batch sizes, counted. 7 more where a small batch borrows the buffers of a large one, whose
# strides differ.
GRAPHS, GRAPHS_OVER_LARGER_BUFFERS = 14, 7


@pytest.fixture
def graphs(monkeypatch):
    """Layers as on a GPU, without few-row modules, traced but not compiled by Inductor; returns the graphs so far."""
    monkeypatch.setattr(engine_module, "usual_adapters", lambda: None)
    monkeypatch.setattr(
        layers,
        "torch",
        SimpleNamespace(compile=functools.partial(torch.compile, backend="eager"), _dynamo=torch._dynamo),
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize("joined", [False, True], ids=["Hugging Face's linears", "joint linears"])
def test_many_batch_sizes_in_few_graphs(graphs, monkeypatch, joined):
    """Plain and drafting runs, and one with a repetition penalty, which needs the host; tokens are those of eager
    layers.
    """
    monkeypatch.setattr("firp.decoder.joint_linears._joinable", lambda *linears: joined)
    model = tiny_model(1, vocab=50, dtype=torch.float32)
    predictor = tiny_predictor(model, 1)
    compiled, eager = (firp.Engine(model, predictor, compile=compile) for compile in (True, False))
    limit = torch._dynamo.config.recompile_limit
    for batch in range(1, 9) if joined else (1, 2, 3, 8):
        for plain in (False, True):
            tokens = []
            for engine in (compiled, eager):
                state = engine.start([torch.tensor(PROMPT)] * batch, 40, [], plain=plain)
                tokens.append([engine.step(state).tokens.max(1).values.tolist() for _ in range(3)])
                engine.release(state)
            assert tokens[0] == tokens[1]
    assert graphs() <= GRAPHS
    options = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.3}
    for prompts in ([PROMPT], [PROMPT, [5, 4], [6]]):
        assert answer(compiled, prompts, **options) == answer(eager, prompts, **options)
    assert graphs() <= GRAPHS + GRAPHS_OVER_LARGER_BUFFERS and torch._dynamo.config.recompile_limit == limit


def test_sizes_past_dynamos_own_limit(graphs, monkeypatch):
    """Without dynamic shapes every batch size is a graph: more than dynamo's own limit allows, of 2 here."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    static = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        layers,
        "torch",
        SimpleNamespace(compile=lambda own, **_: static(own, fullgraph=True, dynamic=False), _dynamo=torch._dynamo),
    )
    engine = firp.Engine(tiny_model(1, num_hidden_layers=2, dtype=torch.float32), compile=True)
    for batch in range(1, 5):
        state = engine.start([torch.tensor(PROMPT)] * batch, 4, [])
        engine.step(state)
        engine.release(state)
    assert graphs() >= 4
