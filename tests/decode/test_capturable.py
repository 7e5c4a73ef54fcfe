"""No step reads a value or copies between host and device, for any model, tree, chooser and head."""

from collections import Counter

import firp
import pytest
import torch
from accelerator import watch_step
from firp.engine.graphs import STEP_OPS
from firp.sampling.choosers import Vectorised
from firp.sampling.processors import ON_DEVICE
from firp.sampling.typical import Typical, TypicalAcceptance
from models import EXPERTS, FAMILIES, tiny_model, tiny_predictor, update_predictor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from firp_kernels import ops, registry

TREE = firp.TreeConfig(8, 3)
WAITS = (DataDependentOutputException, DynamicOutputShapeException)
WITH_EXPERTS = sorted(name for name, (_, extra) in FAMILIES.items() if EXPERTS.items() <= extra.items())


def step(monkeypatch, family="llama", tree=TREE, dtype=torch.float32, experts=None, make=tiny_predictor, **options):
    model = tiny_model(1, family, vocab=50, dtype=dtype)
    if experts is not None:
        model.set_experts_implementation(experts)
    return watch_step(monkeypatch, model, None if tree is None else make(model, 1), tree, **options)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(WITH_EXPERTS)))
def test_every_family(monkeypatch, family):
    assert not step(monkeypatch, family).faults


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_families_with_experts(monkeypatch, family, experts):
    assert not step(monkeypatch, family, dtype=torch.bfloat16, experts=experts).faults


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_eager_experts_read_values(monkeypatch, family):
    """Which is why an engine names them before a capture."""
    with pytest.raises(WAITS):
        step(monkeypatch, family, experts="eager")


@pytest.mark.parametrize(
    ("tree", "options"),
    [
        (firp.TreeConfig(8, 3, "static"), {"again": True}),
        (firp.TreeConfig(33, 33), {"head": "one-pass"}),
        (firp.TreeConfig(33, 33), {"head": "two-pass"}),
        (firp.TreeConfig(1, 1), {}),
        (TREE, {"batch_size": 1}),
        (TREE, {"drafted": False}),
        (None, {}),
        (TREE, {"looks_up": True}),
        (None, {"looks_up": True}),
    ],
    ids=[
        "static",
        "one pass",
        "two passes",
        "root alone",
        "one sequence",
        "first step",
        "plain",
        "a branch",
        "text alone",
    ],
)
def test_every_tree_and_head(monkeypatch, tree, options):
    assert not step(monkeypatch, tree=tree, **options).faults


@pytest.mark.parametrize("tree", [TREE, firp.TreeConfig(8, 3, "static"), firp.TreeConfig(33, 33)], ids=str)
def test_a_transition_with_a_context(monkeypatch, tree):
    again = tree.kind == "static"  # whose shape is made once
    assert not step(monkeypatch, tree=tree, make=update_predictor, again=again).faults


PROCESSORS = {
    hf.TemperatureLogitsWarper: (0.9,),
    hf.TopKLogitsWarper: (20,),
    hf.TopPLogitsWarper: (0.9,),
    hf.MinPLogitsWarper: (0.01,),
    hf.TypicalLogitsWarper: (0.9,),
    hf.EpsilonLogitsWarper: (0.01,),
    hf.InfNanRemoveLogitsProcessor: (),
    hf.LogitNormalization: (),
}


def sampling(*kinds, rule=None, seed=11):
    """A chooser of an engine, over processors of these kinds."""

    def choose(engine):
        processors = LogitsProcessorList([kind(*PROCESSORS[kind]) for kind in kinds])
        arguments = (engine.ops, processors, seed, None, [0, 0])
        chooser = Vectorised(*arguments) if rule is None else Typical(rule, *arguments)
        assert chooser.on_device
        return chooser

    return choose


def test_every_processor_on_the_device_is_tried():
    assert set(PROCESSORS) == set(ON_DEVICE)


