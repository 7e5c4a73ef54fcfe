"""Marginals conditioned on the previous token, against sums of products in float64, row by row."""

import math

import implementations
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AVAILABLE = implementations.available("condition_marginals")
ALL = implementations.on_devices("condition_marginals")
INFINITE, NAN = float("inf"), float("nan")


def exact(probabilities, candidates, root_token, source, target):
    """Lists [B][k][K] of rows of (probability, candidate), descending, the earlier first among equals."""
    source, target = source.double().tolist(), target.double().tolist()

    def row(before, tokens, previous):
        factors = [math.fsum(a * b for a, b in zip(source[previous], target[token], strict=True)) for token in tokens]
        highest = max((f for f, p in zip(factors, before, strict=True) if p > 0), default=0.0)
        weights = [p * math.exp(f - highest) if p > 0 else 0.0 for f, p in zip(factors, before, strict=True)]
        scale = sum(before) / sum(weights) if sum(weights) > 0 else 0.0
        return sorted(zip((w * scale for w in weights), range(len(tokens)), strict=True), key=lambda pair: -pair[0])

    out = []
    for given_depths, depths, root in zip(
        probabilities.tolist(), candidates.tolist(), root_token.tolist(), strict=True
    ):
        above = [[root] * len(depths[0]), *depths[:-1]]
        out.append([[row(p, t, c) for c in before] for p, t, before in zip(given_depths, depths, above, strict=True)])
    return out


def check(returned, expected, ranks, rtol):
    probabilities, order = returned
    assert probabilities.dtype == torch.float32 and order.dtype == torch.int32
    wanted = torch.tensor(
        [[[row[:ranks] for row in depth] for depth in depths] for depths in expected], dtype=torch.float64
    )
    assert torch.equal(order.long(), wanted[..., 1].long())
    torch.testing.assert_close(probabilities.double(), wanted[..., 0], rtol=rtol, atol=1e-37)


def run(*args, impl, device):
    return implementations.run("condition_marginals", args, impl, device)


def random_case(seed, dtype, vocab=97, width=64, batch=2, offsets=3, count=16):
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randn(vocab, width, generator=generator).mul(0.4).to(dtype) for _ in range(2))
    probabilities, candidates = torch.softmax(torch.randn(batch, offsets, vocab, generator=generator) * 2, -1).topk(
        count, -1
    )
    return probabilities, candidates, torch.randint(vocab, (batch,), generator=generator), source, target


@ALL
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width, count, ranks", [(64, 16, 16), (64, 16, 7), (1, 1, 1), (17, 5, 2), (0, 3, 3)])
def test_condition_marginals(impl, device, dtype, width, count, ranks):
    for seed in implementations.seeds(8, impl, device):
        args = random_case(seed, dtype, width=width, count=count)
        returned = run(*args, ranks, impl=impl, device=device)
        check(returned, exact(*args), ranks, rtol=1e-5)
        probabilities = returned[0]
        assert bool((probabilities[..., 1:] <= probabilities[..., :-1]).all())
        if ranks == count:
            torch.testing.assert_close(probabilities.sum(-1), args[0].sum(-1)[..., None].expand(-1, -1, count))


