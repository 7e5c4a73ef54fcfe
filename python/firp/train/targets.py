"""What the model's scores teach at pseudo rows: how near they are, and the candidates that a transition orders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from firp.drafting.trees import MAX_RANKS


def divergence_of(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL per (anchor, offset)."""
    teacher = torch.log_softmax(teacher_logits, dim=-1)
    student = torch.log_softmax(student_logits, dim=-1)
    return functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def rank_of(scores: Tensor, choice: Tensor) -> Tensor:
    """Place of `choice` [...] among scores [..., n] in the order of argmax: the highest first, the first of equals.

    A choice whose score others share is a hit only where argmax would take it. NaN scores come before all others, and a
    choice of score NaN after them.
    """
    own = scores.gather(-1, choice[..., None])
    before = torch.arange(scores.shape[-1], device=scores.device) < choice[..., None]
    return ((scores > own) | ((scores == own) & before) | scores.isnan() | own.isnan()).sum(-1)


@dataclass(frozen=True)
class Targets:
    """Of pseudo rows [n, k], each with its K best candidates.

    Attributes:
        kl: [n, k] from the model's distribution to the row's.
        rank: [n, k] int64 of the model's choice in the row's order of all tokens.
        place: [n, k] int64 of the model's choice among the candidates; K where it is none of them.
        best: [n, k, K] int64 the candidates, the best first.
        scores: [n, k, K] their scores by the row.
        goal: [n, k, K] their scores by the model.
    """

    kl: Tensor
    rank: Tensor
    place: Tensor
    best: Tensor
    scores: Tensor
    goal: Tensor

    @classmethod
    def of(cls, kl: Tensor, student: Tensor, teacher: Tensor, ranks: int = MAX_RANKS) -> Targets:
        """From scores [n, k, V] of the rows and of the model; at most `ranks` candidates."""
        choice = teacher.argmax(-1)
        scores, best = student.topk(min(ranks, student.shape[-1]), dim=-1)
        found, place = (best == choice[..., None]).max(-1)
        place = place.where(found, best.shape[-1])
        return cls(kl, rank_of(student, choice), place, best, scores, teacher.gather(-1, best))


@dataclass(frozen=True)
class KeptRows:
    """Of whole sequences, what a transition and an update learn from where the maps never change.

    Attributes:
        pseudo: [B, T, k, d] final states of the pseudo rows; of meaning at possible anchors.
        final: [B, T, d] the model's own final states.
    """

    pseudo: Tensor
    final: Tensor
