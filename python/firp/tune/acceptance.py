"""How many tokens a step delivers with any tree, from one recording.

The model's own output does not depend on the tree, and neither do a position's marginals: a lookahead node on the
accepted path sees the text alone. So one pass over each answer records what every position would draft, and the rule of
drafting, verification and the nearest lookahead ancestor is then replayed for each tree without the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import firp_kernels
from firp.decoder.passes import pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.refined import RefinedMarginals
from firp.drafting.trees import Drafter, TreeConfig, root_only
from firp.engine.engine import Engine
from firp.engine.state import DecodeStats
from firp.generation.batch import answer
from firp_kernels import top_marginals

ANCHORS_AT_ONCE = 64


@dataclass(frozen=True)
class Recording:
    """One answer of the model, and the marginals at each of its positions.

    Attributes:
        tokens: [n + 1] int64, the last prompt token (the first root), then n new tokens.
        probabilities: [n, k, K] float32; [i, j] is the top-K marginal of pseudo[i, j + 1], descending, where i counts
            from the first root. It is for token i + j + 2. With a refiner [n, k, k, K]: [i, m] are those of offsets
            m + 1 .. k given the token m positions after the next, zeros at the end.
        candidates: int64 their tokens, of the same shape.
        conditioned: with a refiner, probabilities and order [n, k, k, K, K] given the token before.
    """

    tokens: Tensor
    probabilities: Tensor
    candidates: Tensor
    conditioned: tuple[Tensor, Tensor] | None = None


def greedy_answers(engine: Engine, prompts: list[Tensor], max_new_tokens: int, batch_size: int) -> list[list[int]]:
    """New tokens of each prompt [T], the stop token included, decoded `batch_size` prompts at a time."""
    rows = [prompt.tolist() for prompt in prompts]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [
        tokens for batch in batches for tokens in answer(engine, batch, max_new_tokens=max_new_tokens, do_sample=False)
    ]


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
    refined = RefinedMarginals(view, predictor, firp_kernels.bind(None)) if predictor.refiner_width else None
    parts: list[tuple[Tensor, ...]] = []
    positions = torch.arange(len(prompt) - 1, len(tokens) - 1, device=device)
    for anchors in positions.split(ANCHORS_AT_ONCE):
        rows = pseudo_rows(view, weight, real, anchors[None], layer)[0]
        if refined is not None:
            parts.append(_refined(refined, rows, tokens.to(device), anchors, num_ranks))
            continue
        logits = view.logits(rows)
        offsets = torch.arange(logits.shape[1], device=device).expand(logits.shape[:2])
        parts.append(top_marginals(logits, offsets, min(num_ranks, logits.shape[-1])))
    probabilities, candidates, *conditioned = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Recording(tokens[len(prompt) - 1 :], probabilities, candidates, tuple(conditioned) or None)


def _refined(
    refined: RefinedMarginals, rows: Tensor, tokens: Tensor, anchors: Tensor, num_ranks: int
) -> tuple[Tensor, ...]:
    """Probabilities, candidates, and those given the token before with their order, for every number of levels."""
    levels: list[tuple[Tensor, ...]] = []
    for level in range(rows.shape[1]):
        known = tokens[(anchors + level + 1).clamp(max=len(tokens) - 1)]
        probabilities, candidates, conditioned = refined(rows[:, level:], known, num_ranks)
        found = (probabilities, candidates, *conditioned)
        levels.append(tuple(functional.pad(part, (0, 0) * (part.dim() - 2) + (0, level)) for part in found))
    return tuple(torch.stack(part, 1) for part in zip(*levels, strict=True))


@torch.no_grad()
def replay(
    recordings: list[Recording], tree: TreeConfig, num_offsets: int, transition: tuple[Tensor, Tensor] | None = None
) -> DecodeStats:
    """The steps that decoding the recorded answers with `tree` and the first `num_offsets` offsets takes.

    `transition` holds the tables of the predictor's token transition, if it has one.

    Every recording is one sequence of a batch; the ops that decode also decide here. Only the tokens on the path of the
    answer matter to a walk, so each tree's tokens are renumbered: depth e - 1 for the answer's own at depth e, a number
    that nothing chooses for any other.
    """
    ops, k = firp_kernels.bind(None), num_offsets
    lengths = torch.tensor([len(recording.tokens) - 1 for recording in recordings])
    longest = int(lengths.max())
    tokens = torch.stack([functional.pad(r.tokens, (0, longest + k + 2 - len(r.tokens)), value=-1) for r in recordings])
    refined = recordings[0].conditioned is not None
    kept = [(r.probabilities, r.candidates, *(r.conditioned or ())) for r in recordings]
    padded = [[functional.pad(p, (0, 0) * (p.dim() - 1) + (0, longest - len(p))) for p in parts] for parts in kept]
    probabilities, candidates, *conditioned = (torch.stack(parts) for parts in zip(*padded, strict=True))
    stats = DecodeStats()
    if tree.num_nodes == 1:
        stats.add([1] * int(lengths.sum()))
        return stats
    drafter = Drafter(tree, k, ops, transition, refined)
    probabilities, candidates = (part[..., : drafter.num_ranks].contiguous() for part in (probabilities, candidates))
    root = torch.zeros(len(recordings), dtype=torch.long)
    draft = root_only(tokens[:, 0], num_lookahead=1)
    while bool((root < lengths).any()):
        chosen = tokens.gather(1, (root[:, None] + 1 + torch.arange(k + 1)).clamp(max=tokens.shape[1] - 1))
        above = (draft.depths.long() - 1).clamp(min=0)
        numbered = torch.where(draft.tokens == chosen.gather(1, above), above, k + 1)
        scores = functional.one_hot(draft.depths.long(), k + 2).float()
        depth = k if draft.tokens.shape[1] > 1 else 0
        verified = ops.verify_tree(scores, None, numbered, draft.parents, draft.lookahead, depth)
        accepted, levels_up = verified.num_accepted, verified.levels_up
        source = (root + accepted - levels_up).clamp(max=longest - 1)
        counts = torch.minimum(accepted + 1, lengths - root)
        stats.add(counts.tolist())
        root = root + counts
        offset = (torch.arange(k) + levels_up[:, None]).clamp(max=k - 1)
        rows = torch.arange(len(recordings))[:, None], source[:, None], offset
        usable = (k - levels_up).clamp(min=0).to(torch.int32)
        if refined:
            rows = torch.arange(len(recordings)), source, levels_up.clamp(0, k - 1).long()
        # The first k of a recording's depths are those of the first k offsets.
        first, among, *given = (part[rows][:, :k].contiguous() for part in (probabilities, candidates, *conditioned))
        roots = tokens.gather(1, root[:, None])[:, 0]
        draft = drafter.draft(first, among, roots, usable, (given[0], given[1]) if refined else None)
    return stats
