"""The refiner: what it starts from, what it learns, and what it is given."""

import firp
import numpy as np
import pytest
import torch
from firp.decoder.passes import pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.refiner import Refiner, unit
from firp.train.data import TextDataset, frequent_tokens
from firp.train.objective import Objective
from models import tiny_model


def made(model, offsets=3, width=16, spread=0.0, **others):
    torch.manual_seed(0)
    predictor = firp.FirpPredictor.for_model(model, offsets, 2, refiner_width=width, **others)
    with torch.no_grad():
        predictor.refiner_inputs.normal_(0.0, 0.2)
        predictor.refiner_outputs.normal_(0.0, spread) if spread else None
    return predictor


def scores(model, predictor, tokens, want_gradient=False, trains_maps=True):
    view = DecoderView(model)
    objective = Objective(view, 2, torch.ones(predictor.num_offsets), None, trains_maps)
    anchors = torch.arange(3, 9).expand(len(tokens), -1)
    return objective(
        predictor, tokens, real_rows(view, tokens, 2), anchors, torch.ones_like(anchors).bool(), want_gradient
    )


@pytest.fixture
def model():
    return tiny_model(2, vocab=23, dtype=torch.float32)


@pytest.fixture
def tokens():
    return torch.randint(4, 23, (3, 14), generator=torch.Generator().manual_seed(1))


def test_outputs_of_zero_change_nothing(model, tokens):
    predictor = made(model)
    plain = firp.FirpPredictor.for_model(model, 3, 2)
    refined, bare = scores(model, predictor, tokens), scores(model, plain, tokens)
    assert torch.equal(refined.kl, bare.kl) and torch.equal(refined.top4, bare.top4)
    state, root = torch.randn(4, 3, model.config.hidden_size), torch.randn(4, model.config.hidden_size)
    refiner = predictor.refiner("cpu", torch.float32)
    assert torch.equal(refiner.marginal(state, refiner.inner(state, root)), state)


