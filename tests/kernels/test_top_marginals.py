"""The most probable tokens of some rows: probabilities of softmax, the tokens that have them."""

import pytest
import torch
from implementations import available, on_devices, run

IMPLEMENTATIONS = on_devices("top_marginals")


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 997])
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


@pytest.mark.skipif(("extension", "cpu") not in available("top_marginals"), reason="the C++ extension is not built")
def test_the_lower_token_is_first_among_equals():
    logits = torch.zeros(1, 1, 300)
    logits[0, 0, [250, 17, 130]] = 1.0
    _, candidates = run("top_marginals", (logits, torch.zeros(1, 1, dtype=torch.long), 5), "extension", "cpu")
    assert candidates.tolist() == [[[17, 130, 250, 0, 1]]]
