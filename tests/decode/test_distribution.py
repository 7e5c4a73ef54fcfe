"""Sampling is lossless: joint frequencies of three tokens against exact enumeration, for any tree and
predictor."""

import importlib
from collections import Counter

import firp
import pytest
import torch
from exact import chi_square, joint_distribution
from firp.drafting.choices import Rung
from firp.drafting.lookup import Lookup
from firp.engine.state import gather_rows
from firp.generation.padding import without_padding
from firp.sampling import processors
from firp.sampling.typical import Typical, TypicalAcceptance
from models import EOS, PREDICTORS, tiny_model, tiny_predictor
from profiles import engine_with
from transformers.generation import logits_process as hf

TOKENS, BATCH, VOCAB = 3, 4000, 6
PROMPT = torch.tensor([[4]])

SHAPES = [
    *[firp.TreeConfig(n, p) for n, p in ((2, 1), (3, 2), (4, 1), (5, 3), (6, 2), (8, 8), (8, 1), (12, 4), (16, 3),
    (24, 2))],
    *[firp.TreeConfig(n, p, "static") for n, p in ((3, 1), (5, 2), (8, 3), (13, 1))],
    *[
        firp.TreeConfig(len(paths) + 1, lookahead, "static", paths)
        for lookahead, paths in (
            (1, ((0,), (0, 0), (0, 0, 0))),
            (3, ((0,), (1,), (2,), (3,), (4,), (5,))),
            (2, ((5,), (4,))),
            (4, ((1,), (1, 1), (1, 1, 1))),
            (2, ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))),
            (7, ((0,), (0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5))),
        )
    ],
]  # fmt: skip
CHAINS = [
    {"top_k": 0},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 1.2, "top_k": 0, "top_p": 0.9, "min_p": 0.03},
    {"top_k": 0, "repetition_penalty": 1.4, "typical_p": 0.9, "suppress_tokens": [1]},
    {"top_k": 0, "no_repeat_ngram_size": 2, "bad_words_ids": [[5, 4], [2]], "min_new_tokens": 2,
    "epsilon_cutoff": 0.02},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = tiny_model(2, vocab=VOCAB, dtype=torch.float32, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    with torch.no_grad():
        model.lm_head.weight.div_(3)
    return model


@pytest.fixture(scope="module")
def expected(model):
    return [joint_distribution(model, PROMPT, TOKENS, **chain) for chain in CHAINS]


def draw(engine: firp.Engine, draws: int, prompt: torch.Tensor = PROMPT, **options) -> Counter:
    """Outcomes of `draws` samples; identical prompts are identified by their index in the batch."""
    counts = Counter()
    for seed in range(draws // BATCH):
        out = firp.generate(
            engine.model,
            prompt.repeat(BATCH, 1),
            engine=engine,
            seed=seed,
            max_new_tokens=TOKENS,
            do_sample=True,
            **options,
        )
        for row in out[:, prompt.shape[1] :].tolist():
            counts[tuple(row[: row.index(EOS) + 1] if EOS in row else row)] += 1
    return counts


def test_the_shapes_differ():
    assert len({repr(shape) for shape in SHAPES}) == len(SHAPES) >= 20 and len(CHAINS) == 5


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_joint_frequencies_are_the_models_own(model, expected, shape, pytestconfig):
    """Shapes meet chains and predictors in turn, so that each of the five chains meets shapes and predictors of all
    kinds.
    """
    draws = 200_000 if pytestconfig.getoption("exhaustive") else 2 * BATCH
    chain = shape % len(CHAINS)
    predictor = tiny_predictor(model, shape, PREDICTORS[shape % len(PREDICTORS)], layer=1)
    counts = draw(firp.Engine(model, predictor, SHAPES[shape]), draws, **CHAINS[chain])
    assert chi_square(counts, expected[chain]) > 1e-4


@pytest.mark.parametrize("chain", [0, 2, 3])
def test_joint_frequencies_with_branches_of_earlier_text(model, tmp_path, monkeypatch, chain):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lookup, "pays", lambda *_: 3)
    rungs = Rung(firp.TreeConfig(1, 1), 1.0, 1.0), Rung(firp.TreeConfig(4, 2), 1.0, 1.8)
    engine = engine_with(tmp_path, model, tiny_predictor(model, 1, layer=1), 3, rungs, sizes=(1, 4096))
    look_up, grown = engine.look_up, []

    def watched(state, record, num_branch):
        own = look_up(state, record, num_branch)
        grown.append(state.tree.size[0] - own)
        return own

    monkeypatch.setattr(engine, "look_up", watched)
    prompt = torch.tensor([[4, 5, 4, 5, 4, 3, 4, 5]])
    counts = draw(engine, 2 * BATCH, prompt, **CHAINS[chain])
    assert max(grown) > 0, "the tree has a branch"
    assert chi_square(counts, joint_distribution(model, prompt, TOKENS, **CHAINS[chain])) > 1e-4


def test_top_p_without_a_sort_keeps_the_distribution(model, expected, monkeypatch):
    """As on a GPU, where the op stands in for Hugging Face's processor."""
    own = processors._process_rows

    def on_a_gpu(ops, processor, scores):
        if type(processor) is not hf.TopPLogitsWarper:
            return own(ops, processor, scores)
        return ops.keep_top_p(scores, processor.top_p, processor.min_tokens_to_keep, processor.filter_value)

    monkeypatch.setattr(processors, "_process_rows", on_a_gpu)
    counts = draw(firp.Engine(model, tiny_predictor(model, 2, layer=1), firp.TreeConfig(6, 2)), 12_000, **CHAINS[2])
    assert chi_square(counts, expected[2]) > 1e-4


class Watched:
    """A draft of an engine's step that keeps the probability with which each node was proposed: q of min(1, p / q)."""

    def __init__(self, engine):
        self.ops, self.draft = engine.ops, engine._step.draft
        engine._step.draft = self

    def __call__(self, state, *others):
        top_marginals, kept = self.ops.top_marginals, []

        def keep(*arguments):
            kept.append(top_marginals(*arguments))
            return kept[0]

        self.ops.top_marginals = keep
        try:
            tree = self.draft(state, *others)
        finally:
            self.ops.top_marginals = top_marginals
        self.proposed = torch.ones(BATCH, tree.tokens.shape[1])
        if kept:
            level = (tree.depths.long() - 1).clamp(min=0)
            probabilities, candidates = (gather_rows(rows, level) for rows in kept[0])
            self.proposed[state.sequence] = torch.where(candidates == tree.tokens[..., None], probabilities, 0).sum(-1)
        return tree


class Biased(Typical):
    """Accepts a draft with probability min(1, p / q), as if it had been drawn from q, and not chosen."""

    def __init__(self, watched, *others):
        super().__init__(TypicalAcceptance(), *others)
        self.watched = watched
        self.coins = torch.Generator().manual_seed(0)

    def probabilities(self, scores, state):
        self.sequence = state.sequence
        return super().probabilities(scores, state)

    def acceptable(self, before, drafts):
        chance = before.gather(-1, drafts[..., None])[..., 0]
        proposed = self.watched.proposed[self.sequence] if drafts.shape[1] > 1 else torch.ones_like(chance)
        return torch.rand(chance.shape, generator=self.coins) < chance / proposed


@pytest.mark.parametrize("chain", range(len(CHAINS)))
def test_a_biased_rule_fails_this_test(model, expected, monkeypatch, chain, pytestconfig):
    engine = firp.Engine(model, tiny_predictor(model, 4, "random", layer=1), firp.TreeConfig(6, 2))
    watched = Watched(engine)
    if chain == 0 or pytestconfig.getoption("exhaustive"):  # the watch itself biases nothing
        assert chi_square(draw(engine, 2 * BATCH, **CHAINS[chain]), expected[chain]) > 1e-4

    def biased(engine, processors, seed, acceptance, out, prompts, pad_token):
        return Biased(watched, engine.ops, without_padding(processors, prompts), seed, out.history, prompts.padding)

    monkeypatch.setattr(importlib.import_module("firp.generation.generate"), "_chooser", biased)
    assert chi_square(draw(engine, BATCH, **CHAINS[chain]), expected[chain]) < 1e-12


def test_typical_acceptance_is_lossy_as_it_says(model, expected):
    """It accepts more, every outcome stays possible, and this test sees the difference."""
    engine = firp.Engine(model, tiny_predictor(model, 4, "random", layer=1), firp.TreeConfig(6, 2))
    options = {"top_k": 0, "return_dict_in_generate": True, "seed": 1, "max_new_tokens": 30, "do_sample": True}
    typical = TypicalAcceptance()
    steps = [
        firp.generate(model, PROMPT.repeat(50, 1), engine=engine, acceptance=acceptance, **options).stats.tau
        for acceptance in (None, typical)
    ]
    assert steps[1] > steps[0] + 0.1
    assert chi_square(draw(engine, 2 * BATCH, acceptance=typical, **CHAINS[0]), expected[0]) < 1e-12
    # A bound that no probability exceeds accepts nothing but the model's own draws.
    strict = TypicalAcceptance(epsilon=1.0, delta=1e9)
    exact = draw(engine, BATCH, **CHAINS[0])
    assert draw(engine, BATCH, acceptance=strict, **CHAINS[0]) == exact
