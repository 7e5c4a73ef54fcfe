"""Accuracies follow argmax: a tie is a hit only for the first of equals."""

import firp
import pytest
import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from firp.train.objective import Objective
from firp.train.targets import rank_of
from models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_is_the_place_in_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 4, 97, generator=generator).mul(2).round().to(dtype)  # ties everywhere
    scores[0, 0, 3:7] = float("inf")
    scores[1, 1, 5:9] = -float("inf")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    for _ in range(20):
        choice = torch.randint(97, (50, 4), generator=generator)
        assert torch.equal(rank_of(scores, choice), (order == choice[..., None]).int().argmax(-1))
    assert torch.equal(rank_of(scores, scores.argmax(-1)), torch.zeros(50, 4, dtype=torch.long))


def test_among_equals_the_first_alone_is_a_hit():
    scores = torch.zeros(5).expand(5, 5)
    assert rank_of(scores, torch.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_nan_is_never_a_hit():
    scores = torch.tensor([[0.0, float("nan"), 2.0], [float("nan")] * 3])
    assert rank_of(scores, torch.tensor([2, 0])).tolist() == [1, 3]
    assert rank_of(scores[:1], torch.tensor([1])).tolist() == [3]


def test_a_predictor_that_scores_all_tokens_alike_hits_token_0_alone():
    """Pseudo rows of zeros give zeros: every token ties, and before each counted as the first."""
    model = tiny_model(3, vocab=13, dtype=torch.float32)
    view = DecoderView(model)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    predictor = firp.FirpPredictor.for_model(model, 2, 2)
    with torch.no_grad():
        predictor.weight.zero_()
    tokens = torch.randint(4, 13, (2, 12), generator=torch.Generator().manual_seed(1))
    real = real_rows(view, tokens, 2)
    choices = view.logits(real.final).argmax(-1)
    anchors = torch.arange(3, 9).expand(2, -1)
    objective = Objective(view, 2, torch.ones(2), None, trains_maps=True)
    scores = objective(predictor, tokens, real, anchors, torch.ones_like(anchors, dtype=torch.bool), False)
    for j in range(2):
        hit = choices[:, 3 + j + 1 : 9 + j + 1]
        assert scores.top1[j] == (hit == 0).sum() and scores.top4[j] == (hit < 4).sum()
        assert scores.top10[j] == (hit < 10).sum()


def test_a_batch_without_an_anchor_has_no_loss_and_no_gradient():
    model = tiny_model(3, vocab=13, dtype=torch.float32)
    view, predictor = DecoderView(model), firp.FirpPredictor.for_model(model, 2, 2)
    tokens = torch.randint(4, 13, (2, 5))
    objective = Objective(view, 2, torch.ones(2), None, trains_maps=True)
    anchors = torch.zeros(2, 3, dtype=torch.long)
    scores = objective(predictor, tokens, real_rows(view, tokens, 2), anchors, anchors > 0, True)
    assert scores.kl.tolist() == [0, 0] and not predictor.weight.grad.any()
