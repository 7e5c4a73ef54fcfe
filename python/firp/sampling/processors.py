"""Logits processors over the rows of a draft tree, each node with its own path as history.

Four kinds of processor, identified by exact type:
- pointwise: looks at scores only; all rows at once;
- by content: looks at the tokens so far; rows of equal length at once, prompts without padding;
- by length: looks at how many tokens there are; as above, but padding counts, as it does in Hugging Face;
- any other may hold state or look at whole batches: it sees each emitted token once, in order
(`firp.sampling.choosers`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from firp.drafting.trees import DraftTree
from firp.sampling.penalties import FrequencyPenalty

POINTWISE = tuple(
    getattr(hf, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization",
    )
    if hasattr(hf, name)
)  # fmt: skip
# Pointwise processors that never wait for the device (the others read values back, or copy tables to it).
ON_DEVICE = tuple(
    getattr(hf, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
        "EpsilonLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization",
    )
    if hasattr(hf, name)
)  # fmt: skip
BY_CONTENT = (
    FrequencyPenalty,
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


def leaving_out(processor: LogitsProcessor, count: int | Tensor) -> LogitsProcessor:
    processor = copy.copy(processor)
    processor.prompt_ignore_length = count
    return processor


@dataclass(frozen=True)
class HistoryGroup:
    """Nodes whose histories have one length.

    Attributes:
        sequences, nodes: [n] int64, which rows of [B, N].
        tokens: [n, T] int64 tokens before the choice at each, without padding.
        prompts: [n] int64 index of each one's prompt in the caller's batch.
        padding: how many padding tokens Hugging Face would have in front.
    """

    sequences: Tensor
    nodes: Tensor
    tokens: Tensor
    prompts: Tensor
    padding: int


def node_histories(
    tree: DraftTree, histories: list[Tensor], prompts: list[int], padding: list[int]
) -> list[HistoryGroup]:
    """Tokens before the choice at every real node: history up to the root, then the path to the node.

    Args:
        tree: [B, N].
        histories: B token tensors [T_b], each ending in the root's token.
        prompts: index of each sequence's prompt in the caller's batch.
        padding: padding tokens of each prompt of the caller's batch.
    """
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    grouped: dict[tuple[int, int], list[tuple[int, int, list[int], int]]] = {}
    for b, history in enumerate(histories):
        paths = {0: history.tolist()}
        for node in range(len(parents[b])):
            parent = parents[b][node]
            if parent >= 0:
                paths[node] = paths[parent] + [tokens[b][node]]
            if node in paths:
                key = len(paths[node]), padding[prompts[b]]
                grouped.setdefault(key, []).append((b, node, paths[node], prompts[b]))
    groups = []
    for (_, pad), rows in grouped.items():
        sequences, nodes, paths_here, places = (
            torch.tensor(column, dtype=torch.long, device=tree.tokens.device) for column in zip(*rows, strict=True)
        )
        groups.append(HistoryGroup(sequences, nodes, paths_here, places, pad))
    return groups


def _process_group(processor: LogitsProcessor, group: HistoryGroup, scores: Tensor) -> Tensor:
    """Scores [n, V] of the group's rows, processed."""
    by_length = type(processor) in BY_LENGTH
    tokens = torch.nn.functional.pad(group.tokens, (group.padding, 0)) if by_length else group.tokens
    counts = getattr(processor, "prompt_ignore_length", None)
    if counts is None:
        return processor(tokens, scores)
    counts, processed = counts[group.prompts], torch.empty_like(scores)
    for count in counts.unique().tolist():
        rows = counts == count
        processed[rows] = leaving_out(processor, count)(tokens[rows], scores[rows])
    return processed


def _process_rows(ops: SimpleNamespace, processor: LogitsProcessor, scores: Tensor) -> Tensor:
    """Scores [n, V] through a pointwise processor."""
    if type(processor) is hf.TopPLogitsWarper and scores.device.type != "cpu":
        # Hugging Face sorts every row.
        return ops.keep_top_p(scores, processor.top_p, processor.min_tokens_to_keep, processor.filter_value)
    return processor(torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device), scores)


def process_tree(
    ops: SimpleNamespace,
    processors: LogitsProcessorList,
    logits: Tensor,
    tree: DraftTree,
    histories: list[Tensor],
    prompts: list[int],
    padding: list[int],
) -> Tensor:
    """Processed scores of every node, as a sequential run would see them there.

    Args:
        ops: from `firp_kernels.bind`.
        processors: all `is_vectorised`, prepared by `without_padding`.
        logits: [B, N, V]. tree: [B, N].
        histories: B token tensors [T_b] up to the root.
        prompts: index of each sequence's prompt in the caller's batch.
        padding: how many padding tokens each prompt of the caller's batch held.

    Returns:
        [B, N, V] float32; padding nodes hold what pointwise processors made of them.
    """
    scores = logits.float()
    groups = None
    for processor in processors:
        if type(processor) in POINTWISE:
            scores = _process_rows(ops, processor, scores.flatten(0, 1)).view_as(scores)
            continue
        groups = groups or node_histories(tree, histories, prompts, padding)
        scores = scores.clone()
        for group in groups:
            place = group.sequences, group.nodes
            scores[place] = _process_group(processor, group, scores[place])
    return scores
