"""Figures that are kept for a machine: what comes back, what is refused, and what an engine makes of them."""

import json
import os

import firp
import firp.tools.files
import pytest
import torch
from firp.drafting.choices import Choice, Rung, best_rung, choice_file, find_profile, load_choice, save_choice
from firp.drafting.profile import FILE_NAME, save_profile
from firp.engine.costs import Curves, StepClock
from firp.tools.hardware import machine_name
from models import tiny_model
from profiles import made_profile

NAME = "a machine"
PLAIN = Rung(firp.TreeConfig(1, 1), 1e-3, 1.0)
TREE = (4, 1, "dynamic")


def rung(num_nodes, num_lookahead, kind, milliseconds=1.25, tau=1.5):
    return Rung(firp.TreeConfig(num_nodes, num_lookahead, kind), 1e-3 * milliseconds, tau)


def choice(trees, num_offsets=2, head=None, made_by="firp tune"):
    batches = {size: (PLAIN, *(rung(*tree) for tree in some)) for size, some in trees.items()}
    return Choice(num_offsets, head, batches, made_by)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    # Tests run beside others: the machine is never steady.
    monkeypatch.setattr("firp.engine.automatic.STEADY", 1e4)
    monkeypatch.setattr("firp.engine.automatic._measured", {})
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def predictor(tmp_path, cache):
    """One with a profile beside it, loaded from its folder."""
    folder = tmp_path / "predictor"
    firp.FirpPredictor.for_model(tiny_model(0), 3, 2, num_nodes=8, num_lookahead=2).save_pretrained(folder)
    predictor = firp.load_predictor(folder)
    save_profile(folder / FILE_NAME, made_profile(tiny_model(0), predictor))
    return predictor


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
RUNG = {"num_nodes": 1, "num_lookahead": 1, "tree_kind": "dynamic", "step_ms": 1.0, "tau": 1.0}

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


def test_an_engine_decodes_with_the_kept_trees(predictor, capsys):
    model = tiny_model(0)
    made = choice({1: [(5, 2, "static")], 4: []}, head="two-pass")
    save_choice(choice_file(predictor), machine_name("cpu", torch.float64), made)
    engine = firp.Engine(model, predictor)
    assert engine.num_offsets == 2 and engine.rungs(1) == made.batches[1]
    assert engine.drafter(1).config == firp.TreeConfig(5, 2, "static") and engine.drafter(3) is None
    ids = torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    out = firp.generate(model, ids, engine=engine, **options)
    assert torch.equal(out.sequences, plain) and list(out.rungs) == list(made.batches[1])
    assert sum(out.rungs.values()) <= out.stats.steps and capsys.readouterr().err == ""
    asked = firp.Engine(model, predictor, firp.TreeConfig(3, 1))
    assert asked.num_offsets == 3 and asked.rungs(1) is None and asked.drafter(4).config == firp.TreeConfig(3, 1)


def test_a_machine_that_was_not_measured_is_measured_once(predictor, cache, capsys):
    model, ids = tiny_model(0), torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    for said in (1, 0):
        out = firp.generate(model, ids, predictor=predictor, max_new_tokens=30, do_sample=False)
        assert torch.equal(out, plain) and capsys.readouterr().err.count("timing decode steps of 1 seq") == said
    kept = load_choice(choice_file(predictor), machine_name("cpu", torch.float64))
    assert kept.made_by == "first use" and list(kept.batches) == [1] and kept.batches[1][0].tree.num_nodes == 1
    engine = firp.Engine(model, predictor)
    assert engine.rungs(1) == kept.batches[1] and len(engine.rungs(3)) >= 1
    assert "of 4 sequences" in capsys.readouterr().err
    both = load_choice(choice_file(predictor), machine_name("cpu", torch.float64))
    assert list(both.batches) == [1, 4] and both.num_offsets == kept.num_offsets


def test_a_damaged_file_is_named_and_measured_again(predictor, capsys):
    path = choice_file(predictor)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{broken")
    firp.Engine(tiny_model(0), predictor).rungs(1)
    said = capsys.readouterr().err
    assert f"{path}: not JSON" in said and "measuring again" in said
    assert load_choice(path, machine_name("cpu", torch.float64)) is not None
    save_choice(path, machine_name("cpu", torch.float64), choice({1: [TREE]}, num_offsets=7))
    firp.Engine(tiny_model(0), predictor).rungs(1)
    assert "num_offsets: got 7, expected at most 3; measuring again" in capsys.readouterr().err


def test_without_a_cache_folder_a_process_measures_once(predictor, cache, monkeypatch, capsys):
    cache.write_text("a file where the folder would be")
    for said in (1, 0):
        assert firp.Engine(tiny_model(0), predictor).rungs(1)[0].tree.num_nodes == 1
        assert capsys.readouterr().err.count("timing decode steps") == said
    assert cache.read_text() == "a file where the folder would be"


def test_a_profile_of_another_predictor_is_not_used(predictor, capsys):
    other = firp.FirpPredictor.for_model(tiny_model(0), 3, 1)
    save_profile(predictor.folder / FILE_NAME, made_profile(tiny_model(0), other))
    engine = firp.Engine(tiny_model(0), predictor)
    assert engine.rungs(1) is None and "is the profile of a predictor" in capsys.readouterr().err
    (predictor.folder / FILE_NAME).unlink()
    assert find_profile(predictor) is None
    assert firp.Engine(tiny_model(0), predictor).drafter(2).config == firp.TreeConfig(4, 1)


def test_figures_of_a_busy_machine_are_not_kept(predictor, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(StepClock, "seconds", lambda self, trees, k: taken.append(k) or [1e3] * len(trees))
    for _ in range(2):
        assert firp.Engine(tiny_model(0), predictor).rungs(1)[0].seconds == 1e3
    assert len(taken) == 3 and not choice_file(predictor).exists()


def test_estimates_go_up_with_rows_and_meet_what_was_timed():
    curves = Curves((1, 2, 4, 8), (1.0, 1.0, 2.0, 4.0), (0.5, 0.5, 1.0, 2.0))
    assert curves.step(firp.TreeConfig(2, 1), 2, below=1.0, shared_rows=16) == 1.0 + 1.0
    assert curves.step(firp.TreeConfig(4, 2), 2, below=0.5, shared_rows=16) == (2.0 + 4.0) / 2 + 2.0
    assert curves.step(firp.TreeConfig(4, 2), 2, below=0.5, shared_rows=3) == (2.0 + 4.0) / 2 + 1.0 + 0.5
    assert curves.step(firp.TreeConfig(3, 1), 3, below=0.0, shared_rows=16) == 3.0 + 1.5


def test_kept_trees_of_many_rows_have_room(predictor):
    model, ids = tiny_model(0), torch.tensor([[4, 5, 6]])
    made = choice({1: [(64, 64, "dynamic", 1.0, 3.0)]}, num_offsets=3)
    save_choice(choice_file(predictor), machine_name("cpu", torch.float64), made)
    engine = firp.Engine(model, predictor)
    assert engine.max_rows == 256 and engine.drafter(1).config == firp.TreeConfig(64, 64)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    assert torch.equal(firp.generate(model, ids, engine=engine, max_new_tokens=60, do_sample=False), plain)
    # Another process keeps larger trees for another batch size: this engine goes on with those that fit.
    larger = choice({1: [(64, 64, "dynamic", 1.0, 3.0)], 2: [(128, 64, "dynamic", 1.0, 3.0)]}, num_offsets=3)
    save_choice(choice_file(predictor), machine_name("cpu", torch.float64), larger)
    assert [rung.tree.num_nodes for rung in engine.rungs(2)] == [1]
