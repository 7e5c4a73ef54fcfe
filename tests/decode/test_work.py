"""What a step costs on paper, against torch's own counts, real steps, and the bytes that other parts count."""

import firp
import firp.engine.step
import pytest
import torch
from firp.bench.random_weights import build
from firp.bench.step_cost import step_bytes
from firp.decoder.view import DecoderView
from firp.drafting.drafters import Drafters
from firp.drafting.trees import TreeConfig
from firp.engine.weights import weights_of
from firp.engine.work import Draft, Sent, Work, break_even, product, step_work, update_work
from firp.tools.rates import DATASHEETS, Rates, find_rates
from firp.tools.shapes import SHAPES, named_config
from models import FAMILIES, tiny_model, tiny_predictor, update_predictor
from torch.utils.flop_counter import FlopCounterMode

import firp_kernels
from benchmarks.gpu import roofline

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TREE, OFFSETS, INSERTION = TreeConfig(6, 2), 3, 2
DRAFT, PLAIN = Draft(TREE, OFFSETS, INSERTION), Draft(None, OFFSETS, INSERTION)
# A byte a nanosecond, a thousand operations, a link of a tenth, a microsecond for a collective.
ROUND = Rates("round", "a test", 1e12, 1e9, 1e12, 1e8, 1e-6)
# Published numbers of parameters.
PARAMETERS = {
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648, "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_published_models(shape):
    assert weights_of(named_config(shape), torch.bfloat16).bytes == 2 * PARAMETERS[shape]


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen3", "gemma", "mixtral", "qwen2_moe", "starcoder2"])
@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts(family, tied):
    """Five sequences of one token, whose attention sees that token alone."""
    model = tiny_model(0, family, tied=tied, dtype=torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(1, 6)[:, None], use_cache=False)
    by_module = counter.get_flop_counts()
    rotary = sum(by_module.get(f"{type(model).__name__}.model.rotary_emb", {}).values())  # angles are a product there
    step = step_work(model.config, weights_of(model.config, torch.float32), CPU, 5, 0, PLAIN)
    assert step.total.operations == counter.get_total_flops() - rotary > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tree", [TREE, TreeConfig(16, 16)])
def test_rows_are_those_of_a_real_step(family, tree, monkeypatch):
    """A drafted step of two sequences, with one pass of the head and with two: its rows, and torch's count of them."""
    model = tiny_model(0, family, dtype=torch.float32)
    engine = firp.Engine(model, tiny_predictor(model, 0, layer=INSERTION), tree, impl="reference")
    state = engine.start([torch.tensor([4, 5, 6]), torch.tensor([5, 4])], 50, [])
    engine.step(state)
    assert state.tree.size == (tree.num_nodes, tree.num_lookahead)
    seen, run_layers, logits = [], firp.engine.step.run_layers, engine.view.logits

    def layers(function, layers, hidden, *others):
        seen.append(("layers", len(layers), hidden.shape[1]))
        return run_layers(function, layers, hidden, *others)

    def head(hidden):
        seen.append(("head", 1, hidden.shape[1]))
        return logits(hidden)

    monkeypatch.setattr(firp.engine.step, "run_layers", layers)
    monkeypatch.setattr(engine.view, "logits", head)
    with FlopCounterMode(display=False) as counter:
        engine.step(state)
    counts = counter.get_flop_counts()["Global"]
    linears = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))

    draft, config = Draft(tree, OFFSETS, INSERTION), model.config
    rows = tree.num_nodes + tree.num_lookahead * OFFSETS
    passes = [rows] if tree is TREE else [tree.num_nodes, OFFSETS]
    assert draft.rows == rows == engine.max_rows
    assert seen == [("layers", 2, tree.num_nodes), ("layers", 2, rows), *(("head", 1, count) for count in passes)]
    weights = weights_of(config, torch.float32)
    parts = step_work(config, weights, CPU, 2, 3, draft).parts
    counted = [parts[name].operations for name in ("layers below t", "layers above t", "norm and head")]
    assert sum(counted) == linears
    assert parts["norm and head"].read == len(passes) * product((*weights.norm, *weights.head), 1, itemsize=4).read


