"""The token transition: its tables, and that training finds which token follows which."""

import gc
import weakref

import numpy as np
import torch
from firp.decoder.view import DecoderView
from firp.drafting import transition
from firp.drafting.transition import UnitEmbeddings, token_tables
from firp.train.objective import Objective
from firp.train.targets import Targets
from models import tiny_model, tiny_predictor


def test_tables_are_linear_in_embeddings_of_unit_mean_square(monkeypatch):
    monkeypatch.setattr("firp.drafting.transition.TOKENS_AT_ONCE", 4)
    for family in ("llama", "granite"):
        model = tiny_model(2, family, vocab=11)
        view, predictor = DecoderView(model), tiny_predictor(model, 0)
        table = model.get_input_embeddings().weight.detach().float()
        unit = table / table.pow(2).mean().sqrt()
        torch.testing.assert_close(UnitEmbeddings(view)(torch.arange(11)), unit, rtol=1e-5, atol=1e-6)
        source, target = token_tables(view, predictor.transition)
        assert source.shape == target.shape == (11, 5) and source.dtype == model.dtype
        torch.testing.assert_close(
            source.float(), unit @ predictor.transition[0].detach().float(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            target.float(), unit @ predictor.transition[1].detach().float(), rtol=1e-4, atol=1e-5
        )
        assert token_tables(view, None) is None


def test_the_transition_learns_a_successor_rule():
    """Flat scores know nothing; the choice is always the token one above the one before. (Token 0 has no embedding.)"""
    torch.manual_seed(0)
    model = tiny_model(3, vocab=13, dtype=torch.float32)
    view, predictor = DecoderView(model), tiny_predictor(model, 0)
    objective = Objective(view, 2, torch.ones(1), UnitEmbeddings(view), trains_maps=False)
    previous = torch.arange(1, 13)[:, None]
    teacher, rows = torch.zeros(12, 1, 13), torch.zeros(12, 1, model.config.hidden_size)
    targets = Targets.of(rows[..., 0], torch.zeros(12, 1, 13), teacher.scatter(2, previous[..., None] % 12 + 1, 50.0))
    optimizer = torch.optim.AdamW([predictor.transition], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss, rank = objective.follow(predictor, previous, targets)
        loss.mean().backward()
        optimizer.step()
    assert bool((rank == 0).all()) and float(loss.detach().mean()) < 0.1


def test_a_choice_outside_the_candidates_has_the_rank_after_the_last():
    """The loss is over the candidates alone."""
    model = tiny_model(4, vocab=40, dtype=torch.float32)
    view, predictor = DecoderView(model), tiny_predictor(model, 0)
    objective = Objective(view, 2, torch.ones(1), UnitEmbeddings(view), trains_maps=False)
    scores = torch.from_numpy(np.linspace(1.0, 0.0, 40, dtype=np.float32))[None, None]
    teacher = torch.zeros(1, 1, 40).index_fill(2, torch.tensor([30]), 50.0)
    targets = Targets.of(torch.zeros(1, 1), scores, teacher)
    loss, rank = objective.follow(predictor, torch.tensor([[5]]), targets)
    source, target = (part.float() for part in token_tables(view, predictor.transition))
    share = (scores[0, 0, :16] + target[:16] @ source[5]).log_softmax(0)
    torch.testing.assert_close(loss, -share.mean()[None, None], rtol=1e-5, atol=1e-6)
    assert rank.tolist() == [[16]]


def test_a_choice_has_its_place_among_all_tokens_and_among_the_candidates():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, 2, 50, 60, generator=generator)
    targets = Targets.of(torch.rand(2, 50, generator=generator), student, teacher)
    order = student.argsort(-1, descending=True)
    assert torch.equal(order.gather(-1, targets.rank[..., None])[..., 0], teacher.argmax(-1))
    inside = targets.rank < 16
    assert torch.equal(targets.place[inside], targets.rank[inside]) and bool((targets.place[~inside] == 16).all())


def test_tables_are_made_once_for_a_model_and_a_predictor(monkeypatch):
    made, make = [], transition._tables_of
    monkeypatch.setattr(transition, "_tables_of", lambda *others: made.append(1) or make(*others))
    model = tiny_model(1)
    predictor, other = tiny_predictor(model, 1), tiny_predictor(model, 2)
    first = token_tables(DecoderView(model), predictor.transition)
    assert token_tables(DecoderView(model), predictor.first_offsets(2).transition) is first and len(made) == 1
    token_tables(DecoderView(model), other.transition)
    assert len(made) == 2
    changed = token_tables(DecoderView(model), predictor.transition)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(torch.linspace(1, 2, model.config.hidden_size))
    assert not torch.equal(token_tables(DecoderView(model), predictor.transition)[0], changed[0]) and len(made) == 4
    kept = weakref.ref(model.get_input_embeddings())
    del model
    gc.collect()
    assert kept() is None
