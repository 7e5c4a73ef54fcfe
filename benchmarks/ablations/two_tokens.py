"""Drafts whose tokens follow the two tokens before them, replayed: no engine drafts them."""

from __future__ import annotations

import numpy as np
import torch
from firp.drafting.profile import ABSENT, NODES, columns, ranges
from firp.drafting.recording import Recording
from torch import Tensor
from torch.nn import functional

POSITIONS_AT_ONCE = 64


def places_and_ranks(
    second: Tensor, recording: Recording, num_offsets: int, transition: tuple[Tensor, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """`firp.drafting.recording.places_and_ranks` of a transition over two tokens, in dynamic trees alone.

    Ranks would be of static trees, and are all `ABSENT`. All K + K^2 + ... + K^k paths are weighed.

    Args:
        second: [V, r] what the token before the one before adds to the first table.
    """
    known, count = columns(num_offsets), len(recording.probabilities)
    tokens = functional.pad(recording.tokens, (0, num_offsets + 1), value=-1)
    places = np.full((count, len(NODES), len(known)), ABSENT, np.uint8)
    tables = second.cpu(), *transition
    for up, k in ranges(num_offsets):
        own = torch.stack([tokens[up + depth : up + depth + count] for depth in range(k - up + 2)], 1)
        target = slice(known[up, k, 1], known[up, k, 1] + k - up)
        drafts = recording.probabilities[:, up:k], recording.candidates[:, up:k], own
        for part in torch.arange(count).split(POSITIONS_AT_ONCE):
            places[part, :, target] = _places(*(tensor[part] for tensor in drafts), tables, up > 0).numpy()
    return places, np.full((count, len(known)), ABSENT, np.uint8)


def _places(
    probabilities: Tensor, candidates: Tensor, own: Tensor, tables: tuple[Tensor, Tensor, Tensor], first: bool
) -> Tensor:
    """Lookahead slot of the node of each of the model's own tokens in trees of `NODES` nodes, [n, len(NODES), depths].

    Args:
        probabilities, candidates: [n, depths, K].
        own: [n, depths + 2] the token before the root, the root, and the model's own tokens.
        first: whether depth 1 follows two tokens as well: the row of offset 1 knows the first of them.
    """
    second, source, target = tables
    count, depths, width = candidates.shape
    before, last = (own[:, i, None].clamp(min=0) for i in (0, 1))
    inside, number = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    # Paths are numbered by depth: the root 0, those of depth 1 from 1 on, each beside its siblings.
    reach, parents, numbers = [torch.ones(count, 1)], [torch.zeros(1, dtype=torch.int64)], []
    for depth in range(depths):
        marginal, tokens = probabilities[:, depth], candidates[:, depth]
        query = source[last].float() + (second[before].float() if first or depth else 0)
        factor = query @ target[tokens].float().mT  # [n, paths, K]
        weight = (marginal[:, None].log() + factor).softmax(-1) * marginal.sum(-1)[:, None, None]
        start = sum(part.shape[1] for part in reach)
        parents.append(torch.arange(start - last.shape[1], start).repeat_interleave(width))
        reach.append((reach[-1][..., None] * weight).flatten(1))
        before, last = last.repeat_interleave(width, 1), tokens.repeat(1, last.shape[1])
        match = tokens == own[:, depth + 2, None]
        inside, number = match.any(1) & inside, number * width + match.int().argmax(1)
        numbers.append(torch.where(inside, start + number, -1))
    every, parent, path = torch.cat(reach, 1), torch.cat(parents), torch.stack(numbers, 1)
    nodes = every.argsort(dim=1, descending=True, stable=True)
    return torch.stack([_slots(every, parent, nodes[:, 1:size], path) for size in NODES], 1).to(torch.uint8)


def _slots(reach: Tensor, parent: Tensor, nodes: Tensor, path: Tensor) -> Tensor:
    """Lookahead slots [n, depths] of paths in the trees of `nodes` [n, N - 1], as `firp_kernels.draft_tree` has them.

    Args:
        reach: [n, paths]. parent: [paths]. path: [n, depths], -1 for none.
    """
    own = reach.gather(1, nodes)
    mass = reach.scatter_add(1, parent[nodes], -own).gather(1, nodes)
    slots = nodes.gather(1, mass.argsort(dim=1, descending=True, stable=True))
    found = (slots[:, None] == path[..., None]) & (reach.gather(1, path.clamp(min=0)) > 0)[..., None]
    return torch.where(found.any(2), 1 + found.int().argmax(2), ABSENT)
