"""The transition and the update: what they learn."""

import firp
import pytest
import torch
from firp.decoder.passes import pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.transition import UnitEmbeddings
from firp.drafting.trees import MAX_RANKS
from firp.train.objective import Objective
from models import tiny_model, update_predictor

from firp_kernels.ops.update_states import updated

ANCHORS = torch.arange(3, 9)


def scores(model, predictor, tokens, want_gradient=False, trains_maps=True):
    view = DecoderView(model)
    weights = torch.tensor([1.0, 0.5, 0.25])[: predictor.num_offsets]
    objective = Objective(view, 2, weights, UnitEmbeddings(view), trains_maps)
    anchors = ANCHORS.expand(len(tokens), -1)
    return objective(
        predictor, tokens, real_rows(view, tokens, 2), anchors, torch.ones_like(anchors).bool(), want_gradient
    )


@pytest.fixture
def model():
    return tiny_model(2, vocab=23, dtype=torch.float32)


@pytest.fixture
def tokens():
    return torch.randint(4, 23, (3, 14), generator=torch.Generator().manual_seed(1))


def own_loss(model, predictor, tokens):
    """KL of the updated rows and cross-entropy of the model's distribution over their candidates, and how often its
    choice is first, row by row."""
    view, embed = DecoderView(model), UnitEmbeddings(DecoderView(model))
    real, weights = real_rows(view, tokens, 2), predictor.update_weights("cpu", torch.float32)
    rows = pseudo_rows(view, predictor.weight, real, ANCHORS.expand(len(tokens), -1), 2)
    source, target = predictor.transition
    total, hits = torch.zeros(predictor.num_offsets), torch.zeros(predictor.num_offsets)
    for b in range(len(tokens)):
        for a, anchor in enumerate(ANCHORS.tolist()):
            states = updated(rows[b, a][None], view.embed(tokens[b, anchor + 1][None]), *weights)[0]
            for j in range(predictor.num_offsets):
                position = anchor + 1 + j
                student = view.logits(states[j][None])[0]
                listed = torch.full_like(student, float("-inf"))
                listed[predictor.draft_tokens] = student.detach()[predictor.draft_tokens]
                best = listed.topk(min(MAX_RANKS, len(predictor.draft_tokens)))
                # The first row knows the token before.
                query = embed(tokens[b, position]) @ source * (j > 0)
                share = (best.values + embed(best.indices) @ target @ query).log_softmax(-1)
                teacher = view.logits(real.final[b, position][None])[0]
                goal = teacher[best.indices].softmax(-1)
                total[j] -= (goal * share).sum()
                total[j] += (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum()
                hits[j] += best.indices[share.argmax()] == teacher.argmax()
    return total, hits


@pytest.mark.parametrize("listed", [18, 9])
def test_the_loss_is_the_models_distribution_over_the_candidates(model, tokens, listed):
    """Its gradient is that of the loss summed row by row."""
    predictor = update_predictor(model, 3, listed=listed)
    with torch.no_grad():
        for tensor in (*predictor.update_tensors, predictor.transition):
            tensor.mul_(0.3)
        assert torch.equal(scores(model, predictor, tokens).followed1, own_loss(model, predictor, tokens)[1])
    scores(model, predictor, tokens, want_gradient=True, trains_maps=False)
    weights = torch.tensor([1.0, 0.5, 0.25]) / (len(tokens) * len(ANCHORS))
    learning = {name: tensor for name, tensor in predictor.named_parameters() if name != "weight"}
    assert predictor.weight.grad is None
    (own_loss(model, predictor, tokens)[0] * weights).sum().backward(inputs=[*learning.values()] or None)
    for name, tensor in learning.items():
        assert tensor.grad.any(), name
    doubled = {name: tensor.grad.clone() for name, tensor in learning.items()}  # both gradients, added up
    for tensor in learning.values():
        tensor.grad = None
    scores(model, predictor, tokens, want_gradient=True, trains_maps=False)
    for name, tensor in learning.items():
        torch.testing.assert_close(2 * tensor.grad, doubled[name], rtol=2e-3, atol=1e-5, msg=name)


def test_what_an_update_reads_of_the_states_leaves_the_maps_gradient_as_it_is(model, tokens):
    """The maps learn by the states that are scored."""
    predictor = update_predictor(model, 3)
    plain = firp.FirpPredictor.for_model(model, 3, 2, transition_rank=5)
    with torch.no_grad():
        plain.weight.copy_(predictor.weight)
        predictor.update_outputs.zero_()
    found, bare = (scores(model, one, tokens, want_gradient=True) for one in (predictor, plain))
    assert torch.equal(predictor.weight.grad, plain.weight.grad)
    assert torch.equal(found.kl, bare.kl) and torch.equal(found.top4, bare.top4)