@st.composite
def small_cases(draw):
    """Whole factors and few probabilities: ties are exact, and everything else lies far apart."""
    vocab, width, count = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    batch, offsets = draw(st.integers(1, 2)), draw(st.integers(1, 3))

    def tensor(shape, values, dtype):
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).view(shape)

    tokens = st.integers(0, vocab - 1)
    dtype = draw(st.sampled_from(FLOATS))
    return (
        tensor((batch, offsets, count), st.sampled_from([0.0, 0.125, 0.25, 0.375]), torch.float32),
        tensor((batch, offsets, count), tokens, torch.int64),
        tensor((batch,), tokens, torch.int64),
        tensor((vocab, width), st.integers(-3, 3), dtype),
        tensor((vocab, width), st.integers(-3, 3), dtype),
        draw(st.integers(1, count)),
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(small_cases())
def test_ties_zeros_and_chains(args):
    for impl, device in AVAILABLE:
        # A GPU's exp rounds x * log2(e) to float32: with factors up to 54 that is 6e-6 of the result.
        rtol = 1e-5 if device == "cuda" else 2e-6
        check(run(*args, impl=impl, device=device), exact(*args[:-1]), args[-1], rtol)


@ALL
def test_a_row_follows_its_candidate(impl, device):
    """Root 0 lifts token 3; after 2 comes 4, after 3 comes 5."""
    source, target = torch.zeros(6, 6), torch.eye(6) * 50
    source[0, 3] = source[3, 5] = source[2, 4] = 1.0
    probabilities = torch.tensor([[[0.5, 0.25], [0.5, 0.25]]])
    candidates = torch.tensor([[[2, 3], [5, 4]]])
    conditioned, order = run(probabilities, candidates, torch.tensor([0]), source, target, 1, impl=impl, device=device)
    assert conditioned.tolist() == [[[[0.75], [0.75]]] * 2] and order.tolist() == [[[[1], [1]], [[1], [0]]]]


@ALL
@pytest.mark.parametrize(
    "factor, expected, order",
    [
        (NAN, [0.0, 0.0, 0.0], [0, 1, 2]),
        (INFINITE, [0.0, 0.0, 0.0], [0, 1, 2]),
        (-INFINITE, [0.375, 0.375, 0.0], [0, 2, 1]),
    ],
)
def test_broken_factors(impl, device, factor, expected, order):
    """Token 2's factor breaks: depth 1 is emptied, and at depth 2 token 2 has probability 0 and no say."""
    source, target = torch.tensor([[1.0, 0.0]] * 6), torch.zeros(6, 2)
    source[1, 1], target[2, 0], target[5, 1] = 1.0, factor, 200.0
    probabilities = torch.tensor([[[0.25, 0.25, 0.25], [0.5, 0.25, 0.0]]])
    candidates = torch.tensor([[[1, 2, 3], [4, 5, 2]]])
    args = (probabilities, candidates, torch.tensor([0]), source, target, 3)
    conditioned, places = run(*args, impl=impl, device=device)
    plain = [0.5, 0.25, 0.0]
    assert conditioned.tolist() == [[[expected] * 3, [[0.75, 0.0, 0.0], plain, plain]]]
    assert places.tolist() == [[[order] * 3, [[1, 0, 2], [0, 1, 2], [0, 1, 2]]]]


@ALL
def test_a_tiny_probability_with_a_large_factor_takes_everything(impl, device):
    probabilities, candidates = torch.tensor([[[0.75, 1e-42]]]), torch.tensor([[[0, 1]]])
    tables = torch.ones(2, 1), torch.tensor([[0.0], [3000.0]])
    conditioned, order = run(probabilities, candidates, torch.tensor([0]), *tables, 2, impl=impl, device=device)
    assert conditioned.tolist() == [[[[0.75, 0.0]] * 2]] and order.tolist() == [[[[1, 0]] * 2]]


@ALL
def test_a_depth_without_probabilities_keeps_its_order(impl, device):
    probabilities, candidates, root_token, source, target = random_case(0, torch.float32)
    probabilities[:, 1] = 0.0
    returned = run(probabilities, candidates, root_token, source, target, 5, impl=impl, device=device)
    assert not returned[0][:, 1].any() and torch.equal(
        returned[1][:, 1], torch.arange(5, dtype=torch.int32).expand(2, 16, 5)
    )
    check(returned, exact(probabilities, candidates, root_token, source, target), 5, rtol=1e-5)


@ALL
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_inputs(impl, device, dtype):
    dense = probabilities, candidates, root_token, source, target = random_case(1, dtype)
    pair = torch.stack([source, target], 1)
    strided = (
        probabilities.transpose(0, 2).contiguous().transpose(0, 2),
        candidates.transpose(1, 2).contiguous().transpose(1, 2),
        root_token.repeat_interleave(2)[::2],
    )
    expected = exact(*dense)
    for tables in ((pair[:, 0], pair[:, 1]), (source.T.contiguous().T, target.repeat_interleave(2, 1)[:, ::2])):
        check(run(*strided, *tables, 8, impl=impl, device=device), expected, 8, rtol=1e-5)


@pytest.mark.parametrize("impl, device", AVAILABLE[1:])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_implementations_agree(impl, device, dtype):
    for seed in implementations.seeds(8, impl, device):
        args = random_case(seed, dtype)
        expected, order = run(*args, 16, impl="reference", device="cpu")
        returned, same_order = run(*args, 16, impl=impl, device=device)
        assert torch.equal(same_order, order)
        torch.testing.assert_close(returned, expected, rtol=1e-5, atol=1e-37)
