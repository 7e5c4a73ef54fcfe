"""Trees that change while decoding: which one the ladder takes, and that no change of it changes a token."""

import itertools
import random

import firp
import pytest
import torch
from captured_runs import LONG, SHORT, captured, emitted, expected, parts
from fake_cuda import FakeCuda
from firp.drafting.choices import Choice, Rung, choice_file, save_choice
from firp.drafting.ladder import HYSTERESIS, LONGEST_WAIT, WAIT, Ladder
from firp.drafting.profile import FILE_NAME, save_profile
from models import PREDICTORS, ragged_runs, tiny_model, tiny_predictor
from profiles import engine_with, made_profile

PLAIN = Rung(firp.TreeConfig(1, 1), 1.0, 1.0)
SMALL = Rung(firp.TreeConfig(3, 1, "static"), 1.2, 1.5)
MIDDLE = Rung(firp.TreeConfig(6, 2), 1.4, 1.9)
LARGE = Rung(firp.TreeConfig(16, 4), 1.85, 2.4)
RUNGS = (PLAIN, SMALL, MIDDLE, LARGE)


def run(ladder, tokens_of, steps=200):
    """Rungs of steps that deliver `tokens_of(rung)` tokens."""
    used = []
    for _ in range(steps):
        used.append(ladder.rung)
        ladder.observe(ladder.rung, tokens_of(ladder.rung))
    return used


def test_drafts_as_expected_keep_the_fastest_rung():
    assert set(run(Ladder(RUNGS, 3), lambda rung: rung.tau)) == {MIDDLE}


def test_better_drafts_move_up_and_worse_ones_down():
    assert run(Ladder(RUNGS, 5), lambda rung: 1 + 2.5 * (rung.tau - 1))[-1] is LARGE
    easy = Ladder((PLAIN, SMALL, LARGE), 3)
    assert run(easy, lambda rung: 1 + 0.6 * (rung.tau - 1))[-1] is SMALL


def test_drafts_that_fail_cost_little():
    """At most 4 % of the steps' time over 128 tokens, none of a draft accepted."""
    used = run(Ladder(RUNGS, 3), lambda rung: 1.0, 128)
    assert used[-1] in (PLAIN, SMALL) and sum(rung.seconds for rung in used) < 1.04 * 128
    drafted = [i for i, rung in enumerate(used) if rung is not PLAIN]
    assert max(drafted) > WAIT, "drafts are tried again"


def test_tries_become_rare_and_the_first_that_succeeds_stays():
    ladder = Ladder(RUNGS, 3)
    used = run(ladder, lambda rung: 1.0, 2000)
    runs = [(rung, len(list(group))) for rung, group in itertools.groupby(used)]
    assert max(length for rung, length in runs if rung is PLAIN) == LONGEST_WAIT
    assert set(run(ladder, lambda rung: rung.tau, LONGEST_WAIT + 60)[-10:]) == {MIDDLE}


def test_a_small_advantage_moves_nothing():
    near = Rung(firp.TreeConfig(4, 1), SMALL.seconds, 1 + (SMALL.tau - 1) * (1 + (HYSTERESIS - 1) / 2))
    assert set(run(Ladder((PLAIN, SMALL), 3), lambda rung: rung.tau)) == {SMALL}
    ladder = Ladder((PLAIN, SMALL, near), 3)
    assert len(set(run(ladder, lambda rung: rung.tau))) == 1


def test_a_run_repeats_exactly():
    def tokens(rng):
        return lambda rung: 1 + (rung is not PLAIN) * rng.choice((0, 0, 1, 2))

    assert run(Ladder(RUNGS, 3), tokens(random.Random(3))) == run(Ladder(RUNGS, 3), tokens(random.Random(3)))


def test_other_rungs_keep_what_is_known():
    ladder = Ladder(RUNGS, 3)
    run(ladder, lambda rung: 1.0, 20)
    share = ladder.share
    ladder.use((PLAIN, SMALL))
    assert ladder.share == share and ladder.rung is PLAIN


