"""Hugging Face logits processors over the rows of a draft tree, each node with its own path as history.

Four kinds of processor, told apart by exact type:
- pointwise: looks at scores only; all rows at once;
- by content: looks at the tokens so far; rows of equal length at once, prompts without padding;
- by length: looks at how many tokens there are; as above, but padding counts, as it does in Hugging Face;
- any other may hold state or look at whole batches: it sees each emitted token once, in order (`firp.choice`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from firp.trees import DraftTree

POINTWISE = tuple(
    getattr(hf, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization",
    )
    if hasattr(hf, name)
)  # fmt: skip
BY_CONTENT = (
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
)
BY_LENGTH = (
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
)
VECTORISED = POINTWISE + BY_CONTENT + BY_LENGTH


def is_vectorised(processors: LogitsProcessorList) -> bool:
    """Whether every processor may run on rows that are dropped later."""
    return all(type(processor) in VECTORISED for processor in processors)


def without_padding(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The same processors for histories that hold no padding: a per-sequence count of padding to skip is dropped."""
    stripped = LogitsProcessorList()
    for processor in processors:
        if isinstance(getattr(processor, "prompt_ignore_length", None), Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = None
        stripped.append(processor)
    return stripped


def node_histories(tree: DraftTree, histories: list[Tensor]) -> dict[tuple[int, int], tuple[list[int], Tensor]]:
    """Tokens before the choice at every real node, grouped so that a group's rows have one length.

    Args:
        tree: [B, N].
        histories: B token tensors [T_b], each ending in the root's token.

    Returns:
        (sequence, depth) to (nodes, [len(nodes), T_b + depth] tokens).
    """
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    groups = {}
    for b, history in enumerate(histories):
        paths: dict[int, list[int]] = {0: []}
        by_depth: dict[int, list[int]] = {0: [0]}
        for node in range(1, len(parents[b])):
            if parents[b][node] >= 0:
                paths[node] = paths[parents[b][node]] + [tokens[b][node]]
                by_depth.setdefault(len(paths[node]), []).append(node)
        for depth, nodes in by_depth.items():
            tails = torch.tensor([paths[node] for node in nodes], dtype=torch.long, device=history.device)
            groups[b, depth] = nodes, torch.cat([history.expand(len(nodes), -1), tails.view(len(nodes), depth)], 1)
    return groups


def process_tree(
    processors: LogitsProcessorList, logits: Tensor, tree: DraftTree, histories: list[Tensor], padding: list[int]
) -> Tensor:
    """Processed scores of every node, as a sequential run would see them there.

    Args:
        processors: all `is_vectorised`, prepared by `without_padding`.
        logits: [B, N, V]. tree: [B, N].
        histories: B token tensors [T_b] up to the root.
        padding: how many padding tokens the caller's prompt held, per sequence.

    Returns:
        [B, N, V] float32; padding nodes hold what pointwise processors made of them.
    """
    scores = logits.float()
    groups = None
    for processor in processors:
        if type(processor) in POINTWISE:
            flat = scores.flatten(0, 1)
            dummy = torch.zeros(flat.shape[0], 1, dtype=torch.long, device=flat.device)
            scores = processor(dummy, flat).view_as(scores)
            continue
        groups = groups or node_histories(tree, histories)
        scores = scores.clone()
        for (b, _), (nodes, history) in groups.items():
            if type(processor) in BY_LENGTH and padding[b]:
                history = torch.nn.functional.pad(history, (padding[b], 0))
            scores[b, nodes] = processor(history, scores[b, nodes])
    return scores