def test_bytes_are_those_that_the_bench_counts():
    """Beside the keys and values of the step's own rows, which it leaves out."""
    model, predictor = build("tiny", torch.bfloat16, "cpu", OFFSETS, 0)
    config, weights = model.config, weights_of(model.config, torch.bfloat16)
    token = 2 * config.num_key_value_heads * 16 * 2 * config.num_hidden_layers
    plain = step_work(config, weights, CPU, 2, 100, PLAIN).total.read
    assert plain == step_bytes(model, None, 100, 2) + 2 * token
    drafted = step_work(config, weights, CPU, 2, 100, DRAFT).total.read
    assert drafted == step_bytes(model, predictor, 100, 2) + 2 * (2 * 6 + 2 * 12) * token // 4


@pytest.mark.parametrize(("name", "shape"), [("llama2-7b", "llama2-7b"), ("llama3.1-8b", "llama3-8b")])
def test_a_step_is_that_of_the_roofline(name, shape):
    """Its products and bytes; it counts no norms, and launches beside."""
    config, sizes = named_config(name), roofline.SHAPES[shape]
    step = step_work(config, weights_of(config, torch.bfloat16), GPU, 1, 1024, Draft(TreeConfig(16, 16), 3, 21))
    numbers = roofline.layer_weights(sizes)
    assert step.parts["layers below t"].operations == 2 * 16 * 21 * numbers
    assert step.parts["layers above t"].operations == 2 * 64 * 11 * numbers
    own = 2 * (21 * 16 + 11 * 64) * sizes.kv_heads * sizes.head_dim * 2
    norms = 65 * 4096 * 2
    assert step.total.read == roofline.least_bytes(sizes, roofline.FIRP, 1024) + own + norms


