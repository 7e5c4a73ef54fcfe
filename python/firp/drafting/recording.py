"""What a predictor drafts at every position of the model's answers, recorded in one pass over each.

The model's own output does not depend on the tree, and neither do a position's marginals: a lookahead node on the
accepted path sees the text alone. So drafting, verification and the nearest lookahead ancestor can be replayed for any
tree without the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import firp_kernels
from firp.decoder.passes import pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import ABSENT, NODES, AcceptanceProfile, columns, ranges
from firp.drafting.transition import condition
from firp.drafting.trees import MAX_RANKS, Drafter, DraftTree, TreeConfig
from firp.drafting.update import Updater
from firp_kernels import top_marginals

ANCHORS_AT_ONCE = 64


@dataclass(frozen=True)
class Recording:
    """One answer of the model, and the marginals at each of its positions.

    Attributes:
        tokens: [n + 1] int64, the last prompt token (the first root), then n new tokens.
        probabilities: [n, k, K] float32; [i, j] is the top-K marginal of pseudo[i, j + 1], descending, where i counts
            from the first root. It is for token i + j + 2.
        candidates: [n, k, K] int64 their tokens.
        knows_next: whether the marginals are given the token after their position.
    """

    tokens: Tensor
    probabilities: Tensor
    candidates: Tensor
    knows_next: bool = False


@torch.no_grad()
def record(view: DecoderView, predictor: FirpPredictor, prompt: Tensor, answer: list[int], num_ranks: int) -> Recording:
    """Marginals at every position of the answer that can be a root or an accepted node, with their top `num_ranks`.

    Args:
        prompt: [T] int64. answer: n new tokens.
    """
    tokens = torch.cat([prompt, torch.tensor(answer)])
    layer, device = predictor.insertion_layer, view.device
    real = real_rows(view, tokens[None, :-1].to(device), layer)
    weight = predictor.weight.to(device, view.dtype)
    updater = None
    if predictor.update_width:
        updater = Updater(view, predictor, predictor.num_offsets, firp_kernels.bind(None))
    own = tokens.to(device)
    parts: list[tuple[Tensor, Tensor]] = []
    positions = torch.arange(len(prompt) - 1, len(tokens) - 1, device=device)
    for anchors in positions.split(ANCHORS_AT_ONCE):
        rows = pseudo_rows(view, weight, real, anchors[None], layer)[0]
        logits = view.logits(rows) if updater is None else updater.scores(rows, own[anchors + 1])
        offsets = torch.arange(logits.shape[1], device=device).expand(logits.shape[:2])
        probabilities, candidates = top_marginals(logits, offsets, min(num_ranks, logits.shape[-1]))
        parts.append((probabilities, candidates if updater is None else updater.head.tokens_at(candidates)))
    probabilities, candidates = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Recording(tokens[len(prompt) - 1 :], probabilities, candidates, updater is not None)


@torch.no_grad()
def make_profile(
    view: DecoderView,
    predictor: FirpPredictor,
    answers: list[tuple[Tensor, list[int], str]],
    tables: tuple[Tensor, Tensor] | None,
) -> AcceptanceProfile:
    """The acceptance profile of a predictor at every position of some answers.

    Args:
        answers: prompt [T] int64, n new tokens of the model, category.
        tables: of the predictor's token transition (`firp.drafting.transition.token_tables`).

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("answers: got none, expected at least one")
    transition = None if tables is None else (tables[0].cpu(), tables[1].cpu())
    categories = sorted({category for _, _, category in answers})
    recordings = [record(view, predictor, prompt, answer, MAX_RANKS) for prompt, answer, _ in answers]
    parts = [places_and_ranks(recording, predictor.num_offsets, transition) for recording in recordings]
    return AcceptanceProfile(
        num_offsets=predictor.num_offsets,
        fingerprint=predictor.fingerprint(),
        lengths=np.array([len(answer) for _, answer, _ in answers], np.int32),
        category=np.array([categories.index(category) for _, _, category in answers], np.int32),
        categories=tuple(categories),
        places=np.concatenate([places for places, _ in parts]),
        ranks=np.concatenate([ranks for _, ranks in parts]),
    )


