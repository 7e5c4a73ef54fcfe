"""Acceptance profiles of tiny predictors, and figures of a machine."""

import random

import firp
import torch
from firp.decoder.view import DecoderView
from firp.drafting.choices import Choice, Rung, choice_file, save_choice
from firp.drafting.profile import FILE_NAME, AcceptanceProfile, save_profile
from firp.drafting.recording import make_profile
from firp.drafting.transition import token_tables
from firp.generation.batch import greedy_answers
from firp.tools.hardware import machine_name

PLAIN = Rung(firp.TreeConfig(1, 1), 1e-3, 1.0)
TREE = (4, 1, "dynamic")


def some_prompts(seed: int, vocab: int, count: int = 5) -> list[torch.Tensor]:
    rng = random.Random(seed)
    return [torch.tensor([rng.randrange(4, vocab) for _ in range(rng.randint(1, 9))]) for _ in range(count)]


def made_profile(model, predictor, prompts=None, max_new_tokens=40) -> AcceptanceProfile:
    """Of the model's own answers to prompts; two categories in turn."""
    prompts = some_prompts(0, model.config.vocab_size) if prompts is None else prompts
    answers = greedy_answers(firp.Engine(model), prompts, max_new_tokens, batch_size=3)
    named = [(p, a, "ab"[i % 2]) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    view = DecoderView(model)
    return make_profile(view, predictor, named, token_tables(view, predictor.transition))


def engine_with(folder, model, predictor, num_offsets, rungs, sizes=(1, 2, 8)) -> firp.Engine:
    """An engine whose runs change between these trees; figures and profile are in `folder`, where FIRP_CACHE points."""
    predictor.folder = folder
    save_profile(folder / FILE_NAME, made_profile(model, predictor, max_new_tokens=5))
    made = Choice(num_offsets, None, dict.fromkeys(sizes, rungs), "firp tune")
    save_choice(choice_file(predictor), machine_name("cpu", model.dtype), made)
    return firp.Engine(model, predictor)


def rung(num_nodes, num_lookahead, kind, milliseconds=1.25, tau=1.5):
    return Rung(firp.TreeConfig(num_nodes, num_lookahead, kind), 1e-3 * milliseconds, tau)


def choice(trees, num_offsets=2, head=None, made_by="firp tune"):
    batches = {size: (PLAIN, *(rung(*tree) for tree in some)) for size, some in trees.items()}
    return Choice(num_offsets, head, batches, made_by)
