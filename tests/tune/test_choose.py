"""Choices over synthetic cost and acceptance curves."""

import math

import pytest
from firp.tune.choose import (
    HOPELESS,
    Candidate,
    Point,
    candidates,
    choose,
    choose_each,
    choose_head,
    choose_offsets,
    finalists,
    measure_grid,
    plain,
    step_seconds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

GRID = candidates((2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64), (1, 2, 3), ("dynamic", "static"))


def tau(candidate):
    """More nodes, lookahead nodes and offsets deliver more, ever more slowly."""
    if candidate.num_nodes == 1:
        return 1.0
    depth = 1 - 0.5**candidate.num_offsets
    served = candidate.num_lookahead / (candidate.num_lookahead + 1)
    penalty = 0.05 * (candidate.kind == "static")
    return 1 + depth * (1.5 * math.log2(candidate.num_nodes) / 6 * served + 0.2) - penalty


def seconds(candidate, batch_size, row_cost):
    """A step of 10 ms, and `row_cost` of that for every further row."""
    return 0.01 * (1 + row_cost * (batch_size * candidate.rows - 1))


def points(row_cost, batch_size=1):
    return [Point(c, seconds(c, batch_size, row_cost), tau(c), batch_size) for c in GRID]


def test_free_rows_take_the_largest_tree():
    chosen = choose(points(row_cost=0.0)).candidate
    assert (chosen.num_nodes, chosen.num_offsets, chosen.kind) == (64, 3, "dynamic")


def test_dear_rows_decode_plainly():
    assert choose(points(row_cost=1.0)).candidate.num_nodes == 1


@pytest.mark.parametrize("row_cost", [0.001, 0.01, 0.03, 0.1])
def test_the_choice_is_the_fastest_up_to_a_tie(row_cost):
    everything = points(row_cost)
    chosen, best = choose(everything), max(p.tokens_per_second for p in everything)
    assert 0.99 * best <= chosen.tokens_per_second
    assert all(p.candidate.rows >= chosen.candidate.rows for p in everything if p.tokens_per_second >= 0.99 * best)


def test_ties_go_to_the_smaller_tree_and_to_plain_decoding():
    small, large = Point(Candidate(4, 1, 3), 0.01, 1.995), Point(Candidate(32, 8, 3), 0.01, 2.0)
    assert choose([large, small]) is small
    none = Point(plain(3), 0.01, 1.99)
    assert choose([large, small, none]) is none
    faster = Point(Candidate(32, 8, 3), 0.01, 2.1)
    assert choose([small, faster, none]) is faster


def test_dearer_rows_never_choose_more_rows():
    rows = [choose(points(cost)).candidate.rows for cost in (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)]
    assert rows == sorted(rows, reverse=True) and rows[-1] == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(GRID), st.floats(0.001, 0.1), st.floats(1, 4)), min_size=1, max_size=30),
    st.integers(1, 3),
)
def test_batches_never_get_more_rows_as_they_grow(figures, spread):
    by_batch = {
        size: [Point(plain(3), 0.01, 1.0, size)]
        + [Point(c, t * size**spread, a, size) for c, t, a in figures[: 30 // size]]
        for size in (1, 2, 4, 8)
    }
    chosen = choose_each(by_batch)
    rows = [chosen[size].candidate.rows for size in sorted(chosen)]
    assert rows == sorted(rows, reverse=True)
    assert chosen[1] == choose(by_batch[1])


def test_growing_batches_end_in_plain_decoding():
    chosen = choose_each({size: points(0.02, size) for size in (1, 4, 16, 64)})
    assert chosen[1].candidate.num_nodes > 1 and chosen[64].candidate.num_nodes == 1


def test_one_k_serves_all_batches():
    first = {1: [Point(plain(3), 1, 1), Point(Candidate(4, 1, 1), 1, 2.0), Point(Candidate(4, 1, 3), 1, 3.0)]}
    assert choose_offsets(first) == 3
    second = {4: [Point(plain(3), 1, 1, 4), Point(Candidate(4, 1, 1), 1, 2.0, 4), Point(Candidate(4, 1, 3), 4, 3.0, 4)]}
    assert choose_offsets(first | second) == 1
    tied = {1: [Point(Candidate(4, 1, k), 1, 2.0 + k / 1000) for k in (1, 2, 3)]}
    assert choose_offsets(tied) == 1
    assert choose_offsets({1: [Point(plain(2), 1, 1)]}) == 2


def test_the_head_mode_is_the_engines_own_unless_another_is_faster():
    assert choose_head({}) is None
    assert choose_head({1: {None: 1.0, "one-pass": 1.0, "two-pass": 0.995}}) is None
    assert choose_head({1: {None: 1.0, "one-pass": 1.0, "two-pass": 0.9}}) == "two-pass"
    assert choose_head({1: {None: 1.0, "two-pass": 0.9}, 8: {None: 1.0, "two-pass": 1.3}}) is None


def test_step_times_are_interpolated_in_pseudo_rows():
    grid = {(1, 1): 1.0, (8, 1): 2.0, (8, 4): 5.0, (16, 1): 9.0}
    assert step_seconds(grid, 3, plain(3)) == 1.0
    assert step_seconds(grid, 3, Candidate(8, 4, 3)) == 5.0
    assert step_seconds(grid, 3, Candidate(8, 2, 3, "static")) == 3.0
    assert step_seconds(grid, 3, Candidate(8, 1, 1)) == 2.0
    assert step_seconds(grid, 3, Candidate(8, 8, 3)) is None
    assert step_seconds(grid, 3, Candidate(4, 1, 3)) is None


def sizes_and_taus():
    best = {}
    for c in GRID:
        size = (c.num_nodes, c.num_lookahead)
        best[size] = max(best.get(size, 0), tau(c))
    return best


@pytest.mark.parametrize(("row_cost", "most"), [(0.0, 28), (0.02, 28), (0.2, 10)])
def test_only_sizes_that_cannot_win_go_unmeasured(row_cost, most):
    taus = sizes_and_taus()
    times = {size: seconds(Candidate(*size, 3), 1, row_cost) for size in taus}
    measured = measure_grid(taus, taus, times.__getitem__)
    best = max(taus[size] / times[size] for size in taus)
    for size in taus.keys() - measured.keys():
        assert taus[size] / times[size] < HOPELESS * best
    assert len(measured) <= most and measured[1, 1] == times[1, 1]


def test_finalists_hold_plain_decoding_and_the_fastest_of_every_k():
    everything = points(0.02)
    last = finalists(everything, 2)
    speeds = {p.candidate: p.tokens_per_second for p in everything}
    assert last[0].num_nodes == 1 and len(last) == 7
    for k in (1, 2, 3):
        of_k = [c for c in GRID if c.num_offsets == k and c.num_nodes > 1]
        assert [c for c in last[1:] if c.num_offsets == k] == sorted(of_k, key=lambda c: -speeds[c])[:2]


def test_candidates():
    found = candidates((1, 2, 4), (1, 4), (1, 3), ("dynamic",))
    assert found == [plain(3), *(Candidate(n, p, k) for n, p in ((2, 1), (4, 1), (4, 4)) for k in (1, 3))]
    for bad in (((1000,), (1,), (1,), ("dynamic",)), ((4,), (1,), (1,), ("bush",)), ((4,), (0,), (1,), ("dynamic",))):
        with pytest.raises(ValueError, match=r"num_nodes|tree_kind|num_lookahead"):
            candidates(*bad)
    with pytest.raises(ValueError, match="points: got none"):
        choose([])
