"""The training objective: pseudo rows after the base model's own distribution, the token transition after its choices."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from firp.decoder.passes import RealRows, pseudo_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import UnitEmbeddings
from firp.drafting.trees import MAX_RANKS
from firp.train.data import Batch


def sample_anchors(batch: Batch, num_offsets: int, anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw anchor positions in the answers, without replacement.

    An anchor's k targets must lie inside the sequence. Memory is bounded by `anchors`, whatever the length.

    Returns:
        anchors [B, A] int64, and valid [B, A] bool (short answers leave invalid anchors, which point at 0).
    """
    batch_size, length = batch.tokens.shape
    position = torch.arange(length)
    first = (batch.prompt_lengths - 1).clamp(min=0)
    allowed = (position >= first[:, None]) & (position + num_offsets < batch.lengths[:, None])
    priority = torch.rand(batch_size, length, generator=generator).masked_fill(~allowed, -1.0)
    top = priority.topk(min(anchors, length), dim=1)
    valid = top.values >= 0
    return top.indices.masked_fill(~valid, 0), valid


@dataclass(frozen=True)
class OffsetScores:
    """Sums over anchors, per offset [k].

    Attributes:
        kl: from the model's distribution to the pseudo row's.
        top1, top4, top10: how often the model's choice is among the pseudo row's first.
        followed1, followed4: the same for the token transition's order, given the tokens before.
        count: anchors.
    """

    kl: Tensor
    top1: Tensor
    top4: Tensor
    top10: Tensor
    followed1: Tensor
    followed4: Tensor
    count: int

    @classmethod
    def total(cls, parts: list[OffsetScores]) -> OffsetScores:
        """Sums over batches."""
        return cls(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)})

    def means(self) -> dict[str, Tensor]:
        return {name: value / self.count for name, value in vars(self).items() if name != "count"}


def _divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL per (anchor, offset)."""
    teacher = torch.log_softmax(teacher_logits, dim=-1)
    student = torch.log_softmax(student_logits, dim=-1)
    return functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def _rank(scores: Tensor, choice: Tensor) -> Tensor:
    """How many scores [..., n] beat that of `choice` [...]."""
    return (scores > scores.gather(-1, choice[..., None])).sum(-1)


@dataclass(frozen=True)
class Objective:
    """What a predictor is trained on, as sums over anchors and offsets, offset j weighing offset_weights[j].

    The maps: KL(model at i + j || pseudo[i, j]). The token transition: cross-entropy of the model's own choice behind
    the text's tokens, over the pseudo row's best candidates; it leaves the maps alone.

    Attributes:
        view: the base model.
        insertion_layer: t.
        offset_weights: [k].
        embeddings: of the base model, for the transition; None where the predictor has none.
        trains_maps: whether the maps get a gradient.
    """

    view: DecoderView
    insertion_layer: int
    offset_weights: Tensor
    embeddings: UnitEmbeddings | None
    trains_maps: bool

    def __call__(
        self,
        predictor: FirpPredictor,
        tokens: Tensor,
        real: RealRows,
        anchors: Tensor,
        valid: Tensor,
        want_gradient: bool,
    ) -> OffsetScores:
        """Scores at the anchors [B, A] that are `valid` in sequences `tokens` [B, T] with rows `real`.

        The valid anchors of a sequence come first, as `sample_anchors` puts them.

        The head runs sequence by sequence, so that at most [max(T, A * k), V] scores are alive. With `want_gradient`
        the mean over anchors is differentiated, and the gradients are added to the predictor's parameters.
        """
        maps_learn = want_gradient and self.trains_maps
        with torch.set_grad_enabled(maps_learn):
            rows = pseudo_rows(self.view, predictor.weight, real, anchors, self.insertion_layer)
        leaf = rows.detach().requires_grad_(maps_learn)
        # Read back once: an index by a mask would wait for the device at every sequence.
        counts = valid.sum(1).tolist()
        total = max(sum(counts), 1)
        k = len(self.offset_weights)
        sums = torch.zeros(6, k, device=tokens.device)
        offsets = torch.arange(1, k + 1, device=tokens.device)
        for b, count in enumerate(counts):
            if not count:
                continue
            positions = anchors[b, :count, None] + offsets
            targets, inverse = positions.unique(return_inverse=True)
            with torch.no_grad():
                teacher = self.view.logits(real.final[b, targets])[inverse].float()
            choice = teacher.argmax(-1)
            with torch.set_grad_enabled(maps_learn):
                student = self.view.logits(leaf[b, :count]).float()
                divergence = _divergence(student, teacher)
            if maps_learn:
                ((divergence * self.offset_weights).sum() / total).backward(inputs=[leaf])
            student = student.detach()
            rank = followed = _rank(student, choice)
            if self.embeddings is not None:
                with torch.set_grad_enabled(want_gradient):
                    loss, followed = self.follow(predictor.transition, student, tokens[b, positions], choice)
                if want_gradient:
                    ((loss * self.offset_weights).sum() / total).backward(inputs=[predictor.transition])
            hits = [(rank < 1), (rank < 4), (rank < 10), (followed < 1), (followed < 4)]
            sums += torch.stack([divergence.detach().sum(0), *(hit.sum(0).float() for hit in hits)])
        if maps_learn:
            rows.backward(leaf.grad, inputs=[predictor.weight])
        return OffsetScores(*sums.cpu(), count=total)

    def follow(self, transition: Tensor, student: Tensor, previous: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and rank of `choice` [n, k] behind the tokens `previous` [n, k], given scores [n, k, V].

        A choice that is not among the candidates has no loss and the rank behind the last.
        """
        best = student.topk(min(MAX_RANKS, student.shape[-1]), dim=-1)
        source, target = transition
        factor = ((self.embeddings(previous) @ source)[..., None, :] * (self.embeddings(best.indices) @ target)).sum(-1)
        scores = torch.log_softmax(best.values + factor, dim=-1)
        found, place = (best.indices == choice[..., None]).max(-1)
        loss = -scores.gather(-1, place[..., None])[..., 0].where(found, 0.0)
        return loss, _rank(scores.detach(), place).where(found, scores.shape[-1])
