"""Captured steps equal eager ones and never wait for the host; compiled layers equal eager ones."""

import copy
import dataclasses
from types import SimpleNamespace

import firp
import pytest
import torch
from captured_runs import looks_up
from firp.engine.chooser import Greedy
from firp.engine.graphs import EagerRunner, GraphRunner
from firp.generation.loop import run
from firp.generation.output import Output
from firp.generation.records import PendingRecord
from firp.sampling.choosers import Vectorised
from models import tiny_model, tiny_predictor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as hf

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def on_gpu(seed, **tree):
    model = tiny_model(seed, vocab=50, dtype=torch.float32).to("cuda")
    predictor = tiny_predictor(model, seed)
    return model, predictor, firp.TreeConfig(**tree)


def decode(engine, prompts, choose, late=True, new_tokens=60):
    out = Output(
        torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True), prompts, new_tokens, [3], StoppingCriteriaList()
    )
    stats = run(engine, engine.start(prompts, new_tokens, [3]), choose(engine), out, late)
    return out.emitted, stats.steps


def sampling(engine):
    processors = LogitsProcessorList(
        [
            hf.TemperatureLogitsWarper(0.9),
            hf.TopKLogitsWarper(20),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.01),
            hf.TypicalLogitsWarper(0.9),
        ]
    )
    return Vectorised(engine.ops, processors, 11, None, [0] * 8)


@gpu
@needs_gpu
@pytest.mark.parametrize("choose", [lambda engine: Greedy(engine.ops), sampling], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 5])
def test_replay_equals_eager(batch, kind, choose):
    model, predictor, tree = on_gpu(batch, num_nodes=16, num_lookahead=4, kind=kind)
    prompts = [
        torch.randint(4, 50, (20 + 40 * i,), generator=torch.Generator().manual_seed(i)).cuda() for i in range(batch)
    ]
    eager = firp.Engine(model, predictor, tree, graphs=False, compile=False)
    captured = firp.Engine(model, predictor, tree, graphs=True, compile=False)
    expected = decode(eager, prompts, choose, late=False)
    for _ in range(2):  # The second run replays what the first captured.
        assert decode(captured, prompts, choose) == expected
    assert len(captured._spare[0].graphs) > 0
    plain = firp.Engine(model, graphs=True, compile=False)
    assert decode(plain, prompts, choose)[0] == expected[0]


