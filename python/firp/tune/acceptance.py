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
            from the first root. It stands for token i + j + 2.
        candidates: [n, k, K] int64 their tokens.
    """

    tokens: Tensor
    probabilities: Tensor
    candidates: Tensor


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
    probabilities, candidates = [], []
    positions = torch.arange(len(prompt) - 1, len(tokens) - 1, device=device)
    for anchors in positions.split(ANCHORS_AT_ONCE):
        rows = pseudo_rows(view, weight, real, anchors[None], layer)[0]
        logits = view.logits(rows)
        offsets = torch.arange(logits.shape[1], device=device).expand(logits.shape[:2])
        top = top_marginals(logits, offsets, min(num_ranks, logits.shape[-1]))
        for kept, part in zip((probabilities, candidates), top, strict=True):
            kept.append(part.cpu())
    return Recording(tokens[len(prompt) - 1 :], torch.cat(probabilities), torch.cat(candidates))


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
    probabilities, candidates = (
        torch.stack([functional.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts])
        for parts in ([r.probabilities for r in recordings], [r.candidates for r in recordings])
    )
    stats = DecodeStats()
    if tree.num_nodes == 1:
        stats.add([1] * int(lengths.sum()))
        return stats
    drafter = Drafter(tree, k, ops, transition)
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
        draft = drafter.draft(probabilities[rows], candidates[rows], tokens.gather(1, root[:, None])[:, 0], usable)
    return stats
