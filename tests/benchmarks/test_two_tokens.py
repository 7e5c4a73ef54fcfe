"""Drafts after two tokens: replayed as the engine would draft them if the second table were all it lacked."""

import itertools
import math

import torch
from firp.drafting import recording as recordings
from firp.drafting.profile import ABSENT, NODES, columns

from benchmarks.ablations.two_tokens import places_and_ranks

RANK, OFFSETS = 3, 3


def made(count: int, width: int, vocabulary: int) -> tuple:
    """A recording of one answer with shuffled candidates, and three tables."""
    generator = torch.Generator().manual_seed(vocabulary)
    scores = torch.rand(count, OFFSETS, vocabulary, generator=generator).log() * 2
    probabilities, candidates = scores.softmax(-1).topk(width, -1)
    tokens = torch.randint(vocabulary, (count + 1,), generator=generator)
    tables = [torch.randn(vocabulary, RANK, generator=generator) for _ in range(3)]
    return recordings.Recording(tokens, probabilities, candidates), *tables


def test_without_a_second_table_it_is_the_engines_own_draft():
    recording, _, source, target = made(150, 16, 40)
    nothing = torch.zeros_like(source)
    found, ranks = places_and_ranks(nothing, recording, OFFSETS, (source, target))
    expected, _ = recordings.places_and_ranks(recording, OFFSETS, (source, target))
    assert (found == expected).all() and (ranks == ABSENT).all()
    assert 0.05 < (found != ABSENT).mean() < 0.95


def test_every_path_is_weighed_by_the_two_tokens_before():
    """The most probable paths of a few candidates, each reckoned by itself."""
    recording, second, source, target = made(30, 4, 8)
    found, _ = places_and_ranks(second, recording, OFFSETS, (source, target))
    known, tokens = columns(OFFSETS), recording.tokens.tolist()
    seen = 0
    for position, up in itertools.product(range(20), range(OFFSETS)):
        root, before = tokens[position + up + 1], tokens[position + up]
        joint = {(): 1.0}
        for depth in range(OFFSETS - up):
            choices = recording.candidates[position, up + depth].tolist()
            marginal = recording.probabilities[position, up + depth]
            for path in [path for path in joint if len(path) == depth]:
                history = [before, root, *path]
                query = source[history[-1]] + (second[history[-2]] if up + depth else 0)
                weight = marginal * torch.tensor([math.exp(query @ target[token]) for token in choices])
                for token, share in zip(choices, (weight / weight.sum() * marginal.sum()).tolist(), strict=True):
                    joint[(*path, token)] = joint[path] * share
        order = sorted(joint, key=joint.get, reverse=True)
        own = tokens[position + up + 2 : position + OFFSETS + 2]
        for i, nodes in enumerate(NODES):
            tree = order[:nodes]
            mass = {path: joint[path] - sum(joint[child] for child in tree if child[:-1] == path) for path in tree[1:]}
            slots = [(), *sorted(mass, key=mass.get, reverse=True)]
            for depth in range(1, OFFSETS - up + 1):
                expected = slots.index(tuple(own[:depth])) if tuple(own[:depth]) in slots else ABSENT
                assert found[position, i, known[up, OFFSETS, depth]] == expected
                seen += expected != ABSENT
    assert seen > 200