def places_and_ranks(
    recording: Recording, num_offsets: int, transition: tuple[Tensor, Tensor] | None
) -> tuple[np.ndarray, np.ndarray]:
    """`places` and `ranks` of one answer, as in `AcceptanceProfile`."""
    ops, known = firp_kernels.bind(None), columns(num_offsets)
    count = len(recording.probabilities)
    # Tokens past the answer: never drafted.
    tokens = functional.pad(recording.tokens, (0, num_offsets + 1), value=-1)
    places = np.full((count, len(NODES), len(known)), ABSENT, np.uint8)
    ranks = np.full((count, len(known)), ABSENT, np.uint8)
    for up, k in ranges(num_offsets):
        probabilities, candidates = (p[:, up:k].contiguous() for p in (recording.probabilities, recording.candidates))
        # The root is `up` levels after the position's next token.
        own = torch.stack([tokens[up + 1 + depth : up + 1 + depth + count] for depth in range(k - up + 1)], 1)
        roots, usable = own[:, 0].clamp(min=0), torch.full((count,), k - up, dtype=torch.int32)
        knows_root = torch.full((count,), up == 0) if recording.knows_next else None
        first = known[up, k, 1]
        target = slice(first, first + k - up)
        for i, num_nodes in enumerate(NODES):
            drafter = Drafter(TreeConfig(num_nodes, num_nodes), k - up, ops, transition)
            given, among = (p[..., : drafter.num_ranks].contiguous() for p in (probabilities, candidates))
            tree = drafter.draft(given, among, roots, usable, knows_root)
            places[:, i, target] = _places(tree, own)
        ranks[:, target] = _ranks(probabilities, candidates, own, ops, transition, knows_root)
    return places, ranks


def _places(tree: DraftTree, own: Tensor) -> np.ndarray:
    """Lookahead slot of the node of each of the model's own tokens [n, 1 + depths], `ABSENT` where there is none."""
    node = torch.zeros(len(own), 1, dtype=torch.int64)
    inside = torch.ones(len(own), dtype=torch.bool)
    slots = torch.full(tree.tokens.shape, ABSENT)
    size = torch.arange(tree.size[1]).expand_as(tree.lookahead)
    real = tree.lookahead >= 0
    slots[real.nonzero()[:, 0], tree.lookahead[real].long()] = size[real]
    found = []
    for depth in range(1, own.shape[1]):
        match = (tree.parents == node) & (tree.tokens == own[:, depth, None])
        inside = inside & match.any(1)
        node = match.int().argmax(1, keepdim=True)
        found.append(torch.where(inside, slots.gather(1, node)[:, 0], ABSENT))
    return torch.stack(found, 1).numpy().astype(np.uint8)


def _ranks(
    probabilities: Tensor,
    candidates: Tensor,
    own: Tensor,
    ops: SimpleNamespace,
    transition: tuple[Tensor, Tensor] | None,
    knows_root: Tensor | None,
) -> np.ndarray:
    """Rank of each of the model's own tokens after its own parent, `ABSENT` past the candidates."""
    match = candidates == own[:, 1:, None]  # [n, depths, K]
    inside, index = match.any(2), match.int().argmax(2)
    if transition is None:
        return torch.where(inside, index, ABSENT).numpy().astype(np.uint8)
    roots = own[:, 0].clamp(min=0)
    order = condition(ops, probabilities, candidates, roots, transition, candidates.shape[2], knows_root)[1]
    before = functional.pad(index[:, :-1], (1, 0))  # the root has row 0
    rows = order.gather(2, before[:, :, None, None].expand(-1, -1, 1, order.shape[3]))[:, :, 0].long()
    rank = (rows == index[..., None]).int().argmax(2)
    inside = inside & functional.pad(inside[:, :-1], (1, 0), value=True)
    return torch.where(inside, rank, ABSENT).numpy().astype(np.uint8)
