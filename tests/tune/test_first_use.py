"""What an engine makes of kept figures, and that it times its steps once where there are none."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import firp
import firp.tools.files
import numpy as np
import pytest
import torch
from firp.drafting.choices import (
    choice_file,
    find_profile,
    load_choice,
    load_choices,
    save_choice,
)  # fmt: skip
from firp.drafting.lookup import MOST_BRANCH
from firp.drafting.profile import FILE_NAME, AcceptanceProfile, save_profile
from firp.engine.automatic import ATTEMPTS, MOST_SECONDS, TRUSTED, smoothed
from firp.engine.costs import FEW_ROWS, ROWS, Curves, StepClock, typical
from firp.engine.plans import Estimate, Plan, Planner
from firp.tools.hardware import machine_name
from models import tiny_model
from profiles import TREE, choice, made_profile


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


def test_threads_that_come_together_measure_once(predictor, capsys):
    model, ids = tiny_model(0), torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    engine, together = firp.Engine(model, predictor), Barrier(2)

    def call(_):
        together.wait()
        return firp.generate(model, ids, engine=engine, max_new_tokens=30, do_sample=False)

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(out, plain) for out in pool.map(call, range(2)))
    assert capsys.readouterr().err.count("timing decode steps") == 1


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
    monkeypatch.setattr("firp.engine.plans.NEAR", 2.0)
    monkeypatch.setitem(MOST_SECONDS, "cpu", 1e9)
    monkeypatch.setattr(StepClock, "seconds", lambda self, trees: taken.append(trees) or [1e9] * len(trees))
    for _ in range(2):
        assert firp.Engine(tiny_model(0), predictor).rungs(1)[0].seconds == 1e9
    assert len(taken) == 2 * ATTEMPTS and not choice_file(predictor).exists()


class SlowModel:
    """Whose steps take seconds that a test sets, on a clock of their own."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.now, self.rows = seconds, 0.0, []
        for name in ("costs", "automatic"):
            monkeypatch.setattr(f"firp.engine.{name}.time", self)
        monkeypatch.setattr(StepClock, "_rows", self.time_rows)

    def perf_counter(self):
        return self.now

    def time_rows(self, step, state, rows):
        self.rows.append(rows)
        self.now += self.seconds(rows)
        return [0.8 * self.seconds(rows), 0.2 * self.seconds(rows)]

    def count(self, engine):
        """Let whole steps of an engine take their time too."""
        take, below = engine.runner.step, engine.predictor.insertion_layer / engine.predictor.num_layers

        def step(step, state, choose):
            nodes, lookahead = state.tree.size
            rows = nodes + lookahead * step.num_offsets
            self.now += 0.8 * below * (self.seconds(nodes) - self.seconds(rows)) + self.seconds(rows)
            return take(step, state, choose)

        engine.runner.step = step
        return engine


@pytest.mark.parametrize("least", [0.001, 0.02, 0.06, 0.15, 0.4, 1.5])
@pytest.mark.parametrize("per_row", [0.0, 0.02, 0.3])
def test_a_call_waits_no_longer_than_it_may(predictor, monkeypatch, least, per_row):
    """Three seconds, or as long as four numbers of rows take on a model whose steps take longer than a fraction."""
    model = SlowModel(monkeypatch, lambda rows: least * (1 + per_row * rows))
    rungs = model.count(firp.Engine(tiny_model(0), predictor)).rungs(1)
    few = sum(map(model.seconds, (1, 1, *FEW_ROWS[:3])))
    assert model.now <= max(MOST_SECONDS["cpu"], few)
    assert rungs[0].seconds == pytest.approx(model.seconds(1))
    assert (max(model.rows) == ROWS[-1]) or per_row or least > 0.1
    if not per_row:
        assert len(rungs) > 1, "steps that cost the same are worth their drafts"


def test_no_attempt_is_begun_that_would_take_too_long(predictor, monkeypatch):
    """Whole steps that take ten times what their rows do: not steady, timed twice and not kept."""
    model = SlowModel(monkeypatch, lambda rows: 0.02)
    engine = model.count(firp.Engine(tiny_model(0), predictor))
    monkeypatch.setattr("firp.engine.automatic.STEADY", 1.5)
    monkeypatch.setattr(
        StepClock, "seconds", lambda self, trees: setattr(model, "now", model.now + 0.8) or [0.2] * len(trees)
    )
    assert engine.rungs(1)[0].seconds == pytest.approx(0.2)
    assert model.now <= MOST_SECONDS["cpu"] and not choice_file(predictor).exists()


