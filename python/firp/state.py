"""What a decoding run carries from step to step, and what a step hands to the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from firp.trees import DraftTree


@dataclass
class DecodeState:
    """One run over B sequences.

    Attributes:
        cache: [L, 2, B, S, Hkv, D] keys and values of every layer; slots past context_lens hold anything.
        context_lens: [B] int32 committed tokens; the tree's root is not among them.
        tree: the draft tree that the next step verifies.
        sequence: [B] int64 index of each sequence in the caller's batch.
        finished: [B] bool; a finished sequence is frozen.
        remaining: [B] int64 tokens that may still be emitted.
        stop_tokens: [n] int64 ids that end a sequence, emitted themselves.
        plain: this run drafts nothing.
    """

    cache: Tensor
    context_lens: Tensor
    tree: DraftTree
    sequence: Tensor
    finished: Tensor
    remaining: Tensor
    stop_tokens: Tensor
    plain: bool = False

    @property
    def batch_size(self) -> int:
        return self.context_lens.shape[0]

    def keep(self, index: Tensor) -> DecodeState:
        """The run over the sequences at `index` [n] alone."""
        return DecodeState(
            cache=self.cache[:, :, index],
            context_lens=self.context_lens[index],
            tree=self.tree.keep(index),
            sequence=self.sequence[index],
            finished=self.finished[index],
            remaining=self.remaining[index],
            stop_tokens=self.stop_tokens,
            plain=self.plain,
        )


@dataclass(frozen=True)
class StepRecord:
    """What one step emitted.

    Attributes:
        tokens: [B, max_depth + 1] int64; the first `counts` of each row are new, the rest is -1.
        counts: [B] int64 tokens emitted, 0 for a sequence that was finished before.
        finished: [B] bool after the step.
        status: [B] int32, 1 where the model's own scores were NaN.
        path: [B, max_depth + 1] int32 accepted nodes, root first; token i was chosen at node path[i].
        logits: [B, N, V] the model's scores of every node.
        scores: [B, N, V] what tokens were chosen from, the logits themselves for greedy decoding.
    """

    tokens: Tensor
    counts: Tensor
    finished: Tensor
    status: Tensor
    path: Tensor
    logits: Tensor
    scores: Tensor | None


@dataclass
class DecodeStats:
    """Counts over decode steps of one sequence or several.

    tau = tokens delivered by decode steps / decode steps: prefill excluded, misses included, the bonus token counted,
    tokens past a stop or a limit not counted.

    Attributes:
        steps: decode steps, each counted once per sequence still decoding.
        tokens: tokens delivered.
        emitted_at_least: emitted_at_least[i] steps delivered more than i + 1 tokens.
    """

    steps: int = 0
    tokens: int = 0
    emitted_at_least: list[int] = field(default_factory=list)

    def add(self, counts: list[int]) -> None:
        """Count one step that delivered `counts` tokens to the sequences (0: was finished)."""
        for count in counts:
            if count == 0:
                continue
            self.steps += 1
            self.tokens += count
            while len(self.emitted_at_least) < count - 1:
                self.emitted_at_least.append(0)
            for i in range(count - 1):
                self.emitted_at_least[i] += 1

    def merge(self, other: DecodeStats) -> None:
        self.steps += other.steps
        self.tokens += other.tokens
        longest = max(len(self.emitted_at_least), len(other.emitted_at_least))
        padded = [stats.emitted_at_least + [0] * (longest - len(stats.emitted_at_least)) for stats in (self, other)]
        self.emitted_at_least = [a + b for a, b in zip(*padded, strict=True)]

    @property
    def tau(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def accepted_per_position(self) -> list[float]:
        """Share of steps in which the draft token at depth 1, 2, ... was accepted and delivered."""
        return [count / self.steps for count in self.emitted_at_least] if self.steps else []


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, R, ...] at index [B, n] to [B, n, ...]."""
    sequence = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return rows[sequence, index]
