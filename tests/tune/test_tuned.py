"""tuned.json: what is kept beside a predictor, and what decoding takes from it."""

import json
import os

import firp
import firp.tools.files
import pytest
import torch
from firp.drafting.tuned import FILE_NAME, load_tuned, machine, own_tree, save_tuned
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
    save_tuned(
        predictor.folder,
        NAME,
        entry({8: (2, 1, "dynamic"), 1: (16, 4, "static"), 32: (1, 1, "dynamic")}, head="two-pass"),
    )
    tuned, tree, head = own_tree(predictor, "cpu", torch.float32)
    assert (
        tuned.num_offsets == 2
        and head == "two-pass"
        and (tree.num_nodes, tree.num_lookahead, tree.kind) == (16, 4, "static")
    )
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

    monkeypatch.setattr(firp.tools.files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_tuned(predictor.folder, NAME, entry({1: (8, 1, "dynamic")}))
    monkeypatch.undo()
    assert path.read_bytes() == before and sorted(os.listdir(predictor.folder)).count(FILE_NAME) == 1
    assert not [name for name in os.listdir(predictor.folder) if name.startswith(".") and FILE_NAME in name]


def changed(where, value):
    """A file whose entry has another value at a path of names."""
    document = {NAME: entry({1: (4, 1, "dynamic"), 4: (2, 1, "dynamic")})}
    *path, last = [NAME, *where]
    fields = document
    for name in path:
        fields = fields[name]
    fields[last] = value
    return json.dumps(document).encode()


WHOLE = changed(["head"], None)
TREE = {"num_nodes": 4, "num_lookahead": 1, "tree_kind": "dynamic"}

# case -> (the file, what the error says of it)
DAMAGED = {
    "broken": (b"{broken", "not JSON"),
    "empty": (b"", "not JSON"),
    "half written": (WHOLE[:70], "not JSON"),
    "a list": (b"[1]", "got list, expected an object"),
    "nested brackets": (b"[" * 100_000, "nested too deeply"),
    "nested in another machine's entry": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "binary": (bytes(range(128, 256)), "not UTF-8 text"),
    "zeros": (b"\0" * 100, "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + WHOLE, "Unexpected UTF-8 BOM"),
    "20 MB": (b" " * (20 << 20) + WHOLE, "got more than 16777216 bytes"),
    "a machine twice": (b'{"x": {}, "x": {}}', "x: got it twice"),
    "a field twice": (WHOLE.replace(b'"head"', b'"head": null, "head"'), "head: got it twice"),
    "a lone surrogate": (b'{"\\ud800": 1}', "lone surrogate"),
    "an infinite figure": (changed(["tau"], float("inf")), "Out of range float values"),
    "an empty entry": (changed([], {}), "trees: got None, expected an object"),
    "an entry of null": (changed([], None), "got None, expected an object"),
    "an entry of a number": (changed([], 3), "got 3, expected an object"),
    "no trees": (changed(["trees"], {}), "trees: got none, expected at least one"),
    "trees in a list": (changed(["trees"], [TREE]), "trees: got ["),
    "a tree of a list": (changed(["trees", "4"], [4, 1]), "4: got [4, 1], expected an object"),
    "no head": (
        WHOLE.replace(b'"head": null, ', b""),
        "head: got 'nothing', expected one of one-pass, two-pass, or null",
    ),
    "an unknown head": (
        changed(["head"], "three-pass"),
        "head: got 'three-pass', expected one of one-pass, two-pass, or null",
    ),
    "a head of a list": (changed(["head"], ["one-pass"]), "head: got ['one-pass']"),
    "a false head": (changed(["head"], False), "head: got False"),
    "no offsets": (changed(["num_offsets"], 0), "num_offsets: got 0, expected 1..256"),
    "negative offsets": (changed(["num_offsets"], -2), "num_offsets: got -2, expected 1..256"),
    "more offsets than the predictor's": (changed(["num_offsets"], 7), "was tuned for 7 offsets"),
    "huge offsets": (changed(["num_offsets"], 10**40), "num_offsets: got 1000"),
    "offsets as a string": (changed(["num_offsets"], "2"), "num_offsets: got '2', expected an integer"),
    "offsets as a fraction": (changed(["num_offsets"], 2.5), "num_offsets: got 2.5, expected an integer"),
    "offsets as a boolean": (changed(["num_offsets"], True), "num_offsets: got True, expected an integer"),
    **{
        f"a batch size of {key!r}": (changed(["trees", key], TREE), "trees: got batch size ")
        for key in ("0", "-1", "1.0", " 2", "+2", "2_0", "", "many", "\u0663", "9" * 30, "9" * 5000)
    },
    **{
        f"{name} of {value!r}": (changed(["trees", "4", name], value), f"{name}: got ")
        for name, values in {
            "num_nodes": (0, -4, 257, 10**12, 2.0, "4", None, True, [4]),
            "num_lookahead": (0, 3, -1, 10**12, 1.5, "1", None, False),
            "tree_kind": ("bush", "", None, 1, ["dynamic"]),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(predictor, case):
    content, message = DAMAGED[case]
    path = predictor.folder / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        own_tree(predictor, "cpu", torch.float32)
    said = str(caught.value)
    assert said.startswith(f"tuned.json: {path}") and message in said and said.endswith("run `firp tune` again")
    assert len(said) < 600


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to(path.with_name("nowhere"))])
def test_a_name_without_a_file_is_named(predictor, make):
    make(predictor.folder / FILE_NAME)
    with pytest.raises(ValueError, match=r"^tuned\.json: .*cannot be read: .*firp tune"):
        own_tree(predictor, "cpu", torch.float32)


def test_another_tuning_does_not_replace_a_damaged_file(predictor):
    path = predictor.folder / FILE_NAME
    path.write_bytes(WHOLE[:70])
    with pytest.raises(ValueError, match=r"^tuned\.json: .*not JSON"):
        save_tuned(predictor.folder, NAME, entry({1: (4, 1, "dynamic")}))
    assert path.read_bytes() == WHOLE[:70]


def test_an_engine_decodes_with_the_tuned_tree(predictor):
    model = tiny_model(0)
    save_tuned(
        predictor.folder,
        machine("cpu", torch.float64),
        entry({1: (5, 2, "static"), 4: (1, 1, "dynamic")}, head="two-pass"),
    )
    engine = firp.Engine(model, firp.load_predictor(predictor.folder))
    assert engine.num_offsets == 2 and engine.head == "two-pass"
    assert engine.drafter(1).config == firp.TreeConfig(5, 2, "static") and engine.drafter(3) is None
    ids = torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(firp.generate(model, ids, engine=engine, max_new_tokens=20, do_sample=False), plain)
    asked = firp.Engine(model, firp.load_predictor(predictor.folder), firp.TreeConfig(3, 1))
    assert asked.num_offsets == 3 and asked.head is None and asked.drafter(4).config == firp.TreeConfig(3, 1)
