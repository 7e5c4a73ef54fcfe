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
from firp.drafting.refined import DraftHead
from firp.drafting.refiner import unit
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


# Anchors that pass the head together: on a CPU, on a GPU; and as many times more where a list of tokens is scored.
ANCHORS_AT_ONCE = (64, 1024)
LISTED_TIMES = 4
# One anchor in this many is seen again from one token further on.
LATER_SHARE = 4


@dataclass(frozen=True)
class OffsetScores:
    """Sums over anchors, per offset [k].

    Attributes:
        kl: from the model's distribution to the pseudo row's, updated by the refiner where there is one.
        top1, top4, top10: how often the model's choice is among the row's first. Its choice among all tokens, but in a
            step that learns over listed tokens, its choice among these.
        followed1, followed4: the same for the order of its best candidates given the tokens before, by the token
            transition or the refiner.
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
        teacher: [n, k, M] the model's own scores there, of the tokens that may be drafted.
        choice: [n, k] the model's choice, as a token.
        weights: [k] of a row in the loss.
    """

    rows: Tensor
    before: Tensor
    teacher: Tensor
    choice: Tensor
    weights: Tensor

    def later(self, levels: int) -> _Part:
        """Some of the rows where the first `levels` of their tokens are decided: one in LATER_SHARE^levels."""
        if not levels:
            return self
        tensors = (self.rows, self.before, self.teacher, self.choice)
        rows, before, teacher, choice = (tensor[:: LATER_SHARE**levels, levels:] for tensor in tensors)
        return _Part(rows, before, teacher, choice, self.weights[: len(self.weights) - levels])


def sums_of(divergence: Tensor, rank: Tensor, followed: Tensor) -> Tensor:
    hits = [(rank < 1), (rank < 4), (rank < 10), (followed < 1), (followed < 4)]
    return torch.stack([divergence.detach().sum(0), *(hit.sum(0).float() for hit in hits)])


