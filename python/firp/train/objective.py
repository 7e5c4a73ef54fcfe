"""The training objective: pseudo rows after the base model's own distribution, the token transition after its
choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from firp.decoder.passes import RealRows, pseudo_rows
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import UnitEmbeddings
from firp.drafting.trees import MAX_RANKS
from firp.train.data import Batch, possible_anchors
from firp.train.targets import KeptRows, Targets, divergence_of, rank_of
from firp_kernels.ops.update_states import updated


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


def examine(
    view: DecoderView,
    rows: Tensor,
    final: Tensor,
    positions: Tensor,
    draft_tokens: Tensor | None = None,
    divergence: Callable[[Tensor, Tensor], Tensor] = divergence_of,
) -> Targets:
    """What the model teaches at pseudo rows [n, k, d], with the gradient of `kl` where they have one.

    Args:
        final: [B, T, d] the model's own final states.
        positions: [n, k] of these, counted over all sequences.
        draft_tokens: [M] that may be candidates; None: all.
        divergence: of the rows' scores from the model's, both [n, k, V], that takes the place of `kl`.
    """
    own, inverse = positions.unique(return_inverse=True)
    with torch.no_grad():
        teacher = view.logits(final.flatten(0, 1)[own])[inverse].float()
    with torch.set_grad_enabled(rows.requires_grad and torch.is_grad_enabled()):
        student = view.logits(rows).float()
        kl = divergence(student, teacher)
    student, ranks = student.detach(), MAX_RANKS
    if draft_tokens is not None:
        left_out = torch.ones(student.shape[-1], dtype=torch.bool, device=student.device)
        student = student.masked_fill(left_out.index_fill(0, draft_tokens, False), float("-inf"))
        ranks = min(ranks, len(draft_tokens))
    return Targets.of(kl, student, teacher, ranks)


def sums_of(divergence: Tensor, rank: Tensor, followed: Tensor) -> Tensor:
    hits = [(rank < 1), (rank < 4), (rank < 10), (followed < 1), (followed < 4)]
    return torch.stack([divergence.detach().sum(0), *(hit.sum(0).float() for hit in hits)])


@dataclass(frozen=True)
class Objective:
    """What a predictor is trained on, as sums over anchors and offsets, offset j weighing offset_weights[j].

    The maps and the update: KL(model at i + j || pseudo[i, j], updated). The token transition: cross-entropy of the
    model's own distribution after the text's tokens, over the pseudo row's best candidates alone; it leaves the others
    as they are. The maps learn by the states alone, not by what the update reads of them.

    Attributes:
        view: the base model.
        insertion_layer: t.
        offset_weights: [k].
        embeddings: of the base model, for the transition; None where the predictor has none.
        trains_maps: whether the maps get a gradient.
        divergence: what maps and update learn instead of the KL. Scores without a gradient are of the KL always.
        state_distance: of final states from the model's own, both [n, k, d]: [n, k], learned beside the divergence.
    """

    view: DecoderView
    insertion_layer: int
    offset_weights: Tensor
    embeddings: UnitEmbeddings | None
    trains_maps: bool
    divergence: Callable[[Tensor, Tensor], Tensor] = divergence_of
    state_distance: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(
        self,
        predictor: FirpPredictor,
        tokens: Tensor,
        real: RealRows | KeptRows,
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
        if isinstance(real, KeptRows):
            rows = real.pseudo[torch.arange(len(anchors), device=anchors.device)[:, None], anchors]
        else:
            with torch.set_grad_enabled(maps_learn):
                rows = pseudo_rows(self.view, predictor.weight, real, anchors, self.insertion_layer)
        gradient = torch.zeros_like(rows)
        # Read back once: an index by a mask would wait for the device at every part.
        counts = valid.sum(1).tolist()
        chosen = [b * anchors.shape[1] + i for b, count in enumerate(counts) for i in range(count)]
        k, length, device = len(self.offset_weights), tokens.shape[1], tokens.device
        count = max(len(chosen), 1) if count is None else count
        weights, sums = self.offset_weights / count, torch.zeros(6, k, device=device)
        places = torch.tensor(chosen, dtype=torch.int64, device=device)
        # In the order of the text, so that neighbours share what the model's head scores.
        sources, order = (places // anchors.shape[1] * length + anchors.flatten()[places]).sort()
        at_once = ANCHORS_AT_ONCE[device.type == "cuda"]
        learning = [tensor for tensor in predictor.final_tensors if tensor.requires_grad]
        parts = zip(places[order].split(at_once), sources.split(at_once), strict=True)
        for index, flat in parts if chosen else ():
            positions = flat[:, None] + torch.arange(1, k + 1, device=device)
            leaf = rows.detach().flatten(0, 1)[index].requires_grad_(maps_learn)
            before = tokens.flatten()[positions]
            with torch.set_grad_enabled(want_gradient):
                states = self.updated(predictor, leaf, before[:, 0]) if predictor.update_width else leaf
                divergence = self.divergence if want_gradient else divergence_of
                targets = examine(self.view, states, real.final, positions, predictor.draft_tokens, divergence)
                loss, followed = targets.kl, targets.rank
                if want_gradient and self.state_distance is not None:
                    loss = loss + self.state_distance(states, real.final.flatten(0, 1)[positions])
                if self.embeddings is not None:
                    follows, followed = self.follow(predictor, before, targets)
                    loss = loss + follows
            if want_gradient:
                (loss * weights).sum().backward(inputs=[*learning, *([leaf] if maps_learn else [])])
            if maps_learn:
                gradient.view(-1, *leaf.shape[1:])[index] = leaf.grad
            sums += sums_of(targets.kl, targets.rank, followed)
        if maps_learn:
            rows.backward(gradient, inputs=predictor.map_tensors)
        return OffsetScores.of(sums, count)

    def updated(self, predictor: FirpPredictor, rows: Tensor, first: Tensor) -> Tensor:
        """Rows [n, k, d] updated given the tokens [n] after their anchors; of the rows only what is added to has a
        gradient."""
        weights = predictor.update_weights(rows.device, torch.float32)
        seen = rows.detach().float()
        return rows + (updated(seen, self.view.embed(first).float(), *weights) - seen).to(rows.dtype)

    def follow(self, predictor: FirpPredictor, before: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Loss [n, k] and rank of the model's choice after the text's tokens before [n, k].

        A choice that is not among the candidates has the rank after the last.
        """
        query, target = self.query(predictor, before), cast(Tensor, predictor.transition)[1]
        if predictor.update_width:  # the row of offset 1 knows the token before
            query = torch.cat([torch.zeros_like(query[:, :1]), query[:, 1:]], 1)
        factor = (query[..., None, :] * (cast(UnitEmbeddings, self.embeddings)(targets.best) @ target)).sum(-1)
        scores = torch.log_softmax(targets.scores + factor, dim=-1)
        loss = -(torch.softmax(targets.goal, dim=-1) * scores).sum(-1)
        most = scores.shape[-1]
        rank = rank_of(scores.detach(), targets.place.clamp(max=most - 1))
        return loss, rank.where(targets.place < most, most)

    def query(self, predictor: FirpPredictor, before: Tensor) -> Tensor:
        """Factors [n, k, r] of the tokens [n, k] before the candidates."""
        return cast(UnitEmbeddings, self.embeddings)(before) @ cast(Tensor, predictor.transition)[0]
