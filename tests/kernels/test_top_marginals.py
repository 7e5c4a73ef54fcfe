"""The most probable tokens of some rows: probabilities of softmax, the tokens that have them."""

import pytest
import torch
from cases import moved
from implementations import TRITON_DEVICE, available, on_devices, run

import firp_kernels

IMPLEMENTATIONS = on_devices("top_marginals")
# torch puts equal scores in any order.
ORDERED = pytest.mark.parametrize("impl, device", available("top_marginals")[1:])


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 997, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_top_marginals(impl, device, dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(2, 9, vocab, generator=generator) * 3).to(dtype)[:, 2:]
    rows = torch.randint(0, 7, (2, 4), generator=generator)
    ranks = min(5, vocab)
    probabilities, candidates = run("top_marginals", (logits, rows, ranks), impl, device)
    exact = torch.softmax(logits.double(), -1)[torch.arange(2)[:, None], rows]
    assert probabilities.dtype == torch.float32 and candidates.dtype == torch.int64
    torch.testing.assert_close(probabilities.double(), exact.topk(ranks, -1).values, rtol=1e-5, atol=0)
    torch.testing.assert_close(probabilities.double(), exact.gather(-1, candidates), rtol=1e-5, atol=0)
    assert all(len(set(row)) == ranks for row in candidates.flatten(0, 1).tolist())


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_has_no_probabilities(impl, device, value):
    logits = torch.zeros(1, 2, 100)
    logits[0, 1, 40] = value
    probabilities, candidates = run("top_marginals", (logits, torch.tensor([[0, 1]]), 3), impl, device)
    torch.testing.assert_close(probabilities, torch.tensor([[[0.01] * 3, [0.0] * 3]]))
    assert bool(((candidates >= 0) & (candidates < 100)).all())


@ORDERED
def test_the_lower_token_is_first_among_equals(impl, device):
    """Within a split of the kernel and across splits; signed zeros are equal; after the last finite score too."""
    logits = torch.zeros(1, 3, 3000)
    logits[0, 0, [2500, 17, 1300]] = 1.0
    logits[0, 1, ::2] = -0.0
    logits[0, 2] = float("-inf")
    logits[0, 2, [2048, 5]] = 1.0
    probabilities, candidates = run("top_marginals", (logits, torch.tensor([[0, 1, 2]]), 5), impl, device)
    assert candidates.tolist() == [[[17, 1300, 2500, 0, 1], [0, 1, 2, 3, 4], [5, 2048, 0, 1, 2]]]
    torch.testing.assert_close(probabilities[0, 2], torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]), rtol=0, atol=1e-30)


@ORDERED
@pytest.mark.parametrize("ranks", [1, 16, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_candidates_are_those_of_a_stable_sort(impl, device, dtype, ranks):
    """Scores of few values, so that most ranks are decided by the token; more ranks than the kernel takes."""
    logits = (torch.randn(2, 3, 2600, generator=torch.Generator().manual_seed(ranks)) * 2).round().to(dtype)
    rows = torch.tensor([[2, 0], [1, 1]])
    _, candidates = run("top_marginals", (logits, rows, ranks), impl, device)
    chosen = logits[torch.arange(2)[:, None], rows]
    exact = chosen.sort(stable=True, dim=-1, descending=True).indices[..., :ranks]
    if impl == "triton" and ranks > 64:
        candidates, exact = chosen.gather(-1, candidates), chosen.gather(-1, exact)
    assert torch.equal(candidates, exact)


@IMPLEMENTATIONS
def test_strided_inputs(impl, device):
    logits = torch.randn(2, 4, 1500, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([[3, 9, 0, 9], [1, 9, 1, 9]])[:, ::2]
    exact = run("top_marginals", (logits, rows.contiguous(), 6), "reference", "cpu")
    for strided in (logits.transpose(1, 2).contiguous().transpose(1, 2), logits.repeat(1, 2, 1)[:, 4:]):
        probabilities, candidates = run("top_marginals", (strided, rows, 6), impl, device)
        torch.testing.assert_close(probabilities, exact[0], rtol=1e-5, atol=0)
        assert torch.equal(candidates, exact[1])


def test_every_output_is_written(poisoned_outputs):
    logits = torch.randn(1, 2, 2100, generator=torch.Generator().manual_seed(2))
    probabilities, candidates = run("top_marginals", (logits, torch.tensor([[1, 0]]), 16), "triton", TRITON_DEVICE)
    assert bool(probabilities.isfinite().all()) and int(candidates.max()) < 2100
    empty = run("top_marginals", (logits, torch.zeros(1, 0, dtype=torch.int64), 16), "triton", TRITON_DEVICE)
    assert [tuple(part.shape) for part in empty] == [(1, 0, 16)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [49_152, 128_256, 256_000])
@pytest.mark.parametrize("ranks", [1, 16, 64])
def test_model_shapes_on_a_gpu(dtype, vocab, ranks):
    logits = torch.randn(8, 3, vocab, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows = torch.arange(3).expand(8, 3)
    probabilities, candidates = run("top_marginals", (logits, rows, ranks), "triton", "cuda")
    assert torch.equal(candidates, logits.sort(stable=True, dim=-1, descending=True).indices[..., :ranks])
    exact = torch.softmax(logits.double(), -1).gather(-1, candidates)
    torch.testing.assert_close(probabilities.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    generator = torch.Generator().manual_seed(4)
    logits, rows = moved([torch.randn(2, 5, 40_000, generator=generator), torch.tensor([[4, 0], [1, 1]])], "cuda")
    firp_kernels.top_marginals(logits, rows, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = firp_kernels.top_marginals(logits, rows, 16)
    logits.copy_(logits.flip(-1))
    graph.replay()
    for out, exact in zip(replayed, firp_kernels.top_marginals(logits, rows, 16), strict=True):
        assert torch.equal(out, exact)
