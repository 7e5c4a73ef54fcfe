"""Prompts as the caller padded them, and processors for histories with or without that padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from firp.sampling.processors import leaving_out


@dataclass(frozen=True)
class Prompts:
    """Prompts as the caller padded them. The model never sees masked tokens, wherever they stand; processors and
    criteria see those between a prompt's first and last token, as in Hugging Face.

    Attributes:
        ids: [B, T] int64.
        keep: [B, T] bool, False where `attention_mask` masks.
    """

    ids: Tensor
    keep: Tensor

    @classmethod
    def of(cls, ids: Tensor, attention_mask: Tensor | None) -> Prompts:
        ids = ids.long()
        return cls(ids, torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool())

    @cached_property
    def tokens(self) -> list[Tensor]:
        """B prompts [T_b] without what is masked."""
        return [row[kept] for row, kept in zip(self.ids, self.keep, strict=True)]

    @cached_property
    def leading(self) -> Tensor:
        """[B] masked tokens in front of each prompt's first one."""
        return self.keep.int().argmax(1)

    @cached_property
    def trailing(self) -> Tensor:
        """[B] masked tokens after each prompt's last one."""
        return self.keep.flip(1).int().argmax(1)

    @cached_property
    def unpadded(self) -> list[Tensor]:
        """B prompts from their first to their last token."""
        ends = (self.ids.shape[1] - self.trailing).tolist()
        return [row[start:end] for row, start, end in zip(self.ids, self.leading.tolist(), ends, strict=True)]

    @cached_property
    def padding(self) -> list[int]:
        """Masked tokens around each prompt."""
        return (self.leading + self.trailing).tolist()

    @cached_property
    def padded(self) -> Tensor:
        """[B, T] prompts with all padding in front, as processors and criteria expect it."""
        width = self.ids.shape[1]
        places = torch.arange(width, device=self.ids.device) - self.trailing[:, None]
        return self.ids.gather(1, places % width)


def _left_out(processor: LogitsProcessor, prompts: Prompts) -> Tensor | None:
    """[B] tokens that a processor leaves out at the front of each padded prompt, all padding in front; None: it does
    not.
    """
    given = getattr(processor, "prompt_ignore_length", None)
    if given is None:
        return None
    width = prompts.ids.shape[1]
    given = torch.as_tensor(given, device=prompts.ids.device).expand(len(prompts.ids))
    return torch.where(given < width, (given + prompts.trailing).clamp(max=width), given)


def with_padding(processors: LogitsProcessorList, prompts: Prompts) -> LogitsProcessorList:
    """The same processors for histories with padding in front, wherever the caller's padding was."""
    adapted = LogitsProcessorList()
    for processor in processors:
        counts = _left_out(processor, prompts)
        if counts is not None:
            processor = leaving_out(processor, int(counts[0]) if len(counts.unique()) == 1 else counts)
        adapted.append(processor)
    return adapted


def without_padding(processors: LogitsProcessorList, prompts: Prompts) -> LogitsProcessorList:
    """The same processors for `process_tree`, whose histories hold no padding: what they leave out, per prompt."""
    adapted = LogitsProcessorList()
    for processor in processors:
        counts = _left_out(processor, prompts)
        if counts is not None:
            processor = leaving_out(processor, (counts - prompts.leading - prompts.trailing).clamp(min=0))
        adapted.append(processor)
    return adapted