def test_figures_of_shared_cores_are_not_kept(predictor, monkeypatch, capsys):
    monkeypatch.setattr("firp.engine.automatic.PREEMPTIONS", -1)
    for said in (1, 0):
        firp.Engine(tiny_model(0), predictor).rungs(1)
        assert capsys.readouterr().err.count("the machine is busy") == said
    assert not choice_file(predictor).exists()


@pytest.mark.parametrize("faster", [True, False])
def test_trees_of_another_k_are_timed_beside_the_first(predictor, monkeypatch, faster):
    """Where estimates are near, whole steps decide: those of the other k take a tenth, or ten times."""
    asked = []

    def seconds(self, trees):
        asked.append(trees)
        return [(0.1 if faster else 10.0) if tree is not None and k != asked[0][0][1] else 1.0 for tree, k in trees]

    monkeypatch.setattr("firp.engine.plans.NEAR", 0.0)
    monkeypatch.setattr(StepClock, "curves", lambda self, *_: Curves((1, 64), (0.01, 0.01), (0.001, 0.001)))
    monkeypatch.setattr(StepClock, "seconds", seconds)
    engine = firp.Engine(tiny_model(0), predictor)
    engine.rungs(1)
    assert len({k for _, k in asked[0]}) == predictor.num_offsets and asked[0][0][0] is None
    assert (engine.num_offsets != asked[0][0][1]) == faster
    assert [{k for _, k in trees} for trees in asked[1:]] == [{engine.num_offsets}]


@pytest.mark.parametrize("better, expected", [(1.005, 1), (1.02, 2)])
def test_a_larger_k_has_to_be_faster(predictor, monkeypatch, better, expected):
    """In whichever order the estimates put the two."""
    monkeypatch.setattr("firp.engine.plans.NEAR", 0.0)
    monkeypatch.setattr(Planner, "tau", lambda self, tree, k: better**k if tree.num_nodes > 1 else 1.0)
    monkeypatch.setattr(StepClock, "seconds", lambda self, trees: [1.0] * len(trees))
    for first, second in ((1, 2), (2, 1)):
        even = [Estimate(0.1, ()), Estimate(0.1, ())]
        plans = [Plan(k, [firp.TreeConfig(2, 1)], even) for k in (first, second)]
        monkeypatch.setattr(Planner, "plans", lambda self, clock, offsets, plans=plans: plans)
        automatic = firp.Engine(tiny_model(0), predictor)._trees.automatic
        assert automatic._measure(1, None, None).num_offsets == expected


def test_a_tree_counts_half_by_what_its_rows_let_expect():
    """All whole steps add half, and one tree met a slow moment. What is far from its estimate is believed."""
    expected = [1.0, 2.0, 4.0, 4.0, 8.0]
    found = smoothed([1.5, 3.0, 6.0, 6.0 * 1.04**2, 24.0], expected)
    assert found == pytest.approx([1.5, 3.0, 6.0, 6.0 * 1.04, 24.0 / TRUSTED])
    assert smoothed([1.5, 3.0], []) == [1.5, 3.0] and smoothed([], expected[:0]) == []


def test_a_step_counts_by_its_share_of_a_turn():
    """The machine is twice as slow in half of the turns, and one step meets a moment of its own."""
    steps = np.array([1.0, 1.3, 1.7])
    pace = np.array([1.0, 2.0, 1.0, 2.0, 1.0])
    assert typical(pace[:, None] * steps) == pytest.approx(steps)
    taken = pace[:, None] * steps
    taken[1, 2] *= 8  # the others look cheaper in that turn alone
    assert typical(taken) == pytest.approx(steps)
    assert typical(np.array([[3.0], [1.0], [2.0]])) == pytest.approx([2.0])


def test_a_batch_drafts_only_where_its_slowest_answer_gains(predictor, monkeypatch):
    """Steps take 1.2 times a plain one; a single sequence keeps such a tree, as a text may be easy."""
    monkeypatch.setattr(Planner, "plans", lambda self, *_: [Plan(1, [firp.TreeConfig(2, 1)], [])])
    monkeypatch.setattr(StepClock, "seconds", lambda self, trees: [1.0, 1.2])
    for worth, trees in ((1.23, [1]), (1.24, [1, 2])):
        monkeypatch.setattr(AcceptanceProfile, "batch_tau", lambda self, *_, worth=worth: worth)
        automatic = firp.Engine(tiny_model(0), predictor)._trees.automatic
        monkeypatch.setattr(automatic.planner, "tau", lambda tree, k: 1.9 if tree.num_nodes > 1 else 1.0)
        for batch_size, expected in ((1, [1, 2]), (2, trees)):
            rungs = automatic._measure(batch_size, None, None).rungs
            assert [rung.tree.num_nodes for rung in rungs] == expected


