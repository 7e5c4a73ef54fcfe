"""How many tokens a step delivers with any tree: recorded answers decoded again, without the model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import firp_kernels
from firp.drafting.recording import Recording
from firp.drafting.trees import Drafter, TreeConfig, root_only
from firp.engine.state import DecodeStats


class Replay(NamedTuple):
    """What decoding some answers takes.

    Attributes:
        stats: of all.
        paces: [S] steps that a token of each takes.
    """

    stats: DecodeStats
    paces: np.ndarray


@torch.no_grad()
def replay(
    recordings: list[Recording], tree: TreeConfig, num_offsets: int, transition: tuple[Tensor, Tensor] | None = None
) -> Replay:
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
    padded = [
        [functional.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in (r.probabilities, r.candidates)]
        for r in recordings
    ]
    probabilities, candidates = (torch.stack(parts) for parts in zip(*padded, strict=True))
    stats = DecodeStats()
    if tree.num_nodes == 1:
        stats.add([1] * int(lengths.sum()))
        return Replay(stats, np.ones(len(recordings)))
    drafter = Drafter(tree, k, ops, transition)
    probabilities, candidates = (part[..., : drafter.num_ranks].contiguous() for part in (probabilities, candidates))
    root = torch.zeros(len(recordings), dtype=torch.long)
    steps = torch.zeros_like(root)
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
        steps += counts > 0
        root = root + counts
        offset = (torch.arange(k) + levels_up[:, None]).clamp(max=k - 1)
        rows = torch.arange(len(recordings))[:, None], source[:, None], offset
        usable = (k - levels_up).clamp(min=0).to(torch.int32)
        roots = tokens.gather(1, root[:, None])[:, 0]
        knows_root = levels_up == 0 if recordings[0].knows_next else None
        draft = drafter.draft(probabilities[rows], candidates[rows], roots, usable, knows_root)
    return Replay(stats, steps.numpy() / lengths.numpy())
