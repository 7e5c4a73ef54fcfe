"""What one decode step reads, computes and sends, from shapes: docs/scale.md has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from firp.decoder.model_rules import head_counts
from firp.drafting.trees import TreeConfig
from firp.engine.rows import few_rows
from firp.engine.weights import GATHERED, SUMMED, Weight, Weights
from firp.tools.ranks import planned_heads
from firp.tools.rates import Rates
from firp_kernels.bitmask import num_words

INTEGER = 8  # bytes: `Ranks.agree` sends int64
# Integers of a sequence that `Ranks.agree` sends beside the path: the other fields of `firp_kernels.Verified`.
VERIFIED = 5


class Work(NamedTuple):
    """Bytes read and operations done; a multiplication and an addition are two."""

    read: int = 0
    operations: int = 0


class Sent(NamedTuple):
    """Collectives of one kind: how many, and the bytes of what a rank holds after them."""

    number: int = 0
    size: int = 0


@dataclass(frozen=True)
class Draft:
    """What a step drafts with.

    Attributes:
        tree: N and P; None decodes plainly.
        num_offsets: k.
        insertion_layer: t; parts of a step are counted below and above it, of a plain one too.
        transition_rank: r of the token transition; of training alone.
        update_width: w of the update of final states; 0 has none.
        draft_vocabulary: tokens that updated rows are scored for; 0 is all.
    """

    tree: TreeConfig | None
    num_offsets: int
    insertion_layer: int
    transition_rank: int = 0
    update_width: int = 0
    draft_vocabulary: int = 0

    @property
    def nodes(self) -> int:
        """N."""
        return 1 if self.tree is None else self.tree.num_nodes

    @property
    def lookahead(self) -> int:
        """P."""
        return 0 if self.tree is None else self.tree.num_lookahead

    @property
    def rows(self) -> int:
        """Rows of a sequence above t: N + P * k."""
        return self.nodes + self.lookahead * self.num_offsets


@dataclass
class StepWork:
    """One step of B sequences on each rank.

    Attributes:
        parts: by name.
        collectives: by kind.
        ranks: that share the model.
    """

    ranks: int
    parts: dict[str, Work] = field(default_factory=dict)
    collectives: dict[str, Sent] = field(default_factory=dict)

    @property
    def total(self) -> Work:
        return Work(*(sum(numbers) for numbers in zip(*self.parts.values(), strict=True)))

    def add(self, part: str, work: Work) -> None:
        before = self.parts.get(part, Work())
        self.parts[part] = Work(before.read + work.read, before.operations + work.operations)

    def send(self, kind: str, size: int) -> None:
        if self.ranks > 1:
            before = self.collectives.get(kind, Sent())
            self.collectives[kind] = Sent(before.number + 1, before.size + size)

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Of each part, and of each kind of collective."""
        found = {name: rates.seconds(*work) for name, work in self.parts.items()}
        return found | {
            kind: rates.collective_seconds(kind, *sent, ranks=self.ranks) for kind, sent in self.collectives.items()
        }


def product(weights: Sequence[Weight], rows: int, active_experts: int = 1, itemsize: int = 0) -> Work:
    """Rows through the products of some weights, all of which are read once; of experts at most those that rows pass.

    Args:
        itemsize: bytes of a number.
    """
    read = operations = 0
    for weight in weights:
        share = min(rows * active_experts, weight.experts) if weight.experts > 1 else 1
        read += weight.held * share // weight.experts * itemsize
        if weight.multiplies:
            active = active_experts if weight.experts > 1 else 1
            operations += 2 * rows * weight.held * active // weight.experts
    return Work(read, operations)


def step_work(
    config: PreTrainedConfig,
    weights: Weights,
    device: torch.device,
    batch_size: int,
    context: int,
    draft: Draft,
    tp_size: int = 1,
) -> StepWork:
    """One step of B sequences with `context` tokens each in the cache, on each of `tp_size` ranks.

    Args:
        weights: of the same model and ranks.
        device: whose rule of one pass or two of the head counts; only its type is asked.

    Raises:
        ValueError: heads that cannot be divided over the ranks.
    """
    step, size = StepWork(tp_size), weights.itemsize
    heads, kv_heads = planned_heads(config, tp_size)
    head_dim, nodes = head_counts(config)[2], draft.nodes
    _exchange(step, weights.embedding, batch_size * nodes, size)
    for place, (layer, window) in enumerate(zip(weights.layers, weights.windows, strict=True)):
        where, rows = ("below t", nodes) if place < draft.insertion_layer else ("above t", draft.rows)
        step.add(f"layers {where}", product(layer, batch_size * rows, weights.active_experts, size))
        _exchange(step, layer, batch_size * rows, size)
        seen = (context if window is None else min(context, window)) + rows
        read, operations = 2 * seen * kv_heads * head_dim * size, 4 * rows * seen * heads * head_dim
        step.add(f"attention {where}", Work(batch_size * read, batch_size * operations))
    passes = [draft.rows]
    if draft.tree is not None:
        maps = draft.num_offsets * config.hidden_size**2
        step.add("predictor", Work(maps * size, 2 * batch_size * draft.lookahead * maps))
        if draft.update_width:
            step.add("update", update_work(config, draft, batch_size, size))
            passes = [nodes]
        elif not few_rows(device, batch_size, draft.rows, nodes):
            passes = [nodes, draft.num_offsets]
    for rows in passes:
        step.add("norm and head", product((*weights.norm, *weights.head), batch_size * rows, itemsize=size))
        _exchange(step, weights.head, batch_size * rows, size)
    depth = 0 if draft.tree is None else draft.num_offsets
    step.send("broadcast", INTEGER * batch_size * (depth + 1 + VERIFIED))
    if draft.tree is not None:
        step.send("broadcast", INTEGER * batch_size * (nodes * (3 + num_words(nodes)) + draft.lookahead))
    return step


def update_work(config: PreTrainedConfig, draft: Draft, batch_size: int, itemsize: int) -> Work:
    """What an update adds, whole on every rank: its own weights, and the head's rows of the tokens that it scores."""
    k, w, d = draft.num_offsets, draft.update_width, config.hidden_size
    head = (draft.draft_vocabulary or config.vocab_size) * d
    return Work((3 * k * w * d + head) * itemsize, 2 * batch_size * k * (3 * w * d + head))


def _exchange(step: StepWork, weights: Sequence[Weight], rows: int, itemsize: int) -> None:
    """The collectives after the products of some weights: sums and gathers of their output rows."""
    for weight in weights:
        if not weight.multiplies:
            continue
        width = weight.shape[-1] if weight.style == "embedding_rowwise" else weight.shape[-2]
        if weight.style in SUMMED:
            step.send("all-reduce", rows * width * itemsize)
        elif weight.style in GATHERED:
            step.send("all-gather", rows * width * itemsize)


def break_even(plain: StepWork, firp: StepWork, rates: Rates) -> float:
    """The tau at which a FIRP step takes as long for a token as a plain step."""
    return sum(firp.seconds(rates).values()) / sum(plain.seconds(rates).values())
