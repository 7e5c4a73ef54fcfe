"""The cost of training on paper, against the operations that torch counts in training and the files it writes."""

import pytest
import torch
from firp.decoder.passes import real_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import UnitEmbeddings
from firp.engine.weights import weights_of
from firp.tools.shapes import named_config
from firp.train.objective import Objective
from firp.train.plan import training_work
from firp.train.rows import row_width
from models import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

TOKENS, ANCHORS, OFFSETS, INSERTION, RANK = 12, 3, 2, 1, 5


def counted(work):
    with FlopCounterMode(display=False) as counter:
        found = work()
    return found, counter.get_total_flops()


@pytest.mark.parametrize("family, width", [("llama", 0), ("llama", 6), ("qwen3", 0), ("mistral", 0)])
def test_operations_are_those_that_torch_counts(family, width, monkeypatch):
    """At anchors that predict other positions each, as the plan counts them."""
    model = tiny_model(1, family, vocab=23, dtype=torch.float32).requires_grad_(False)
    view = DecoderView(model)
    rotary = view.rotary

    def uncounted(*rows):
        with _disable_current_modes():  # angles are a product there
            return rotary(*rows)

    monkeypatch.setattr(view, "rotary", uncounted)
    predictor = FirpPredictor.for_model(model, OFFSETS, INSERTION, transition_rank=RANK, update_width=width)
    objective = Objective(view, INSERTION, torch.ones(OFFSETS), UnitEmbeddings(view), trains_maps=True)
    tokens = torch.randint(4, 23, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    anchors, valid = torch.tensor([[0, 3, 7]]), torch.ones(1, ANCHORS, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count its fused attention on a CPU
        real, base = counted(lambda: real_rows(view, tokens, INSERTION))
    _, forward = counted(lambda: objective(predictor, tokens, real, anchors, valid, want_gradient=False))
    _, both = counted(lambda: objective(predictor, tokens, real, anchors, valid, want_gradient=True))
    weights = weights_of(model.config, torch.float32)
    work = training_work(model.config, weights, TOKENS, ANCHORS, OFFSETS, INSERTION, RANK, width)
    # The scores of the transition's candidates are sums of elementwise products, which neither counts.
    assert (work.base, work.targets + work.pseudo, work.backward) == (base, forward, both - forward)
    assert work.total == base + both


def test_kept_rows_are_what_a_token_takes():
    """LLaMA-2-7B at t = 16: 2 x 4096 numbers, and keys and values of 16 layers."""
    assert row_width(named_config("llama2-7b"), 16) == 2 * 4096 + 2 * 16 * 4096