@pytest.mark.parametrize("kind", sorted(PROCESSORS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", [None, 11], ids=["argmax", "sampling"])
def test_every_processor(monkeypatch, kind, seed):
    assert not step(monkeypatch, choose=sampling(kind, seed=seed)).faults


@pytest.mark.parametrize("rule", [None, TypicalAcceptance()], ids=["exact", "typical"])
@pytest.mark.parametrize("tree", [TREE, None], ids=["firp", "plain"])
def test_all_processors_together(monkeypatch, tree, rule):
    if tree is not None or rule is None:
        assert not step(monkeypatch, tree=tree, choose=sampling(*PROCESSORS, rule=rule)).faults


def test_every_op_of_a_step_is_listed(monkeypatch):
    steps = [
        step(monkeypatch, choose=sampling(hf.TopPLogitsWarper), looks_up=True),
        step(monkeypatch, impl={"write_cache": "reference"}),
    ]
    assert set().union(*(watch.ops for watch in steps)) | {"write_cache"} == set(STEP_OPS)


@pytest.mark.parametrize("op", sorted(STEP_OPS))
def test_which_references_wait_is_known(monkeypatch, op):
    """What runs an op on a GPU where no kernel does, tried alone."""
    module, bound = getattr(ops, op), registry.bound
    serves = getattr(module, "fallback", module.reference)
    monkeypatch.setattr(registry, "bound", lambda name, impl: serves if name == op else bound(name, impl))
    if STEP_OPS[op]:
        with pytest.raises(WAITS):
            step(monkeypatch, impl={op: "reference"})
    else:
        named = {"looks_up": "reference"} if op == "lookup_branch" else {"impl": {op: "reference"}}
        assert not step(monkeypatch, **named).faults


# Kernels beside the layers, at most. An op of the package counts as one.
LAUNCHES = {"plain": 10, "one pass": 14, "two passes": 19, "sampling": 81}


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_step_launches_few_kernels_beside_the_layers(monkeypatch, case):
    tree = {"plain": None, "two passes": firp.TreeConfig(33, 33)}.get(case, firp.TreeConfig(16, 4))
    head = {"one pass": "one-pass", "two passes": "two-pass"}.get(case)
    choose = (
        sampling(hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper) if case == "sampling" else None
    )
    options = {"tree": tree, "head": head, "choose": choose, "batch_size": 1, "dtype": torch.bfloat16}
    watch = step(monkeypatch, **options)
    assert watch.beside_layers() <= LAUNCHES[case]
    assert step(monkeypatch, looks_up=True, **options).beside_layers() == watch.beside_layers() + 1


def test_a_plain_layer_launches_few_kernels(monkeypatch):
    """Four products and attention, which rotates; the rest are norms, sums and the gate, which compiled layers fuse."""
    monkeypatch.setattr("firp.decoder.joint_linears._joinable", lambda *linears: True)
    monkeypatch.setattr("firp.decoder.joint_linears.available_memory", lambda device: 1 << 60)
    layers = Counter()
    for (where, name), count in step(monkeypatch, tree=None, batch_size=1, dtype=torch.bfloat16).launched.items():
        layers[name.split(".")[1]] += count if where == "layers" else 0
    fusable = {"add", "mul", "mean", "pow", "rsqrt", "silu", "_to_copy"}
    unfused = {name: count for name, count in layers.items() if count and name not in fusable}
    assert unfused == {"mm": 4 * 4, "write_and_attend": 4}
    assert sum(layers.values()) == 4 * 25


@pytest.mark.parametrize(("batch_size", "head"), [(1, "one-pass"), (2, "two-pass")])
def test_up_to_192_rows_of_a_step_share_the_heads_pass(monkeypatch, batch_size, head):
    """132 rows a sequence: 33 nodes and 3 pseudo rows for each."""
    options = {"tree": firp.TreeConfig(33, 33), "batch_size": batch_size}
    assert step(monkeypatch, **options).launched == step(monkeypatch, head=head, **options).launched