@dataclass(frozen=True)
class Objective:
    """What a predictor is trained on, as sums over anchors and offsets, offset j weighing offset_weights[j].

    The maps: KL(model at i + j || pseudo[i, j]). The token transition: cross-entropy of the model's own choice after
    the text's tokens, over the pseudo row's best candidates; it leaves the maps alone. The refiner: the same KL of the
    updated rows, given the first token after the anchor, and given the token before too; the maps learn with it.

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
        head = DraftHead(self.view, predictor.draft_tokens) if predictor.refiner_width else None
        weights, sums = self.offset_weights / count, torch.zeros(6, k, device=device)
        places = torch.tensor(chosen, dtype=torch.int64, device=device)
        # In the order of the text, so that neighbours share targets.
        sources, order = (places // anchors.shape[1] * length + anchors.flatten()[places]).sort()
        at_once = ANCHORS_AT_ONCE[device.type == "cuda"] * (LISTED_TIMES if head and head.tokens is not None else 1)
        parts = zip(places[order].split(at_once), sources.split(at_once), strict=True)
        for index, flat in parts if chosen else ():
            positions = flat[:, None] + offsets
            targets, inverse = positions.unique(return_inverse=True)
            teacher, choice = self.teach(real.final.flatten(0, 1)[targets], head, want_gradient)
            leaf = rows.detach().flatten(0, 1)[index].requires_grad_(maps_learn)
            part = _Part(leaf, tokens.flatten()[positions], teacher[inverse], choice[inverse], weights)
            if head is None:
                sums += self.plain(predictor, part, [leaf] * maps_learn, want_gradient)
            else:
                sums += self.refined(predictor, head, part, [leaf] * maps_learn, want_gradient)
            if maps_learn:
                gradient.view(-1, *leaf.shape[1:])[index] = leaf.grad
        if maps_learn:
            rows.backward(gradient, inputs=[predictor.weight])
        return OffsetScores.of(sums, count)

    @torch.no_grad()
    def teach(self, final: Tensor, head: DraftHead | None, listed: bool) -> tuple[Tensor, Tensor]:
        """The model's scores [n, M] of the tokens of `head`, and its choice [n] among all tokens or, `listed`, these.

        Steps take the choice among a list, since the whole head would take a third of their time.
        """
        if head is None or not listed or head.tokens is None:
            scores = self.view.logits(final).float()
            return scores if head is None else head.among(scores), scores.argmax(-1)
        scores = head(final).float()
        return scores, head.tokens_at(scores.argmax(-1))

    def plain(self, predictor: FirpPredictor, part: _Part, leaves: list[Tensor], want_gradient: bool) -> Tensor:
        """Sums [6, k] of the rows as they are, and of the token transition if there is one."""
        choice = part.choice
        with torch.set_grad_enabled(bool(leaves)):
            student = self.view.logits(part.rows).float()
            divergence = divergence_of(student, part.teacher)
        if leaves:
            (divergence * part.weights).sum().backward(inputs=leaves)
        student = student.detach()
        rank = followed = rank_of(student, choice)
        if self.embeddings is not None:
            with torch.set_grad_enabled(want_gradient):
                loss, followed = self.follow(predictor.transition, student, part.before, choice)
            if want_gradient:
                (loss * part.weights).sum().backward(inputs=[predictor.transition])
        return sums_of(divergence, rank, followed)

    def refined(
        self, predictor: FirpPredictor, head: DraftHead, part: _Part, leaves: list[Tensor], want_gradient: bool
    ) -> Tensor:
        """Sums [6, k] of the rows that the refiner updated, over the tokens of `head`.

        Some anchors are seen again from m tokens further on, as when the lookahead slot is m levels up: the rows of
        offsets m + 1 .. k then follow the token m positions later.
        """
        parameters = [predictor.refiner_inputs, predictor.refiner_bias, predictor.refiner_outputs]
        for levels in range(len(part.weights)):
            seen = part.later(levels)
            with torch.set_grad_enabled(want_gradient):
                marginal, conditional = (head(rows).float() for rows in self._refine(predictor, seen))
                loss = (divergence_of(marginal, seen.teacher) * seen.weights).sum()
                if conditional.shape[1]:
                    loss = loss + (divergence_of(conditional, seen.teacher[:, 1:]) * seen.weights[1:]).sum()
            if want_gradient:
                loss.backward(inputs=[*leaves, *parameters])
            if not levels:
                sums = self._refined_sums(head, marginal.detach(), conditional.detach(), part)
            if not want_gradient:
                break
        return sums

    def _refine(self, predictor: FirpPredictor, part: _Part) -> tuple[Tensor, Tensor]:
        """Rows [n, k', d] given the first token, and [n, k' - 1, d] of later depths given the token before too."""
        refiner = predictor.refiner(part.rows.device, part.rows.dtype)
        before = unit(self.view.embed(part.before))
        rows = part.rows
        inner = refiner.inner(rows, before[:, 0])
        deeper = [refiner.updated(d, rows[:, d], inner[:, d], before[:, d]) for d in range(1, rows.shape[1])]
        marginal = refiner.marginal(rows, inner)
        return marginal, torch.stack(deeper, 1) if deeper else marginal[:, :0]

    def _refined_sums(self, head: DraftHead, marginal: Tensor, conditional: Tensor, part: _Part) -> Tensor:
        """Sums [6, k] of scores [n, k, M] given the first token, and [n, k - 1, M] given the token before too."""
        most = marginal.shape[-1]
        choice = head.places_of(part.choice)
        best = marginal.topk(min(MAX_RANKS, most), dim=-1)
        given = torch.cat([marginal[:, :1], conditional], 1).gather(-1, best.indices)
        found, place = (best.indices == choice[..., None]).max(-1)
        followed = rank_of(given, place).where(found, most)
        rank = rank_of(marginal, choice.clamp(max=most - 1)).where(choice < most, most)
        return sums_of(divergence_of(marginal, part.teacher), rank, followed)

    def follow(self, transition: Tensor, student: Tensor, previous: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and rank of `choice` [n, k] after the tokens `previous` [n, k], given scores [n, k, V].

        A choice that is not among the candidates has no loss and the rank after the last.
        """
        best = student.topk(min(MAX_RANKS, student.shape[-1]), dim=-1)
        source, target = transition
        embed = cast(UnitEmbeddings, self.embeddings)
        factor = ((embed(previous) @ source)[..., None, :] * (embed(best.indices) @ target)).sum(-1)
        scores = torch.log_softmax(best.values + factor, dim=-1)
        found, place = (best.indices == choice[..., None]).max(-1)
        loss = -scores.gather(-1, place[..., None])[..., 0].where(found, 0.0)
        return loss, rank_of(scores.detach(), place).where(found, scores.shape[-1])
