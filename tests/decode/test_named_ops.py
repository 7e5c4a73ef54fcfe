"""An op that is named is run, in prefill too, or refused by name."""

from collections import Counter

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor

from firp_kernels import ops, registry

IDS = torch.tensor([[4, 9, 6, 10, 5]])


def named(monkeypatch, model, name, drafts=True):
    """Calls of op `name` by an engine that runs it by name, or the refusal."""
    calls, bound = Counter(), registry.bound

    def counted(op, impl):
        function = bound(op, impl)
        if impl is None:
            return function

        def call(*args):
            calls[op] += 1
            return function(*args)

        return call

    monkeypatch.setattr(registry, "bound", counted)
    predictor = tiny_predictor(model, 1) if drafts else None
    try:
        engine = firp.Engine(model, predictor, firp.TreeConfig(8, 3) if drafts else None, impl={name: "reference"})
    except ValueError as error:
        return str(error)
    firp.generate(model, IDS, engine=engine, max_new_tokens=8, do_sample=False)
    return calls[name]


DTYPES = torch.float32, torch.float64, torch.bfloat16
ONE_DTYPE = {"mistral": torch.float64, "qwen2": torch.bfloat16, "qwen3": torch.float32, "gemma": torch.bfloat16}


@pytest.mark.parametrize("drafts", [True, False], ids=["firp", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", *ONE_DTYPE])
def test_a_named_op_is_run_or_refused(monkeypatch, pytestconfig, family, dtype, drafts):
    """llama in every dtype, any other family in one; all in all with --exhaustive."""
    if ONE_DTYPE.get(family, dtype) != dtype and not pytestconfig.getoption("exhaustive"):
        pytest.skip("--exhaustive")
    for name in ops.SCHEMAS:
        with monkeypatch.context() as patch:
            found = named(patch, tiny_model(1, family, vocab=11, dtype=dtype), name, drafts)
        if isinstance(found, str):
            assert found.startswith(f"impl: got {name!r}, expected ops that this engine runs: "), found
        else:
            assert found > 0, name


def test_what_a_step_is_made_of_is_never_refused(monkeypatch):
    model = tiny_model(1, vocab=11)
    for name in ("write_cache", "tree_attention", "write_and_attend", "verify_tree", "emit_tokens", "draft_tree"):
        with monkeypatch.context() as patch:
            assert named(patch, model, name) > 0


def test_naming_one_op_changes_no_other():
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    usual = firp.Engine(model)._step.prefill_attention is None
    assert (firp.Engine(model, impl={"emit_tokens": "reference"})._step.prefill_attention is None) == usual
    assert firp.Engine(model, impl={"tree_attention": "reference"})._step.prefill_attention is None


def test_a_whole_and_its_part_are_not_named_together():
    with pytest.raises(ValueError, match="impl: got 'write_cache' beside 'write_and_attend'"):
        firp.Engine(tiny_model(1), impl={"write_cache": "reference", "write_and_attend": "reference"})


def test_a_static_tree_refuses_the_op_that_grows_trees():
    model, tree = tiny_model(1), firp.TreeConfig(8, 3, "static")
    with pytest.raises(ValueError, match="impl: got 'draft_tree', expected ops that this engine runs"):
        firp.Engine(model, tiny_predictor(model, 1), tree, impl={"draft_tree": "reference"})