def test_a_branch_adds_what_its_rows_take():
    curves = Curves((1, 2, 4, 8), (1.0, 1.0, 2.0, 4.0), (0.5, 0.5, 1.0, 2.0))
    branch = curves.branch(firp.TreeConfig(1, 1), 0, below=0.5)
    assert branch[:3] == (0.0, 0.75, 1.5) and branch[6] == 4.5 and branch[7] == pytest.approx(4.5 + 4.5 / 7)
    assert curves.branch(firp.TreeConfig(2, 1), 2, below=1.0)[1] == 1.0 + 0.5


def test_estimates_go_up_with_rows_and_meet_what_was_timed(monkeypatch):
    curves = Curves((1, 2, 4, 8), (1.0, 1.0, 2.0, 4.0), (0.5, 0.5, 1.0, 2.0))
    assert curves.step(firp.TreeConfig(2, 1), 2, below=1.0) == 1.0 + 1.0
    assert curves.step(firp.TreeConfig(4, 2), 2, below=0.5) == (2.0 + 4.0) / 2 + 2.0
    assert curves.step(firp.TreeConfig(3, 1), 3, below=0.0) == 3.0 + 1.5
    monkeypatch.setattr("firp.engine.costs.SHARED_PSEUDO_ROWS", 3)
    assert curves.step(firp.TreeConfig(4, 2), 2, below=0.5) == (2.0 + 4.0) / 2 + 1.0 + 0.5


def test_kept_trees_of_many_rows_have_room(predictor):
    model, ids = tiny_model(0), torch.tensor([[4, 5, 6]])
    made = choice({1: [(64, 64, "dynamic", 1.0, 3.0)]}, num_offsets=3)
    save_choice(choice_file(predictor), machine_name("cpu", torch.float64), made)
    engine = firp.Engine(model, predictor)
    assert engine.max_rows == 256 + MOST_BRANCH and engine.drafter(1).config == firp.TreeConfig(64, 64)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    assert torch.equal(firp.generate(model, ids, engine=engine, max_new_tokens=60, do_sample=False), plain)
    # Another process keeps larger trees for another batch size: this engine goes on with those that fit.
    larger = choice({1: [(64, 64, "dynamic", 1.0, 3.0)], 2: [(128, 64, "dynamic", 1.0, 3.0)]}, num_offsets=3)
    save_choice(choice_file(predictor), machine_name("cpu", torch.float64), larger)
    assert [rung.tree.num_nodes for rung in engine.rungs(2)] == [1]


def test_a_batch_between_two_kept_sizes_is_measured_when_it_begins(predictor, capsys):
    model, prompts = tiny_model(0), [torch.tensor([4, 5, 6])] * 2
    made = choice({1: [TREE], 8: [(2, 1, "dynamic")]}, num_offsets=3, made_by="first use")
    name = machine_name("cpu", torch.float64)
    save_choice(choice_file(predictor), name, made)
    engine = firp.Engine(model, predictor)
    assert engine.rungs(1) == made.batches[1] and engine.rungs(2) == made.batches[8], (
        "a batch that shrinks takes what is there"
    )
    engine.release(engine.start(prompts, 4, []))
    assert "of 2 sequences" in capsys.readouterr().err
    kept = load_choice(choice_file(predictor), name)
    assert list(kept.batches) == [1, 2, 8] and kept.batches[8] == made.batches[8]
    save_choice(choice_file(predictor), name, choice({1: [TREE], 8: [(2, 1, "dynamic")]}, num_offsets=3))
    engine = firp.Engine(model, predictor)
    engine.release(engine.start(prompts, 4, []))
    assert capsys.readouterr().err == "", "what firp tune found is for all sizes up to its largest"


def test_another_head_mode_is_another_entry(predictor):
    for head in (None, "two-pass"):
        firp.Engine(tiny_model(0), predictor, head=head).rungs(1)
    name = machine_name("cpu", torch.float64)
    assert list(load_choices(choice_file(predictor), name)) == [name, f"{name}, head two-pass"]
