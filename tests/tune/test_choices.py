"""Figures that are kept for a machine: what comes back, what is refused, and what an engine makes of them."""

import json
import os

import firp
import firp.tools.files
import pytest
from firp.drafting.choices import (
    add_batches,
    best_rung,
    load_choice,
    save_choice,
)  # fmt: skip
from profiles import PLAIN, TREE, choice, rung

NAME = "a machine"


def test_a_choice_comes_back(tmp_path):
    made = choice({8: [(2, 1, "dynamic")], 1: [TREE, (16, 4, "static")], 32: []}, head="two-pass")
    save_choice(tmp_path / "a/b.json", NAME, made, context=70)
    assert load_choice(tmp_path / "a/b.json", NAME) == made
    assert load_choice(tmp_path / "a/b.json", "another machine") is None
    assert load_choice(tmp_path / "none.json", NAME) is None
    assert made.rungs(1) == made.batches[1] and made.rungs(2) == made.rungs(8) == made.batches[8]
    assert made.rungs(33) is None


def test_the_fastest_tree_has_to_pay():
    assert best_rung((PLAIN, rung(2, 1, "static", 1.2, 1.3), rung(4, 1, "static", 1.2, 1.5))).tau == 1.5
    assert best_rung((PLAIN, rung(2, 1, "static", 1.0, 1.02))) == PLAIN


def test_machines_are_kept_apart_and_a_new_choice_replaces_the_old(tmp_path):
    path = tmp_path / "a.json"
    for name, nodes in ((NAME, 4), ("other", 6), (NAME, 12)):
        save_choice(path, name, choice({1: [(nodes, 1, "dynamic")]}))
    for name, nodes in ((NAME, 12), ("other", 6)):
        assert load_choice(path, name).batches[1][1].tree.num_nodes == nodes


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    save_choice(path, NAME, choice({1: [TREE]}))
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(firp.tools.files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_choice(path, NAME, choice({1: [(8, 1, "dynamic")]}))
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


def changed(where, value):
    """A file whose entry has another value at a path of names."""
    document = {NAME: choice({1: [TREE], 4: [(2, 1, "dynamic")]}).as_document()}
    *path, last = [NAME, *where]
    fields = document
    for name in path:
        fields = fields[name]
    fields[last] = value
    return json.dumps(document).encode()


WHOLE = changed(["head"], None)
RUNG = {"num_nodes": 1, "num_lookahead": 1, "tree_kind": "dynamic", "step_ms": 1.0, "tau": 1.0, "branch_ms": []}

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
    "an infinite figure": (changed(["batches", "4", 1, "tau"], float("inf")), "Out of range float values"),
    "an empty entry": (changed([], {}), "batches: got None, expected an object"),
    "an entry of null": (changed([], None), "got None, expected an object"),
    "an entry of a number": (changed([], 3), "got 3, expected an object"),
    "no batches": (changed(["batches"], {}), "batches: got none, expected at least one"),
    "batches in a list": (changed(["batches"], [RUNG]), "batches: got ["),
    "rungs of numbers": (changed(["batches", "4"], [4, 1]), "batches: 4: got [4, 1], expected a list of objects"),
    "no rungs": (changed(["batches", "4"], []), "expected plain decoding (num_nodes 1) first, and once"),
    "plain twice": (changed(["batches", "4"], [RUNG, RUNG]), "expected plain decoding (num_nodes 1) first, and once"),
    "no times of a branch": (WHOLE.replace(b'"branch_ms"', b'"branch"'), "branch_ms: got None, expected a list"),
    "a branch of a word": (changed(["batches", "4", 1, "branch_ms"], ["x"]), "branch_ms: got ['x'], expected up to 8"),
    "a branch before its step": (changed(["batches", "4", 1, "branch_ms"], [-1.0]), "branch_ms: got [-1.0], expected"),
    "a branch of ages": (changed(["batches", "4", 1, "branch_ms"], [10**400]), "branch_ms: got [1000"),
    "a step of ages": (changed(["batches", "4", 1, "step_ms"], 10**400), "step_ms: got 1000"),
    "a long branch": (changed(["batches", "4", 1, "branch_ms"], [1.0] * 9), "expected up to 8 numbers of at least 0"),
    "no maker": (WHOLE.replace(b'"made_by": "firp tune"', b'"made_by": null'), "made_by: got None"),
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
    "huge offsets": (changed(["num_offsets"], 10**40), "num_offsets: got 1000"),
    "offsets as a string": (changed(["num_offsets"], "2"), "num_offsets: got '2', expected an integer"),
    "offsets as a fraction": (changed(["num_offsets"], 2.5), "num_offsets: got 2.5, expected an integer"),
    "offsets as a boolean": (changed(["num_offsets"], True), "num_offsets: got True, expected an integer"),
    **{
        f"a batch size of {key!r}": (changed(["batches", key], [RUNG]), "batches: got batch size ")
        for key in ("0", "-1", "1.0", " 2", "+2", "2_0", "", "many", "\u0663", "9" * 30, "9" * 5000)
    },
    **{
        f"{name} of {value!r}": (changed(["batches", "4", 1, name], value), f"{name}: got ")
        for name, values in {
            "num_nodes": (0, -4, 257, 10**12, 2.0, "4", None, True, [4]),
            "num_lookahead": (0, 3, -1, 10**12, 1.5, "1", None, False),
            "tree_kind": ("bush", "", None, 1, ["dynamic"]),
            "step_ms": (0, -1.0, None, "1", True, [1]),
            "tau": (0, -1.0, None, "1", True, [1]),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_choice(path, NAME)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and message in said and len(said) < 600


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to(path.with_name("nowhere"))])
def test_a_name_without_a_file_is_named(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json: cannot be read: "):
        load_choice(tmp_path / "a.json", NAME)


def test_sizes_that_other_processes_kept_stay(tmp_path):
    path, first = tmp_path / "a.json", choice({1: [TREE], 4: [TREE]}, made_by="firp tune")
    save_choice(path, NAME, first, prompts="mine.jsonl")
    add_batches(path, NAME, choice({4: [], 8: [(2, 1, "dynamic")]}, made_by="first use"))
    kept = load_choice(path, NAME)
    assert list(kept.batches) == [1, 4, 8] and kept.batches[4] == first.batches[4] and kept.made_by == "firp tune"
    assert json.loads(path.read_text())[NAME]["prompts"] == "mine.jsonl"
    add_batches(path, NAME, choice({16: []}, num_offsets=1))
    assert load_choice(path, NAME) == kept, "of another k nothing is added"
    path.write_bytes(b"{broken")
    add_batches(path, NAME, first)
    assert load_choice(path, NAME) == first
    path.write_text(json.dumps({NAME: {"num_offsets": 0}}))
    add_batches(path, NAME, first)
    assert load_choice(path, NAME) == first