@gpu
@needs_gpu
@pytest.mark.parametrize("choose", [lambda engine: Greedy(engine.ops), sampling], ids=["greedy", "sampling"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager layers", "compiled layers"])
def test_branches_of_earlier_text_leave_the_tokens(compile, choose):
    model, predictor, tree = on_gpu(2, num_nodes=16, num_lookahead=16)
    prompts = [torch.tensor([4, 5, 6, 7] * 8).cuda(), torch.tensor([9, 8]).cuda()]
    engine = looks_up(firp.Engine(model, predictor, graphs=True, compile=compile), firp.TreeConfig(4, 4), tree)
    plain = firp.Engine(model, graphs=True, compile=compile)
    for _ in range(2):
        assert decode(engine, prompts, choose)[0] == decode(plain, prompts, choose)[0]


@gpu
@needs_gpu
@pytest.mark.parametrize("branches", [False, True], ids=["drafts", "drafts and branches"])
@pytest.mark.parametrize("choose", [lambda engine: Greedy(engine.ops), sampling], ids=["greedy", "sampling"])
def test_a_hundred_steps_never_wait(choose, branches):
    """Launch, queue the copy of the record, read it one step late; any other synchronisation raises."""
    model, predictor, tree = on_gpu(3, num_nodes=16, num_lookahead=16)
    engine = firp.Engine(model, predictor, tree, graphs=True, compile=False)
    if branches:
        looks_up(engine, tree)
    state = engine.start([torch.arange(4, 20).cuda()], 150, [])
    state.use_slots(256)
    chooser = choose(engine)
    for _ in range(3):
        PendingRecord(engine.step(state, chooser)).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = PendingRecord(engine.step(state, chooser))
        for _ in range(100):
            following = PendingRecord(engine.step(state, chooser))
            pending.read()
            pending = following
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_gpu
def test_the_step_itself_never_waits():
    """Eager steps on a GPU are device work alone too: what is captured is what runs."""
    model, predictor, tree = on_gpu(4, num_nodes=16, num_lookahead=4)
    engine = firp.Engine(model, predictor, tree, graphs=False, compile=False)
    state = engine.start([torch.arange(4, 20).cuda()], 200, [])
    for _ in range(3):
        engine.step(state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            engine.step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_gpu
def test_compiled_and_captured_output_is_the_same():
    model, predictor, tree = on_gpu(5, num_nodes=16, num_lookahead=4)
    prompts = [torch.arange(4, 40).cuda()]
    engines = [firp.Engine(model, predictor, tree, compile=compile) for compile in (False, True)]
    engines[1].warm_up(max_len=100, progress=False)
    assert decode(engines[0], prompts, lambda e: Greedy(e.ops)) == decode(engines[1], prompts, lambda e: Greedy(e.ops))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_in_chunks_on_a_gpu(dtype):
    """Against the CPU's prefill of the same weights."""
    model = tiny_model(6, vocab=50, dtype=dtype)
    prompt = torch.randint(4, 50, (150,), generator=torch.Generator().manual_seed(6))
    expected = firp.Engine(model).start([prompt], 5, []).cache[..., :149, :, :].float()
    engine = firp.Engine(model.to("cuda"), graphs=False, compile=False)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for chunk in (1024, 64, 7):
        cache = engine.start([prompt], 5, [], chunk_tokens=chunk).cache[..., :149, :, :].float().cpu()
        torch.testing.assert_close(cache, expected, rtol=tolerance, atol=tolerance)


class Recorded(GraphRunner):
    """A runner whose graphs are steps over the tensors that were there at capture: what a replay sees, on a CPU."""

    prefill = EagerRunner.prefill

    def __init__(self):
        self.captured = 0

    def _capture(self, step, state, choose):
        self.captured += 1
        held, tree, finished = dataclasses.replace(state), state.tree, state.finished.clone()
        state.finished.fill_(True)
        record = step.run(held, choose)
        state.finished.copy_(finished)

        def replay():
            held.tree = tree
            new = step.run(held, choose)
            tree.copy_(held.tree)
            for name in ("tokens", "counts", "finished", "status", "path"):
                getattr(record, name).copy_(getattr(new, name))

        return SimpleNamespace(replay=replay), record


@pytest.mark.parametrize("choose", [lambda engine: Greedy(engine.ops), sampling], ids=["greedy", "sampling"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "plain", "own"])
def test_steps_over_held_tensors_equal_fresh_ones(kind, choose):
    """Graphs are reused over batches that shrink, buckets that grow, trees of one size and runs that follow."""
    model = tiny_model(7, vocab=12)
    predictor = None if kind == "plain" else tiny_predictor(model, 7)
    tree = firp.TreeConfig(8, 3, kind) if kind in ("dynamic", "static") else None
    fresh, held = firp.Engine(model, predictor, tree), firp.Engine(model, predictor, tree)
    held.runner = Recorded()
    runs = [[torch.randint(4, 12, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
            for lengths in ((200,), (3, 30, 7, 180, 12), (2, 9), (3, 30, 7, 180, 12))]  # fmt: skip
    captured = []
    for prompts in runs:
        expected = decode(fresh, prompts, choose, late=False, new_tokens=50)
        assert decode(held, prompts, choose, late=False, new_tokens=50) == expected
        captured.append(held.runner.captured)
    assert captured[-1] == captured[-2] > 1


def test_compiled_layers_equal_eager_ones_and_settle():
    """One graph for rows below the insertion layer and one for those above, shared by all layers; then no more."""
    counters = torch._dynamo.utils.counters
    model = tiny_model(1, dtype=torch.float32)
    predictor, tree = tiny_predictor(model, 1), firp.TreeConfig(8, 3)
    eager, compiled = firp.Engine(model, predictor, tree), firp.Engine(model, predictor, tree, compile=True)
    state = eager.start([torch.tensor([4, 5, 6, 4])], 40, [])
    eager.step(state)
    graphs = []
    for _ in range(4):
        other = copy.deepcopy(state)
        rows, same = eager._step.forward(state), compiled._step.forward(other)
        torch.testing.assert_close(same, rows, rtol=1e-4, atol=1e-4)
        written = int(state.context_lens[0]) + state.tree.size[0]
        torch.testing.assert_close(
            other.cache[..., :written, :, :], state.cache[..., :written, :, :], rtol=1e-4, atol=1e-4
        )
        graphs.append(counters["stats"]["unique_graphs"])
        eager.step(state)
    assert graphs[0] == graphs[-1] and not counters["graph_break"]
    for prompt in (torch.tensor([5, 4, 6]), torch.tensor([4, 5, 5, 6, 6])):
        runs = [decode(engine, [prompt], lambda e: Greedy(e.ops), new_tokens=30) for engine in (eager, compiled)]
        assert runs[0] == runs[1]
