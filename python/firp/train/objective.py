"""The training objective: pseudo rows after the base model's own distribution, the token transition after its
choices."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from firp.decoder.passes import RealRows, pseudo_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import UnitEmbeddings
from firp.drafting.trees import MAX_RANKS
from firp.train.data import Batch, possible_anchors


def sample_anchors(batch: Batch, num_offsets: int, anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw anchor positions in the answers, without replacement.

    An anchor's k targets must be inside one answer. Memory is bounded by `anchors`, for any length.

    Returns:
        anchors [B, A] int64, and valid [B, A] bool (short answers leave invalid anchors, which point at 0).
    """
    allowed = possible_anchors(batch.answers, num_offsets)
    priority = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0)
    top = priority.topk(min(anchors, allowed.shape[1]), dim=1)
    valid = top.values >= 0
    return top.indices.masked_fill(~valid, 0), valid


# Anchors that pass the head together: on a CPU, on a GPU.
ANCHORS_AT_ONCE = (64, 1024)


@dataclass(frozen=True)
class OffsetScores:
    """Sums over anchors, per offset [k].

    Attributes:
        kl: from the model's distribution to the pseudo row's.
        top1, top4, top10: how often the model's choice is among the row's first.
        followed1, followed4: the same for the order of its best candidates given the tokens before, by the token
            transition.
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
    def of(cls, sums: Tensor, count: int) -> OffsetScores:
        """Scores of the sums [6, k] in the order of the fields."""
        kl, top1, top4, top10, followed1, followed4 = sums.cpu()
        return cls(kl, top1, top4, top10, followed1, followed4, count)

    def sums(self) -> Tensor:
        """The sums [6, k], as `of` takes them."""
        return torch.stack([value for name, value in vars(self).items() if name != "count"])

    @classmethod
    def total(cls, parts: list[OffsetScores]) -> OffsetScores:
        """Sums over batches."""
        return cls(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)})

    def means(self) -> dict[str, Tensor]:
        return {name: value / self.count for name, value in vars(self).items() if name != "count"}


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
class _Part:
    """Some anchors of a batch.

    Attributes:
        rows: [n, k, d] final states of their pseudo rows.
        before: [n, k] the text's token before each one's.
        teacher: [n, k, V] the model's own scores there.
        choice: [n, k] the model's choice.
        weights: [k] of a row in the loss.
    """

    rows: Tensor
    before: Tensor
    teacher: Tensor
    choice: Tensor
    weights: Tensor


def sums_of(divergence: Tensor, rank: Tensor, followed: Tensor) -> Tensor:
    hits = [(rank < 1), (rank < 4), (rank < 10), (followed < 1), (followed < 4)]
    return torch.stack([divergence.detach().sum(0), *(hit.sum(0).float() for hit in hits)])


@dataclass(frozen=True)
class Objective:
    """What a predictor is trained on, as sums over anchors and offsets, offset j weighing offset_weights[j].

    The maps: KL(model at i + j || pseudo[i, j]). The token transition and its context: cross-entropy of the model's own
    distribution after the text's tokens, over the pseudo row's best candidates alone; they leave the maps as they are.

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
        count: int | None = None,
    ) -> OffsetScores:
        """Scores at the anchors [B, A] that are `valid` in sequences `tokens` [B, T] with rows `real`.

        The valid anchors of a sequence come first, as `sample_anchors` puts them.

        `count` is the number of anchors that the mean is over, where other ranks have some of them.

        The head runs over some anchors at a time, so that few scores [n, k, V] are alive. With `want_gradient` the mean
        over anchors is differentiated, and the gradients are added to the predictor's parameters.
        """
        maps_learn = want_gradient and self.trains_maps
        with torch.set_grad_enabled(maps_learn):
            rows = pseudo_rows(self.view, predictor.weight, real, anchors, self.insertion_layer)
        gradient = torch.zeros_like(rows)
        # Read back once: an index by a mask would wait for the device at every part.
        counts = valid.sum(1).tolist()
        chosen = [b * anchors.shape[1] + i for b, count in enumerate(counts) for i in range(count)]
        k, length, device = len(self.offset_weights), tokens.shape[1], tokens.device
        offsets = torch.arange(1, k + 1, device=device)
        count = max(len(chosen), 1) if count is None else count
        weights, sums = self.offset_weights / count, torch.zeros(6, k, device=device)
        places = torch.tensor(chosen, dtype=torch.int64, device=device)
        # In the order of the text, so that neighbours share targets.
        sources, order = (places // anchors.shape[1] * length + anchors.flatten()[places]).sort()
        at_once = ANCHORS_AT_ONCE[device.type == "cuda"]
        parts = zip(places[order].split(at_once), sources.split(at_once), strict=True)
        for index, flat in parts if chosen else ():
            positions = flat[:, None] + offsets
            targets, inverse = positions.unique(return_inverse=True)
            with torch.no_grad():
                teacher = self.view.logits(real.final.flatten(0, 1)[targets]).float()
            leaf = rows.detach().flatten(0, 1)[index].requires_grad_(maps_learn)
            choice = teacher.argmax(-1)[inverse]
            part = _Part(leaf, tokens.flatten()[positions], teacher[inverse], choice, weights)
            sums += self.scored(predictor, part, [leaf] * maps_learn, want_gradient)
            if maps_learn:
                gradient.view(-1, *leaf.shape[1:])[index] = leaf.grad
        if maps_learn:
            rows.backward(gradient, inputs=[predictor.weight])
        return OffsetScores.of(sums, count)

    def scored(self, predictor: FirpPredictor, part: _Part, leaves: list[Tensor], want_gradient: bool) -> Tensor:
        """Sums [6, k] of the rows as they are, and of the token transition if there is one."""
        with torch.set_grad_enabled(bool(leaves)):
            student = self.view.logits(part.rows).float()
            divergence = divergence_of(student, part.teacher)
        if leaves:
            (divergence * part.weights).sum().backward(inputs=leaves)
        student = student.detach()
        rank = followed = rank_of(student, part.choice)
        if self.embeddings is not None:
            with torch.set_grad_enabled(want_gradient):
                loss, followed = self.follow(predictor, student, part)
            if want_gradient:
                learning = [predictor.transition, *predictor.context_tensors]
                (loss * part.weights).sum().backward(inputs=learning)
        return sums_of(divergence, rank, followed)

    def follow(self, predictor: FirpPredictor, student: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        """Loss [n, k] and rank of the model's choice after the tokens before, given scores [n, k, V].

        A choice that is not among the candidates has the rank after the last.
        """
        best = student.topk(min(MAX_RANKS, student.shape[-1]), dim=-1)
        source, target = cast(Tensor, predictor.transition)
        embed = cast(UnitEmbeddings, self.embeddings)
        query = embed(part.before) @ source
        context = predictor.context(part.rows.device, torch.float32)
        if context is not None:
            before = self.view.embed(part.before).float()
            known = context.known(part.rows.detach().float(), before[:, 0])
            query = query + context.queries(known, before[:, :, None])[:, :, 0]
        factor = (query[..., None, :] * (embed(best.indices) @ target)).sum(-1)
        scores = torch.log_softmax(best.values + factor, dim=-1)
        goal = torch.softmax(part.teacher.gather(-1, best.indices), dim=-1)
        found, place = (best.indices == part.choice[..., None]).max(-1)
        return -(goal * scores).sum(-1), rank_of(scores.detach(), place).where(found, scores.shape[-1])
