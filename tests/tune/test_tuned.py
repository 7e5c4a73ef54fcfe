"""tuned.json: what is kept beside a predictor, and what decoding takes from it."""

import json
import os

import firp
import firp.files
import pytest
import torch
from firp.tuned import FILE_NAME, load_tuned, machine, own_tree, save_tuned
from models import tiny_model

NAME = machine("cpu", torch.float32)


def entry(trees, num_offsets=2, head=None):
    return {
        "num_offsets": num_offsets,
        "head": head,
        "trees": {
            str(size): {"num_nodes": n, "num_lookahead": p, "tree_kind": kind} for size, (n, p, kind) in trees.items()
        },
    }


@pytest.fixture
def predictor(tmp_path):
    firp.FirpPredictor.for_model(tiny_model(0), 3, 2, num_nodes=8, num_lookahead=2).save_pretrained(tmp_path)
    return firp.load_predictor(tmp_path)


def test_an_untuned_predictor_keeps_its_own_tree(predictor):
    assert own_tree(predictor, "cpu", torch.float32) == (predictor, firp.TreeConfig(8, 2), None)
    save_tuned(predictor.folder, "another machine", entry({1: (4, 1, "static")}))
    assert own_tree(predictor, "cpu", torch.float32)[1] == firp.TreeConfig(8, 2)
    assert own_tree(firp.FirpPredictor.for_model(tiny_model(0), 3, 2), "cpu", torch.float32)[1] == firp.TreeConfig(8, 2)


def test_a_tuned_machine_gets_its_trees(predictor):
    save_tuned(predictor.folder, NAME, entry({8: (2, 1, "dynamic"), 1: (16, 4, "static"), 32: (1, 1, "dynamic")}, head="two-pass"))
    tuned, tree, head = own_tree(predictor, "cpu", torch.float32)
    assert tuned.num_offsets == 2 and head == "two-pass" and (tree.num_nodes, tree.num_lookahead, tree.kind) == (16, 4, "static")
    assert tree.for_batch(1) == firp.TreeConfig(16, 4, "static")
    assert tree.for_batch(2) == tree.for_batch(8) == firp.TreeConfig(2, 1)
    assert tree.for_batch(9) == tree.for_batch(100) == firp.TreeConfig(1, 1)
    assert own_tree(predictor, "cpu", torch.bfloat16)[1] == firp.TreeConfig(8, 2)


def test_beyond_the_largest_batch_the_tree_shrinks(predictor):
    save_tuned(predictor.folder, NAME, entry({1: (16, 4, "dynamic"), 4: (9, 3, "dynamic")}))
    tree = own_tree(predictor, "cpu", torch.float32)[1]
    assert tree.for_batch(4) == firp.TreeConfig(9, 3) and tree.for_batch(5) == firp.TreeConfig(4, 1)
    rows = [tree.for_batch(size).num_nodes for size in range(1, 40)]
    assert rows == sorted(rows, reverse=True)


def test_machines_are_kept_apart_and_a_new_tuning_replaces_the_old(predictor):
    for name, nodes in ((NAME, 4), ("other", 6), (NAME, 12)):
        save_tuned(predictor.folder, name, entry({1: (nodes, 1, "dynamic")}))
    assert load_tuned(predictor.folder, NAME).tree.num_nodes == 12
    assert load_tuned(predictor.folder, "other").tree.num_nodes == 6


def test_an_interrupted_write_leaves_the_old_file(predictor, monkeypatch):
    path = save_tuned(predictor.folder, NAME, entry({1: (4, 1, "dynamic")}))
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(firp.files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_tuned(predictor.folder, NAME, entry({1: (8, 1, "dynamic")}))
    monkeypatch.undo()
    assert path.read_bytes() == before and sorted(os.listdir(predictor.folder)).count(FILE_NAME) == 1
    assert not [name for name in os.listdir(predictor.folder) if name.startswith(".") and FILE_NAME in name]


@pytest.mark.parametrize(
    "text",
    ["{broken", "[1]", json.dumps({NAME: {}}), json.dumps({NAME: {"num_offsets": 2, "trees": {}}}), json.dumps({NAME: 3})]
    + [json.dumps({NAME: entry({1: (n, p, kind)})}) for n, p, kind in ((0, 1, "dynamic"), (4, 9, "dynamic"), (4, 1, "bush"))]
    + [json.dumps({NAME: entry({1: (4, 1, "dynamic")}, num_offsets=k)}) for k in (0, 7)]
)
def test_a_damaged_file_is_named(predictor, text):
    (predictor.folder / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"^tuned\.json: .*firp tune"):
        own_tree(predictor, "cpu", torch.float32)


def test_an_engine_decodes_with_the_tuned_tree(predictor):
    model = tiny_model(0)
    save_tuned(predictor.folder, machine("cpu", torch.float64), entry({1: (5, 2, "static"), 4: (1, 1, "dynamic")}, head="two-pass"))
    engine = firp.Engine(model, firp.load_predictor(predictor.folder))
    assert engine.num_offsets == 2 and engine.head == "two-pass"
    assert engine.drafter(1).config == firp.TreeConfig(5, 2, "static") and engine.drafter(3) is None
    ids = torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(firp.generate(model, ids, engine=engine, max_new_tokens=20, do_sample=False), plain)
    asked = firp.Engine(model, firp.load_predictor(predictor.folder), firp.TreeConfig(3, 1))
    assert asked.num_offsets == 3 and asked.head is None and asked.drafter(4).config == firp.TreeConfig(3, 1)
