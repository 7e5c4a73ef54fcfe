"""keep_top_p: the tokens that Hugging Face keeps, ties and broken rows included, without a sort."""

import pytest
import torch
from implementations import TRITON_DEVICE, on_devices, run, seeds
from transformers.generation.logits_process import TopPLogitsWarper

import firp_kernels
from firp_kernels.ops import keep_top_p

IMPLEMENTATIONS = on_devices("keep_top_p")
# inf and NaN are what is tested; numpy, under the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
FILTER = -7.5
TOP_P = (0.0, 1e-6, 0.31, 0.5, 0.9, 0.999, 1.0)


def keep(scores, top_p, least, impl, device):
    return run("keep_top_p", (scores, top_p, least, FILTER), impl, device)


def random_scores(seed, vocab):
    """Flat to peaked, some of 16 bits, some with many ties, some with tokens that an earlier processor left out."""
    scores = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * (0.01, 1, 4, 20)[seed % 4]
    scores = (scores, scores.bfloat16().float(), (scores * 2).round())[seed % 3]
    scores[:, 1::3] = float("-inf") if seed % 5 == 0 else scores[:, 1::3]
    return scores


def exact(scores, top_p, least):
    """The contract with sums in float64; probabilities and limit are rounded to float32, as in Hugging Face."""
    ascending, tokens = scores.sort(dim=-1, stable=True)
    left_out = ascending.softmax(-1).double().cumsum(-1) <= torch.tensor(1 - top_p).double()
    left_out[:, -least:] = False
    return scores.masked_fill(left_out.scatter(1, tokens, left_out), FILTER)


@IMPLEMENTATIONS
def test_random_rows(impl, device):
    for seed in seeds(56, impl, device):
        for vocab in (1, 7, 64, 997, 2100):
            scores, top_p, least = random_scores(seed, vocab), TOP_P[seed % 7], min(1 + 2 * (seed % 2), vocab)
            out, expected = keep(scores, top_p, least, impl, device), exact(scores, top_p, least)
            kept, least_kept = (out != FILTER).sum(-1), (expected != FILTER).sum(-1)
            # Float32 sums meet the limit a little earlier or later, in the reference alone.
            assert torch.equal(out, expected) if impl == "triton" else ((kept - least_kept).abs() <= 2).all()
            assert (kept >= least).all()


@pytest.mark.parametrize("top_p", TOP_P)
@IMPLEMENTATIONS
def test_keeps_what_hugging_face_keeps(impl, device, top_p):
    """Of equal scores Hugging Face's sort leaves out any: as many, of the same score."""
    theirs = TopPLogitsWarper(top_p, FILTER, 2)
    for seed in seeds(8, impl, device):
        scores = random_scores(seed, 500)
        out, expected = keep(scores, top_p, 2, impl, device), theirs(None, scores)
        assert torch.equal(out.sort().values, expected.sort().values)
        distinct = torch.arange(500.0).expand(2, -1)[:, torch.randperm(500)] / 50
        assert torch.equal(keep(distinct, top_p, 2, impl, device), theirs(None, distinct))


@IMPLEMENTATIONS
def test_the_first_of_equal_scores_are_left_out(impl, device):
    """Of 1000 equal tokens 0.2505 of the probability are 250; both zeros are equal; two tokens stay at least."""
    for scores in (torch.zeros(1, 1000), torch.tensor([0.0, -0.0]).repeat(500)[None]):
        out = keep(scores, 1 - 0.2505, 1, impl, device)
        assert (out[0, :250] == FILTER).all() and (out[0, 250:] == 0).all()
    assert (keep(torch.zeros(1, 1000), 0.0, 2, impl, device) != FILTER).nonzero()[:, 1].tolist() == [998, 999]
    peaked = torch.tensor([[1.0, 50.0, 1.0, 0.0]])
    assert keep(peaked, 0.5, 1, impl, device).tolist() == [[FILTER, 50.0, FILTER, FILTER]]
    assert keep(peaked, 0.5, 2, impl, device).tolist() == [[FILTER, 50.0, 1.0, FILTER]]
    assert keep(peaked, 0.5, 9, impl, device).tolist() == peaked.tolist()


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_rows_stay(impl, device, value):
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    scores[1, 40], scores[2] = value, float("-inf")
    out = keep(scores, 0.4, 1, impl, device)
    torch.testing.assert_close(out[1:], scores[1:], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[:1], keep(scores[:1], 0.4, 1, impl, device)) and (out[0] == FILTER).any()


@IMPLEMENTATIONS
def test_strides_and_empty_inputs(impl, device):
    scores = random_scores(2, 600)
    expected = keep(scores, 0.7, 1, impl, device)
    for strided in (scores.t().contiguous().t(), scores.repeat(1, 2)[:, 600:], scores.repeat_interleave(2, 0)[::2]):
        out = keep(strided, 0.7, 1, impl, device)
        assert torch.equal(out, expected) and out.is_contiguous()
    assert keep(torch.zeros(0, 5), 0.7, 1, impl, device).shape == (0, 5)


def test_a_row_does_not_depend_on_the_rows_beside_it(poisoned_outputs):
    scores = random_scores(4, 2500)
    together = keep(scores, 0.9, 1, "triton", TRITON_DEVICE)
    assert torch.equal(keep(scores[1:2], 0.9, 1, "triton", TRITON_DEVICE), together[1:2])


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49_152, 128_256, 256_000])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_model_shapes_on_a_gpu(vocab, top_p):
    """A score at the limit itself may fall to either side: exponentials are rounded."""
    scores = torch.randn(64, vocab, generator=torch.Generator().manual_seed(3)) * 3
    for rows in (scores, scores.bfloat16().float()):
        out, expected = keep(rows, top_p, 1, "triton", "cuda"), exact(rows, top_p, 1)
        assert ((out != FILTER).sum(-1) - (expected != FILTER).sum(-1)).abs().max() <= 1


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    scores = random_scores(1, 40_000).cuda()
    firp_kernels.keep_top_p(scores, 0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = firp_kernels.keep_top_p(scores, 0.9)
    scores.copy_(scores.flip(-1))
    graph.replay()
    assert torch.equal(replayed, firp_kernels.keep_top_p(scores, 0.9))


def test_the_reference_is_the_contract():
    scores = random_scores(6, 300)
    assert torch.equal(keep_top_p.reference(scores.double(), 0.5, 1, FILTER).float(), exact(scores, 0.5, 1))
