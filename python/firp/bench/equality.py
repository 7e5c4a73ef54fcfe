"""Are two outputs the same, and if not, was it a tie that rounding decided?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firp.bench.methods import Results
from firp.tools.ranks import launched_ranks


@dataclass(frozen=True)
class Difference:
    """The first token at which a method leaves Hugging Face's output.

    Attributes:
        index: of the prompt among those run. prompt: its id.
        turn: of the conversation, from 0. Later turns have other prompts and are not compared.
        position: of the token among the new ones of the turn.
        gap: score of Hugging Face's token minus score of the method's, in the model's dtype.
        gap_float64: the same in float64; NaN where the model is sharded, of which no copy is made.
    """

    index: int
    prompt: str
    turn: int
    position: int
    gap: float
    gap_float64: float


@torch.no_grad()
def score_gap(model: PreTrainedModel, ids: Tensor, expected: int, got: int) -> float:
    """Score of `expected` minus score of `got` as the token after ids [1, T]."""
    scores = model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits[0, -1]
    return float(scores[expected].double() - scores[got].double())


def first_difference(expected: list[int], got: list[int]) -> int | None:
    """Index of the first token that differs (the end counts as one), or None."""
    for i, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return i
    return None if len(expected) == len(got) else min(len(expected), len(got))


def compare(results: Results, model: PreTrainedModel) -> dict[str, list[Difference]]:
    """First differences of every method from Hugging Face's output, each settled in float64."""
    exact = None
    found: dict[str, list[Difference]] = {name: [] for name in results.runs}
    for name, repeats in results.runs.items():
        for i, runs in enumerate(repeats[0]):
            for turn, (run, base) in enumerate(zip(runs, results.runs["hf"][0][i], strict=True)):
                position = first_difference(base.tokens, run.tokens)
                if position is None:
                    continue
                if position >= min(len(base.tokens), len(run.tokens)):
                    gaps = (float("nan"), float("nan"))
                else:
                    ids = results.inputs[i][turn]
                    ids = torch.cat(
                        [ids, torch.tensor([base.tokens[:position]], dtype=torch.long, device=ids.device)], 1
                    )
                    gap = score_gap(model, ids, base.tokens[position], run.tokens[position])
                    gaps = (gap, float("nan"))
                    if launched_ranks() == 1:
                        exact = exact or copy.deepcopy(model).double()
                        gaps = (gap, score_gap(exact, ids, base.tokens[position], run.tokens[position]))
                found[name].append(Difference(i, results.prompts[i].id, turn, position, *gaps))
                break
    return found
