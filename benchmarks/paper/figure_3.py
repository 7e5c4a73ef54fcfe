"""Figure 3: how often the model's own token is among a drafter's first n, n = 1..10, at each prediction step.

python -m benchmarks.paper.figure_3

A drafter's order is that of argmax: of equal scores the lower token comes first. "firp" reweights its 16 best
candidates with the token transition, given the text's own token before, and updates its states; the paper has neither.
"""

from __future__ import annotations

from typing import Any

import torch
from firp.drafting.recording import Recording
from torch import Tensor

from benchmarks.paper.setup import NAMES, Setup

NAME = "figure-3"
RANKS = 10


def measure(setup: Setup) -> None:
    """Parts by drafter: positions, and shares [k, 10] of them."""
    document = setup.document(NAME, ranks=RANKS)
    for drafter in setup.drafters:
        document.part(drafter, setup.made_from(drafter), lambda drafter=drafter: _shares(setup, drafter))


def _shares(setup: Setup, drafter: str) -> dict:
    transition = setup.transition_of(drafter)
    ranks = torch.cat([ranks_of(recording, transition) for recording in setup.recordings(drafter)])
    within = ranks[..., None] < torch.arange(1, RANKS + 1)
    return {"positions": len(ranks), "top": within.double().mean(0).tolist()}


def ranks_of(recording: Recording, transition: tuple[Tensor, Tensor] | None) -> Tensor:
    """Place [n, k] of the answer's own token in a drafter's order, at positions that have all k tokens after them; K
    where it is not among the K candidates."""
    k, among = recording.candidates.shape[1:]
    count = max(len(recording.tokens) - 1 - k, 0)
    own = torch.stack([recording.tokens[j + 2 : j + 2 + count] for j in range(k)], 1)
    probabilities, candidates = recording.probabilities[:count], recording.candidates[:count]
    if transition is not None:
        source, target = transition
        before = torch.stack([recording.tokens[j + 1 : j + 1 + count] for j in range(k)], 1)
        factor = (source[before].float()[:, :, None] * target[candidates].float()).sum(-1)
        if recording.knows_next:  # An updated row of the first step knows the token before.
            factor[:, 0] = 0
        order = (probabilities.log() + factor).sort(dim=-1, descending=True, stable=True).indices
        candidates = candidates.gather(-1, order)
    match = candidates == own[..., None]
    return torch.where(match.any(-1), match.int().argmax(-1), among)


def draw(document: dict, pyplot: Any) -> Any:
    k = max(len(part["figures"]["top"]) for part in document["parts"].values())
    drawn, every = pyplot.subplots(1, k, figsize=(3.4 * k, 3.6), sharey=True, squeeze=False)
    for step, axes in enumerate(every[0]):
        for name, part in document["parts"].items():
            if step < len(part["figures"]["top"]):
                top = part["figures"]["top"][step]
                axes.plot(range(1, len(top) + 1), [100 * share for share in top], marker=".", label=NAMES[name])
        axes.set(title=f"prediction step {step + 1}", xlabel="n")
    every[0][0].set_ylabel("model's token among the first n, %")
    every[0][0].legend()
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    from benchmarks.paper.alone import alone

    alone(NAME)