class Cycle(Ladder):
    """Takes another rung at every step."""

    def observe(self, rung, tokens):
        super().observe(rung, tokens)
        self.rung = self.rungs[sum(self.steps.values()) * 5 % len(self.rungs)]


@pytest.fixture
def engine_of(tmp_path, monkeypatch):
    """Makes an engine whose ladder goes through all rungs."""
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("firp.generation.loop.Ladder", Cycle)

    return lambda model, predictor, k=3: engine_with(tmp_path, model, predictor, k, RUNGS)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", PREDICTORS)
def test_greedy_tokens_are_hugging_faces_through_all_rungs(engine_of, kind, k):
    model = tiny_model(3, dtype=torch.float32)
    engine = engine_of(model, tiny_predictor(model, 3, kind), k)
    for out in ragged_runs(engine, 30):
        assert [rung.tree for rung in out.rungs] == [rung.tree for rung in RUNGS]
        assert out.stats.steps < 12 or all(out.rungs.values())


def test_sampled_tokens_are_those_of_plain_decoding(engine_of):
    model = tiny_model(4, dtype=torch.float32)
    engine, plain = engine_of(model, tiny_predictor(model, 4)), firp.Engine(model)
    options = {"max_new_tokens": 40, "do_sample": True, "seed": 5, "top_k": 0, "repetition_penalty": 1.2}
    ids = torch.tensor([[4, 5, 6, 4]])
    expected = firp.generate(model, ids, engine=plain, **options)
    assert torch.equal(firp.generate(model, ids, engine=engine, **options), expected)


def test_drafts_that_could_not_pay_are_not_tried():
    dear = Rung(firp.TreeConfig(2, 1), 2.4, 1.5)
    assert set(run(Ladder((PLAIN, dear), 3), lambda rung: 1.0, 500)) == {PLAIN}


@pytest.fixture
def captured_engine(tmp_path, monkeypatch):
    """An engine on a GPU made of CPU tensors; with `kept`, its trees are known and the ladder goes through all."""

    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("firp.engine.automatic.machine_name", lambda *_: "a GPU")
    monkeypatch.setattr("firp.engine.automatic._measured", {})
    model, predictor, _ = parts()
    predictor.folder = tmp_path
    save_profile(tmp_path / FILE_NAME, made_profile(model, predictor, max_new_tokens=20))

    def make(kept):
        if kept:
            monkeypatch.setattr("firp.generation.loop.Ladder", Cycle)
            made = Choice(3, None, {size: RUNGS for size in (1, 2)}, "firp tune")
            save_choice(choice_file(predictor), "a GPU, captured", made)
        return captured(model, predictor)

    return make


@pytest.mark.parametrize("late", [False, True])
def test_captured_steps_go_through_all_rungs(captured_engine, monkeypatch, late):
    runs = [(SHORT, 25), (LONG, 25), (SHORT, 25)]
    wanted = expected(*runs)
    fake = FakeCuda(monkeypatch)
    with fake.tensors():
        engine = captured_engine(kept=True)
        assert [emitted(engine, *arguments, late=late) for arguments in runs] == wanted
        assert engine.drafter(1).config == MIDDLE.tree


def test_captured_steps_are_timed_and_kept(captured_engine, monkeypatch, capsys):
    wanted = expected((SHORT, 25))
    fake = FakeCuda(monkeypatch)
    with fake.tensors():
        engine = captured_engine(kept=False)
        assert [emitted(engine, SHORT, 25)] == wanted and "timing decode steps of 1" in capsys.readouterr().err
        assert len(engine.rungs(1)) > 1 and {rung.tree.kind for rung in engine.rungs(1)} == {"dynamic"}
        engine.warm_up((1,), max_len=60, progress=False)
        assert emitted(engine, SHORT, 25) == wanted[0]
