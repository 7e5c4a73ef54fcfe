"""verify_tree: every implementation gives the oracle's integers; the kernel's splits, ties and draws."""

import implementations
import pytest
import torch
from cases import moved, verify_case
from hypothesis import given, settings
from hypothesis import strategies as st

import firp_kernels as kernels
from firp_kernels.checks import FLOATS
from firp_kernels.ops import verify_tree

IMPLEMENTATIONS = implementations.on_devices("verify_tree")
TRITON = ("triton", implementations.TRITON_DEVICE)
# Vocabularies of one split of the kernel, of one and a bit, of several.
VOCABULARIES = (4096, 4097, 13_000)
ROOT_ONLY = (
    torch.zeros(1, 1, dtype=torch.int64),
    torch.full((1, 1), -1, dtype=torch.int32),
    torch.zeros(1, 1, dtype=torch.int32),
)


def run(args, impl, device):
    return kernels.Verified(*implementations.run("verify_tree", args, impl, device))


def assert_equals_the_oracle(args, impl, device, *note):
    for out, exact in zip(run(args, impl, device), verify_tree.reference(*args), strict=True):
        assert out.dtype == exact.dtype and torch.equal(out, exact), note


def chosen(scores, uniforms, impl, device):
    """The token that each row of `scores` [B, V] chooses, and its status."""
    batch = scores.shape[0]
    tree = [tensor.expand(batch, 1) for tensor in ROOT_ONLY]
    out = run([scores[:, None], uniforms, *tree, 0], impl, device)
    return out.bonus, out.status


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_random_cases(impl, device, dtype, samples):
    """bfloat16 too: the kernel has no matrix product, which is what the interpreter gets wrong."""
    for seed in implementations.seeds(60, impl, device):
        assert_equals_the_oracle(verify_case(seed, dtype, samples), impl, device, seed)


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_small_trees_with_many_ties(data):
    """Quarters add without rounding, so draws agree exactly as well; duplicate siblings and NaN are common."""
    batch, num_nodes, vocab, depth = (
        data.draw(st.integers(low, high)) for low, high in ((1, 2), (1, 6), (1, 6), (0, 4))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    samples = data.draw(st.booleans())
    scores = torch.randint(0 if samples else -2, 3, (batch, num_nodes, vocab), generator=generator) / 4
    scores[torch.rand(scores.shape, generator=generator) < data.draw(st.sampled_from((0.0, 0.05)))] = float("nan")
    uniforms = torch.randint(0, 8, (batch, depth + 1), generator=generator) / 8 if samples else None
    tokens = torch.randint(0, vocab, (batch, num_nodes), generator=generator)
    parents = torch.tensor(
        [[-1] + [data.draw(st.integers(-1, node - 1)) for node in range(1, num_nodes)] for _ in range(batch)]
    )
    lookahead = torch.randint(
        -1, num_nodes, (batch, data.draw(st.integers(0, 3))), generator=generator, dtype=torch.int32
    )
    args = [scores, uniforms, tokens, parents.to(torch.int32), lookahead, depth]
    for impl, device in implementations.available("verify_tree")[1:]:
        assert_equals_the_oracle(args, impl, device)


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_first_of_equal_scores_wins(impl, device, vocab):
    """Equal maxima in one split and in several; signed zeros are equal; a row of -inf chooses token 0."""
    planted = [(0, vocab - 1), (5, 9), (vocab // 2, vocab - 1), (4095, vocab - 1), (vocab - 1,)]
    scores = torch.full((len(planted) + 2, vocab), -1.0)
    for row, positions in enumerate(planted):
        scores[row, list(positions)] = 2.0
    scores[-2, vocab - 3], scores[-2, vocab - 1] = -0.0, 0.0
    scores[-1] = float("-inf")
    tokens, status = chosen(scores, None, impl, device)
    assert tokens.tolist() == [positions[0] for positions in planted] + [vocab - 3, 0]
    assert tokens.tolist() == scores.argmax(-1).tolist() and not bool(status.any())


@IMPLEMENTATIONS
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_nan_anywhere_in_a_row_is_reported(impl, device, samples):
    scores = torch.rand(5, 13_000, generator=torch.Generator().manual_seed(0))
    positions = (0, 4095, 4096, 12_999)
    for row, position in enumerate(positions):
        scores[row, position] = float("nan")
    tokens, status = chosen(scores, torch.full((5, 1), 0.5) if samples else None, impl, device)
    assert status.tolist() == [1, 1, 1, 1, 0] and tokens[:4].tolist() == [-1] * 4 and int(tokens[4]) >= 0


@IMPLEMENTATIONS
def test_nan_stops_the_walk_where_it_is(impl, device):
    """A NaN below the accepted path, or beside it, changes nothing."""
    scores = torch.zeros(1, 4, 9)
    scores[0, 0, 3] = scores[0, 1, 4] = 1.0
    scores[0, 2:] = float("nan")
    tokens, parents = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[-1, 0, 1, 0]], dtype=torch.int32)
    lookahead = torch.tensor([[0, 1]], dtype=torch.int32)
    path, num_accepted, bonus, last_slot, levels_up, status = run(
        [scores, None, tokens, parents, lookahead, 3], impl, device
    )
    assert path.tolist() == [[0, 1, 2, -1]] and num_accepted.tolist() == [2] and bonus.tolist() == [-1]
    assert (last_slot.item(), levels_up.item(), status.item()) == (1, 1, 1)
    shorter = run([scores[:, :2], None, tokens[:, :2], parents[:, :2], lookahead, 3], impl, device)
    assert shorter.status.tolist() == [0]


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_draws_over_large_vocabularies(impl, device, vocab):
    """Random rows against cumulative sums in float64, uniforms of 0 and just below 1 included."""
    generator = torch.Generator().manual_seed(vocab)
    probabilities = torch.softmax(torch.randn(24, vocab, generator=generator) * 4, -1)
    probabilities[::2] *= torch.rand(12, vocab, generator=generator) < 0.01
    uniforms = torch.rand(24, 1, generator=generator)
    uniforms[:4], uniforms[4:8] = 0.0, 1 - 2**-24
    cumulative = probabilities.double().cumsum(-1)
    expected = (cumulative <= uniforms.double() * cumulative[:, -1:]).sum(-1)
    tokens, status = chosen(probabilities, uniforms, impl, device)
    assert torch.equal(tokens, expected) and not bool(status.any())
    assert bool((probabilities.gather(1, tokens[:, None]) > 0).all())


@IMPLEMENTATIONS
def test_draws_follow_the_cumulative_sum_exactly(impl, device):
    """Eighths: token v is drawn for uniforms in [cdf(v - 1), cdf(v)), across the border of two splits too."""
    row = torch.zeros(8200)
    row[[1, 4095, 4096, 8199]] = torch.tensor([0.125, 0.25, 0.5, 0.125])
    uniforms = torch.tensor([0.0, 0.12, 0.125, 0.37, 0.375, 0.87, 0.875, 1 - 2**-24])[:, None]
    tokens, _ = chosen(row.expand(8, -1), uniforms, impl, device)
    assert tokens.tolist() == [1, 1, 4095, 4095, 4096, 4096, 8199, 8199]
    assert chosen(torch.zeros(1, 8200), torch.tensor([[0.5]]), impl, device)[0].tolist() == [8199]


def test_a_draw_does_not_depend_on_tree_or_batch():
    args = verify_case(5, torch.float32, True)
    row = torch.softmax(torch.randn(1, 5000, generator=torch.Generator().manual_seed(2)) * 3, -1)
    uniforms = torch.rand(1, 1, generator=torch.Generator().manual_seed(3))
    alone, _ = chosen(row, uniforms, *TRITON)
    tokens, parents, lookahead = (tensor[:1] for tensor in args[2:5])
    batch, num_nodes = 2, tokens.shape[1]
    scores = row.expand(batch, num_nodes, -1)
    trees = [tensor.expand(batch, -1) for tensor in (tokens, parents, lookahead)]
    assert run([scores, uniforms.expand(batch, 1), *trees, 0], *TRITON).bonus.tolist() == alone.tolist() * 2


@IMPLEMENTATIONS
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_strided_inputs(impl, device, samples):
    for seed in implementations.seeds(8, impl, device):
        scores, uniforms, tokens, parents, lookahead, depth = verify_case(seed, torch.float32, samples)
        rows = torch.cat([scores, torch.full_like(scores[:, :1], float("nan"))], 1)[:, :-1]
        columns = scores.transpose(1, 2).contiguous().transpose(1, 2)
        spread = [
            None if tensor is None else tensor.repeat_interleave(2, 1)[:, ::2]
            for tensor in (uniforms, tokens, parents, lookahead)
        ]
        exactly = run([scores, uniforms, tokens, parents, lookahead, depth], impl, device)
        for strided in (rows, columns):
            for out, exact in zip(run([strided, *spread, depth], impl, device), exactly, strict=True):
                assert torch.equal(out, exact), seed


def test_every_output_is_written(poisoned_outputs):
    largest = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
    for seed in range(8):
        for out in run(verify_case(seed, torch.float32, bool(seed % 2)), *TRITON):
            assert not bool((out == largest[out.dtype]).any()), seed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_model_shapes_on_a_gpu(dtype, samples):
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(4, 64, 128_256, generator=generator).to(dtype)
    uniforms = None
    if samples:
        scores, uniforms = torch.softmax(scores.float() * 4, -1), torch.rand(4, 5, generator=generator)
    parents = torch.tensor([-1, *(node // 3 for node in range(63))], dtype=torch.int32).expand(4, -1)
    tokens = scores.argmax(-1).gather(1, parents.long().clamp(min=0))
    assert_equals_the_oracle([scores, uniforms, tokens, parents, torch.zeros(4, 1, dtype=torch.int32), 4], *TRITON)


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_graph_replay_equals_eager(samples):
    args, others = (moved(verify_case(seed, torch.float32, samples), "cuda") for seed in (4, 4))
    kernels.verify_tree(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = kernels.verify_tree(*args)
    args[0].copy_(args[0].flip(-1))
    graph.replay()
    for out, exact in zip(replayed, kernels.verify_tree(others[0].flip(-1), *others[1:]), strict=True):
        assert torch.equal(out, exact)
