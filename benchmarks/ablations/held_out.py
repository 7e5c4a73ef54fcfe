"""What maps draft on held-out text: accuracy at each offset, and tau of some trees."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import firp
import torch
from firp.decoder.passes import RealRows, RecordingAttention, pseudo_rows
from firp.decoder.view import DecoderView
from firp.drafting.recording import make_profile
from firp.generation.batch import greedy_answers
from firp.train.data import TextDataset, make_batch
from firp.train.objective import ANCHORS_AT_ONCE, OffsetScores, examine, sample_anchors, sums_of
from torch import Tensor

from benchmarks.closed_form import BATCH, MAX_LENGTH, Source, states_after

TREES = ((4, 2), (8, 8), (64, 64))
ANCHORS, PROMPTS, NEW_TOKENS = 64, 24, 96


@dataclass
class HeldOut:
    """Held-out sequences, and the model's greedy answers to their first prompts.

    Attributes:
        view: the base model.
        dataset, indices: the text, and which sequences of it.
        layer: the insertion layer.
        answers: of the first prompts, where they are known; decoded at first use.
    """

    view: DecoderView
    dataset: TextDataset
    indices: list[int]
    layer: int
    answers: list[list[int]] = field(default_factory=list)

    @torch.no_grad()
    def accuracy(self, maps: dict[str, tuple[Source, Tensor]]) -> dict[str, dict]:
        """Of each map [k, d, s]: KL and shares [k] of the model's own choice among the first 1, 4 and 10."""
        view, scores = self.view, {name: [] for name in maps}  # type: ignore[var-annotated]
        layers = [view.num_layers, self.layer, *(layer for source, _ in maps.values() for layer in source.layers)]
        most = max(len(weight) for _, weight in maps.values())
        for start in range(0, len(self.indices), BATCH):
            batch = make_batch(self.dataset, self.indices[start : start + BATCH], MAX_LENGTH)
            generator = torch.Generator().manual_seed(start)
            anchors, valid = (part.to(view.device) for part in sample_anchors(batch, most, ANCHORS, generator))
            attention = RecordingAttention(self.layer)
            states = states_after(view, batch.tokens.to(view.device), layers, attention)
            final, length = states[view.num_layers], batch.tokens.shape[1]
            places = (torch.arange(len(anchors), device=view.device)[:, None] * length + anchors)[valid]
            for name, (source, weight) in maps.items():
                real = RealRows(source.of(states), final, attention.recorded)
                rows = pseudo_rows(view, weight, real, anchors, self.layer)[valid]
                offsets = torch.arange(1, len(weight) + 1, device=view.device)
                at_once = ANCHORS_AT_ONCE[view.device.type == "cuda"]
                for some, flat in zip(rows.split(at_once), places.split(at_once), strict=True):
                    found = examine(view, some, final, flat[:, None] + offsets)
                    scores[name].append(OffsetScores.of(sums_of(found.kl, found.rank, found.rank), len(flat)))
        totals = {name: OffsetScores.total(parts) for name, parts in scores.items()}
        return {
            name: {"anchors": total.count}
            | {kind: total.means()[kind].tolist() for kind in ("kl", "top1", "top4", "top10")}
            for name, total in totals.items()
        }

    @cached_property
    def prompts(self) -> list[Tensor]:
        chosen = self.indices[:PROMPTS]
        return [self.dataset.sequence(index)[: self.dataset.prompt_lengths[index]] for index in chosen]

    def tau(self, weight: Tensor, offsets: list[int]) -> dict[str, dict[str, float]]:
        """tau of maps [k, d, d] on the model's greedy answers, by tree and by how many offsets it takes."""
        if not self.answers:
            self.answers = greedy_answers(firp.Engine(self.view.model), self.prompts, NEW_TOKENS, BATCH)
        predictor = firp.FirpPredictor.for_model(self.view.model, len(weight), self.layer)
        with torch.no_grad():
            predictor.weight.copy_(weight)
        found = [(prompt, answer, "held out") for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        profile = make_profile(self.view, predictor, found, None)
        return {
            f"{nodes}, {lookahead}": {str(k): profile.tau(firp.TreeConfig(nodes, lookahead), k) for k in offsets}
            for nodes, lookahead in TREES
        }