def test_states_are_updated_as_the_formula_says():
    torch.manual_seed(0)
    refiner = Refiner(torch.randn(2, 3, 5, 4).double(), torch.randn(2, 5).double(), torch.randn(2, 4, 5).double())
    states, root, parent = torch.randn(3, 2, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    inner = refiner.inner(states, root)
    for depth in range(2):
        state = states[:, depth]
        alone, found = (refiner.updated(depth, state, inner[:, depth], token) for token in (None, parent))
        assert torch.equal(refiner.marginal(states, inner)[:, depth], alone)
        a, bias, b = refiner.inputs[depth], refiner.bias[depth], refiner.outputs[depth]
        for i in range(3):
            size = (state[i].pow(2).mean() + 1e-6).sqrt()
            known = a[0] @ (state[i] / size) + a[1] @ root[i] + bias
            for row, part in ((alone[i], known), (found[i], known + a[2] @ parent[i])):
                expected = state[i] + size * (b @ (part * torch.sigmoid(part)))
                torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unit(state).pow(2).mean(-1), torch.ones(3).double(), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_loss(model, tokens):
    """Against differences of the loss in float64, for the maps and every tensor of the refiner."""
    model = model.double()
    predictor = made(model, offsets=2, width=3, spread=0.1).double()
    tokens = tokens[:1]

    def loss():
        # What is summed for the gradient: rows given the first token, given the token before, and from one token later.
        view = DecoderView(model)
        seen = []
        objective = Objective(view, 2, torch.ones(2).double(), None, True)
        refine = objective._refine
        anchors = torch.arange(3, 9)[None]
        total = 0.0

        class Watched(Objective):
            def _refine(self, predictor, part):
                marginal, conditional = refine(predictor, part)
                seen.append((view.logits(marginal).float(), view.logits(conditional).float(), part))
                return marginal, conditional

        watched = Watched(view, 2, torch.ones(2).double(), None, True)
        rows = real_rows(view, tokens, 2)
        predictor.zero_grad()
        watched(predictor, tokens, rows, anchors, torch.ones_like(anchors).bool(), True)
        for marginal, conditional, part in seen:
            teacher = part.teacher.log_softmax(-1)
            for student, goal in ((marginal, teacher), (conditional, teacher[:, 1:])):
                if student.shape[1]:
                    divergence = (goal.exp() * (goal - student.detach().log_softmax(-1))).sum(-1)
                    total += float((divergence * part.weights[-student.shape[1] :]).sum())
        return total

    loss()
    gradients = {name: parameter.grad.clone() for name, parameter in predictor.named_parameters()}
    for name, parameter in predictor.named_parameters():
        place = int(gradients[name].abs().argmax())
        with torch.no_grad():
            flat, step = parameter.view(-1), 1e-2  # scores are float32, so a smaller step drowns
            flat[place] += step
            above = loss()
            flat[place] -= 2 * step
            below = loss()
            flat[place] += step
        assert (above - below) / (2 * step) == pytest.approx(float(gradients[name].view(-1)[place]), rel=5e-3), name


def test_a_refiner_and_a_transition_exclude_each_other(model):
    with pytest.raises(ValueError, match="refiner_width: got 4 beside transition_rank 2, expected 0 for one of them"):
        firp.FirpPredictor.for_model(model, 2, 2, refiner_width=4, transition_rank=2)
    with pytest.raises(ValueError, match="refiner_width: got -1, expected 0"):
        firp.FirpPredictor.for_model(model, 2, 2, refiner_width=-1)


def test_the_first_offsets_keep_their_refiner(model, tmp_path):
    predictor = made(model, spread=0.1)
    predictor.save_pretrained(tmp_path)
    fewer = firp.load_predictor(tmp_path).first_offsets(2)
    assert torch.equal(fewer.refiner_inputs, predictor.refiner_inputs[:2]) and fewer.refiner_width == 16
    assert torch.equal(fewer.refiner_outputs, predictor.refiner_outputs[:2])


def test_a_list_of_all_tokens_learns_as_no_list_does(model, tokens):
    whole, listed = made(model, spread=0.1), made(model, spread=0.1, draft_vocabulary=23)
    expected, found = (scores(model, predictor, tokens, want_gradient=True) for predictor in (whole, listed))
    for name in ("kl", "top1", "top4", "followed1", "followed4"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(listed.refiner_outputs.grad, whole.refiner_outputs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(listed.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-5)


def test_scores_over_a_list(model, tokens):
    """The divergence is between the shares of listed tokens, and a choice that is not listed is no hit. Steps that learn
    take the choice among the listed ones."""
    some = [4, 7, 9, 15]
    predictor = made(model, spread=0.1, draft_vocabulary=len(some))
    predictor.draft_tokens = torch.tensor(some)
    found, learning = scores(model, predictor, tokens), scores(model, predictor, tokens, want_gradient=True)
    torch.testing.assert_close(learning.kl, found.kl, rtol=1e-5, atol=1e-5)
    view, anchors = DecoderView(model), torch.arange(3, 9).expand(len(tokens), -1)
    real = real_rows(view, tokens, 2)
    rows = pseudo_rows(view, predictor.weight, real, anchors, 2)
    known = unit(view.embed(tokens[:, 4:10])).flatten(0, 1)
    refiner = predictor.refiner("cpu", torch.float32)
    states = refiner.marginal(rows.flatten(0, 1), refiner.inner(rows.flatten(0, 1), known)).unflatten(
        0, (len(tokens), -1)
    )
    for j in range(3):
        teacher = view.logits(real.final[:, 4 + j : 10 + j])
        updated = view.logits(states[:, :, j])[..., some]
        goal, student = teacher[..., some].log_softmax(-1), updated.log_softmax(-1)
        torch.testing.assert_close(found.kl[j], (goal.exp() * (goal - student)).sum(), rtol=1e-4, atol=1e-4)
        hits = torch.tensor(some)[student.argmax(-1)] == teacher.argmax(-1)
        assert learning.top1[j] == (student.argmax(-1) == goal.argmax(-1)).sum()
        assert found.top1[j] == hits.sum() and found.top4[j] == torch.isin(teacher.argmax(-1), torch.tensor(some)).sum()


def test_the_most_frequent_tokens_of_answers_are_listed():
    data = TextDataset(
        np.array([5, 5, 5, 3, 2, 2, 9, 5, 3, 8, 8, 1], np.uint16), np.array([0, 7, 12]), np.array([3, 1], np.int32)
    )
    assert frequent_tokens(data, np.array([0, 1]), 3, 11).tolist() == [2, 3, 8]
    assert frequent_tokens(data, np.array([0]), 2, 11).tolist() == [2, 3]


def test_a_list_needs_a_refiner(model):
    with pytest.raises(ValueError, match=r"draft_vocabulary: got 5, expected 0\.\.0"):
        firp.FirpPredictor.for_model(model, 2, 2, draft_vocabulary=5)
    with pytest.raises(ValueError, match=r"draft_vocabulary: got 24, expected 0\.\.23"):
        firp.FirpPredictor.for_model(model, 2, 2, refiner_width=2, draft_vocabulary=24)
