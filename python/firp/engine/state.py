"""What a decoding run carries from step to step, and what a step hands to the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from firp.drafting.trees import Drafter, DraftTree
from firp.engine.buffers import Buffers
from firp_kernels import Emitted, Verified


@dataclass
class DecodeState:
    """One run over B sequences. Its tensors keep their addresses from step to step, so that a captured step replays.

    Attributes:
        buffers: what the engine lent to this run; `Engine.release` takes it back.
        cache: [L, 2, B, S, Hkv, D] keys and values of every layer, a view of the buffers; slots past context_lens
            hold anything.
        context_lens: [B] int32 committed tokens; the tree's root is not among them.
        tree: the draft tree that the next step verifies.
        sequence: [B] int64 index of each sequence in the caller's batch.
        finished: [B] bool; a finished sequence is frozen.
        remaining: [B] int64 tokens that may still be emitted.
        history: [B, C] int64 tokens of prompt and output, the root last, for `firp::lookup_branch`; None where no
            branch is looked up.
        seed: [B] int64 of sampling.
        stop_tokens: [n] int64 ids that end a sequence, emitted themselves; -1 is none.
        lengths: tokens committed by prefill, per sequence of the caller's batch, known to the host.
        drafter: what drafts the next tree; None goes on plainly. It may change from step to step.
        plain: this run drafts nothing at any size.
        keeps_scores: records hold the scores, which nothing else needs after a step.
    """

    buffers: Buffers
    cache: Tensor
    context_lens: Tensor
    tree: DraftTree
    sequence: Tensor
    finished: Tensor
    remaining: Tensor
    seed: Tensor
    stop_tokens: Tensor
    lengths: list[int]
    drafter: Drafter | None = None
    plain: bool = False
    keeps_scores: bool = False
    history: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.context_lens.shape[0]

    def use_slots(self, slots: int) -> None:
        """Let steps see the smallest bucket of the cache that holds `slots` slots: it sets their grid sizes."""
        bucket = self.buffers.bucket(slots)
        if bucket != self.cache.shape[3]:
            self.cache = self.buffers.cache[:, :, : self.batch_size, :bucket]

    def keep(self, slots: list[int]) -> list[int]:
        """Go on with the sequences at `slots` alone; those past the new batch move into the places that became free.

        Returns:
            For each place of the new batch, the slot whose sequence it now holds.
        """
        size = len(slots)
        moving = iter(sorted(slot for slot in slots if slot >= size))
        places = [place if place in slots else next(moving) for place in range(size)]
        names: tuple[str, ...] = ("context_lens", "sequence", "finished", "remaining", "seed")
        if self.history is not None:
            names = (*names, "history")
        rows = [*(getattr(self, name) for name in names), *vars(self.tree).values()]
        for place, slot in enumerate(places):
            if slot == place:
                continue
            for tensor in rows:
                tensor[place] = tensor[slot]
            self.cache[:, :, place] = self.cache[:, :, slot]
        for name in names:
            setattr(self, name, getattr(self, name)[:size])
        self.cache = self.cache[:, :, :size]
        self.tree = self.tree.first(size)
        return places


@dataclass(frozen=True)
class StepRecord:
    """What one step emitted. After a graph replay its tensors are those of the graph, overwritten by the next replay.

    Attributes:
        tokens: [B, max_depth + 1] int64; the first `counts` of each row are new, the rest is -1.
        counts: [B] int64 tokens emitted, 0 for a sequence that was finished before.
        finished: [B] bool after the step.
        status: [B] int32, 1 where the model's own scores were NaN.
        path: [B, max_depth + 1] int32 accepted nodes, root first; token i was chosen at node path[i].
        logits: [B, N, V] the model's scores of every node, where the state keeps them.
        scores: [B, N, V] what tokens were chosen from, the logits themselves for greedy decoding; likewise.
        packed: [B, max_depth + 4] int64 tokens, counts, finished, status in one tensor, for the way to the host; None
            on a CPU.
    """

    tokens: Tensor
    counts: Tensor
    finished: Tensor
    status: Tensor
    path: Tensor
    logits: Tensor | None
    scores: Tensor | None
    packed: Tensor | None = None

    @classmethod
    def of(cls, emitted: Emitted, chosen: Verified, logits: Tensor, scores: Tensor | None, keeps: bool) -> StepRecord:
        packed = None if emitted.tokens.device.type == "cpu" else emitted.packed
        tokens, counts, finished = emitted.tokens, emitted.counts, emitted.finished
        kept, chosen_from = (logits, scores) if keeps else (None, None)
        return cls(tokens, counts, finished, chosen.status, chosen.path, kept, chosen_from, packed)


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
