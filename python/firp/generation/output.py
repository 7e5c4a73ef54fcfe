"""What a run has produced: tokens, stopping criteria, streamer, requested scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from firp.drafting.choices import Rung
from firp.engine.state import DecodeStats
from firp.generation.metrics import StepEvent, TimeSplit


@dataclass
class FirpOutput(GenerateDecoderOnlyOutput):
    """What `return_dict_in_generate=True` returns: Hugging Face's output and the run's statistics.

    Attributes:
        stats: `DecodeStats` over all sequences: steps, tau, accepted per position.
        time: where the seconds went.
        rungs: where trees change during a run, each tree with its figures and the steps that verified its drafts,
            plain decoding first; else None.
    """

    stats: DecodeStats = None  # type: ignore[assignment]
    time: TimeSplit = None  # type: ignore[assignment]
    rungs: dict[Rung, int] | None = None


class Output:
    """Tokens of B sequences as they are emitted.

    Args:
        padded: [B, T] the caller's prompts, padding in front.
        prompts: B tensors [T_b], padding stripped.
        max_new_tokens: tokens at which a sequence ends.
        stop_tokens: ids at which a sequence ends, emitted themselves.
        criteria: further stopping criteria, called once per emitted token with one sequence [1, T], padding in front.
        streamer: receives every token as it is emitted; one sequence only.
        num_embeddings: tokens that the model can embed; a chosen one beyond them is an error. None does not ask.
        together: sequences end when all have ended, as in Hugging Face where no token ends one: a sequence that a
            criterion ended goes on until the last one is.
        keep_scores, keep_logits: whether processed scores, raw logits of emitted tokens are kept.
        on_step: called with a `StepEvent` after every decode step.
    """

    def __init__(
        self,
        padded: Tensor,
        prompts: list[Tensor],
        max_new_tokens: int,
        stop_tokens: list[int],
        criteria: StoppingCriteriaList,
        num_embeddings: int | None = None,
        together: bool = False,
        streamer: BaseStreamer | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        on_step: Callable[[StepEvent], None] | None = None,
    ) -> None:
        self.padded = padded
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.stop_tokens = set(stop_tokens)
        self.criteria = criteria
        self.num_embeddings = num_embeddings
        self.together = together
        self.streamer = streamer
        self.emitted: list[list[int]] = [[] for _ in prompts]
        self.scores: list[list[Tensor]] | None = [[] for _ in prompts] if keep_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in prompts] if keep_logits else None
        self.on_step = on_step
        self.time = TimeSplit()
        self.rungs: dict[Rung, int] | None = None
        self._steps = 0
        self._began = time.perf_counter()
        self._reported = [0] * len(prompts)
        self._ended: list[int] = []
        self._done: dict[int, int] = {}  # By sequence, its tokens when a criterion or the limit ended it.

    def deliver(self, sequence: int, token: int, scores: Tensor | None, logits: Tensor | None) -> bool:
        """Append one token to a sequence; return whether the sequence ends with it.

        Args:
            scores, logits: [V] that the token was chosen from, processed and raw; kept if asked for.
        """
        emitted = self.emitted[sequence]
        emitted.append(token)
        for kept, row in ((self.scores, scores), (self.logits, logits)):
            if kept is not None and row is not None:
                kept[sequence].append(row.float().clone())
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        ended = token in self.stop_tokens or len(emitted) >= self.max_new_tokens
        if self.criteria and sequence not in self._done:
            ended |= self._criteria_end(sequence)
        if self.together:
            if ended:
                self._done.setdefault(sequence, len(emitted))
            ended = len(emitted) >= self.max_new_tokens
        if ended:
            self._ended.append(sequence)
        elif self.num_embeddings is not None and token >= self.num_embeddings:
            raise ValueError(
                f"model: chose token {token}, which has no embedding, expected 0..{self.num_embeddings - 1}"
            )
        return ended

    def end_together(self) -> list[int]:
        """Sequences that need no further token, where they end together: all, once each has ended and is as long as
        the longest was by then. What is beyond that length is cut off."""
        if not self.together or len(self._done) < len(self.emitted):
            return []
        length = max(self._done.values())
        ended = [i for i, emitted in enumerate(self.emitted) if len(emitted) >= length]
        self._ended += ended
        held: tuple[list | None, ...] = (self.emitted, self.scores, self.logits)
        for kept in held:
            if kept is not None:
                for i in ended:
                    del kept[i][length:]
        return ended

    def _criteria_end(self, sequence: int) -> bool:
        padded = self.padded[sequence]
        so_far = torch.cat([padded, torch.tensor(self.emitted[sequence], dtype=torch.long, device=padded.device)])
        scores = None if self.scores is None else tuple(row[None] for row in self.scores[sequence])
        done = self.criteria(so_far[None], scores)
        if done.numel() != 1:
            raise ValueError(
                f"stopping_criteria: got {done.numel()} answers, expected 1: they are asked about one sequence at a "
                f"time"
            )
        return bool(done)

    def end_step(self) -> list[int]:
        """Close one decode step: tell `on_step` of it; return how many tokens it gave each sequence."""
        counts = [max(0, len(emitted) - before) for emitted, before in zip(self.emitted, self._reported, strict=True)]
        if self.on_step is not None:
            new = {i: self.emitted[i][-count:] for i, count in enumerate(counts) if count}
            self.on_step(StepEvent(self._steps, new, self._ended, time.perf_counter() - self._began))
        self._steps += 1
        self._ended = []
        self._reported = [len(emitted) for emitted in self.emitted]
        return counts

    def history(self, sequence: int) -> Tensor:
        """Prompt and emitted tokens of one sequence, without padding, [T_b + emitted]."""
        prompt = self.prompts[sequence]
        return torch.cat([prompt, torch.tensor(self.emitted[sequence], dtype=torch.long, device=prompt.device)])

    def padded_history(self, pad_token: int) -> Tensor:
        """Prompts, padding in front, and emitted tokens [B, T + longest], finished sequences padded."""
        longest = max(map(len, self.emitted))
        rows = [emitted + [pad_token] * (longest - len(emitted)) for emitted in self.emitted]
        new = torch.tensor(rows, dtype=torch.long, device=self.padded.device).view(len(rows), longest)
        return torch.cat([self.padded, new], 1)

    def stacked(self, kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
        """Kept rows as one [B, V] tensor per generated position; zeros past a sequence's end."""
        if kept is None:
            return None
        nothing = torch.zeros_like(kept[0][0])
        longest = max(map(len, kept))
        return tuple(torch.stack([rows[i] if i < len(rows) else nothing for rows in kept]) for i in range(longest))