def test_windows_and_experts_are_counted():
    """Mistral's layers see 6 tokens of the context; of 4 experts a row reads and passes 2."""
    config = tiny_model(0, "mistral").config
    step = step_work(config, weights_of(config, torch.float32), CPU, 1, 100, PLAIN)
    assert step.parts["attention above t"] == Work(2 * 2 * 7 * 2 * 8 * 4, 2 * 4 * 7 * 4 * 8)
    experts = [
        weight for weight in weights_of(tiny_model(0, "mixtral").config, torch.float32).layers[0] if weight.experts > 1
    ]
    numbers = sum(weight.held for weight in experts)
    assert product(experts, 1, 2, 4) == Work(numbers // 2 * 4, 2 * numbers // 2)
    assert product(experts, 5, 2, 4) == Work(numbers * 4, 5 * 2 * numbers // 2)


def test_a_roofline_by_hand():
    assert ROUND.seconds(500, 1000) == pytest.approx(500e-9) and ROUND.seconds(1, 1e6) == pytest.approx(1e-6)
    assert ROUND.collective_seconds("all-reduce", 3, 400, 4) == pytest.approx(3e-6 + 600e-8)
    assert ROUND.collective_seconds("all-gather", 1, 400, 4) == pytest.approx(1e-6 + 300e-8)
    assert ROUND.collective_seconds("broadcast", 2, 16, 4) == pytest.approx(2e-6 + 16e-8)


def test_tau_breaks_even_by_hand():
    """Of bytes alone a FIRP step takes its bytes over a plain step's; collectives add what they send and wait."""
    config = tiny_model(0).config
    weights = weights_of(config, torch.float32, 2)
    plain, firp_ = (step_work(config, weights, CPU, 1, 50, draft, 2) for draft in (PLAIN, DRAFT))
    assert plain.collectives["broadcast"] == Sent(1, 8 * 6) and firp_.collectives["broadcast"].number == 2
    instant = Rates("instant", "a test", 1e12, 1e9, 1e30, 1e30, 0.0)
    assert break_even(plain, firp_, instant) == pytest.approx(firp_.total.read / plain.total.read)
    waits = Rates("waits", "a test", 1e12, 1e30, 1e30, 1e30, 1.0)
    counts = [sum(sent.number for sent in step.collectives.values()) for step in (plain, firp_)]
    assert break_even(plain, firp_, waits) == pytest.approx(counts[1] / counts[0])
    assert break_even(plain, plain, ROUND) == 1


def test_ranks_share_the_work():
    """Linears, heads and the head divide; norms, the predictor and what is gathered do not."""
    config = named_config("llama2-70b")
    whole, share = (
        step_work(config, weights_of(config, torch.bfloat16, tp), GPU, 16, 4096, Draft(TREE, 3, 53), tp)
        for tp in (1, 8)
    )
    assert not whole.collectives and share.collectives["all-reduce"].number == 1 + 2 * 80
    for name, part in share.parts.items():
        each = 1 if name == "predictor" else 8
        assert whole.parts[name].operations == each * part.operations, name
    with pytest.raises(ValueError, match=r"its 8 key heads .* 64 query heads cannot be divided over 3"):
        step_work(config, weights_of(config, torch.bfloat16, 3), GPU, 1, 10, PLAIN, 3)


def test_rates_are_named_given_or_refused():
    given = {"bandwidth": 100.0, "flops": None, "link_bandwidth": None, "latency": 3.0}
    found = find_rates("h100", torch.bfloat16, "cuda", given, 2)
    assert (found.bandwidth, found.operations, found.latency) == (1e11, 989e12, 3e-6)
    assert found.source.endswith("as given: bandwidth, latency") and DATASHEETS["h100"].bandwidth == 3.35e12
    none = dict.fromkeys(given)
    with pytest.raises(ValueError, match=r"^device_rates: got 'h900', expected a100, h100, h200, l40s or measured"):
        find_rates("h900", torch.bfloat16, "cuda", none)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^flops: got .*, expected a finite number above 0"):
            find_rates("h100", torch.bfloat16, "cuda", {**none, "flops": value})
    with pytest.raises(ValueError, match=r"^flops: not known of the device rates 'h100' in float32"):
        find_rates("h100", torch.float32, "cuda", none)
    with pytest.raises(
        ValueError, match=r"^link_bandwidth, latency: not measured, expected to be given where 2 ranks send"
    ):
        find_rates("measured", torch.float32, "cpu", {**none, "bandwidth": 1.0, "flops": 1.0}, 2)


def test_rates_of_this_machine(monkeypatch):
    monkeypatch.setitem(firp.tools.hardware.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(firp.tools.hardware.PRODUCT_WIDTH, "cpu", 64)
    found = find_rates("measured", torch.float32, "cpu", {})
    assert found.bandwidth > 0 and found.operations > 0 and found.kind == "cpu" and found.memory > 1 << 20


def test_every_family_is_counted():
    for family in FAMILIES:
        config = tiny_model(0, family).config
        work = step_work(config, weights_of(config, torch.float32), CPU, 1, 20, DRAFT).total
        assert work.read > 0 and work.operations > 0, family


@pytest.mark.parametrize("offsets, listed", [(1, 0), (3, 0), (3, 8)])
def test_operations_of_an_update_are_those_that_torch_counts(offsets, listed):
    model = tiny_model(0, vocab=29, dtype=torch.float32)
    predictor = update_predictor(model, 1, num_offsets=offsets, listed=listed)
    updater = Drafters(DecoderView(model), firp_kernels.bind("reference"), predictor, offsets, 9).updater
    with FlopCounterMode(display=False) as counter:
        updater.scores(torch.randn(2, offsets, model.config.hidden_size), torch.tensor([4, 5]))
    draft = Draft(TREE, offsets, INSERTION, predictor.transition_rank, predictor.update_width, listed)
    work = update_work(model.config, draft, 2, 4)
    assert work.operations == counter.get_total_flops()
    head = (listed or 29) * model.config.hidden_size
    assert work.read == 4 * (predictor.update_inputs.numel() + predictor.update_outputs.numel() + head)
