"""Figure 5: accuracy of the first prediction step against the insertion layer.

python -m benchmarks.paper.figure_5 --data text.npz

The map of each depth is a ridge regression in closed form, solved on training text in one pass. That is enough for the
curve's shape; maps that are trained further are better everywhere. What a pass has gathered is kept beside the JSON.
"""

from __future__ import annotations

from typing import Any

import torch
from firp.decoder.passes import RealRows, RecordingAttention, pseudo_rows
from firp.train.data import BatchOrder, load_dataset
from firp.train.targets import rank_of
from torch import Tensor

from benchmarks.closed_form import BATCH, MAX_LENGTH, SEED, Source, solve, states_after
from benchmarks.paper.setup import Setup

NAME = "figure-5"
DEPTHS = 6
POSITIONS_AT_ONCE = 64
RANKS = (1, 4, 10)


def depths(num_layers: int) -> list[int]:
    """Layers 1..L - 1, spread evenly."""
    return sorted({max(1, min(num_layers - 1, round(num_layers * i / DEPTHS))) for i in range(1, DEPTHS + 1)})


def measure(setup: Setup) -> None:
    """Parts by depth: positions and top-1, top-4, top-10 of pseudo[i, 1]; and those of the predictor at its layer."""
    if setup.data is None:
        raise ValueError("data: got none, expected training text: a file written by `firp distill`")
    dataset = load_dataset(setup.data)
    dataset.check_vocabulary(setup.model.config.vocab_size)
    document = setup.document(
        NAME, ridge_tokens=setup.ridge_tokens, batch_size=BATCH, max_length=MAX_LENGTH, seed=SEED,
        text=f"{len(dataset)} sequences, {len(dataset.tokens)} tokens",
    )  # fmt: skip
    predictor = setup.predictor
    own = {predictor.insertion_layer: predictor.weight}
    document.part("predictor", setup.made_from("firp"), lambda: _shares(setup, own)[predictor.insertion_layer])
    partial, found = document.path.with_suffix(".partial.pt"), {}
    sources = {str(depth): Source((depth,)) for depth in depths(setup.view.num_layers)}

    def of_depth(depth: int) -> dict:
        if not found:
            order = BatchOrder(dataset, torch.arange(len(dataset)).numpy(), BATCH, SEED)
            made_from = [setup.dtype]
            maps = solve(setup.view, dataset, order, sources, 1, setup.ridge_tokens, partial, made_from)
            found.update(_shares(setup, {int(name): weight for name, weight in maps.items()}))
        return found[depth]

    for depth in map(int, sources):
        document.part(str(depth), {"depth": depth}, lambda depth=depth: of_depth(depth))
    partial.unlink(missing_ok=True)


@torch.no_grad()
def _shares(setup: Setup, maps: dict[int, Tensor]) -> dict[int, dict]:
    """How often the answer's own token is among the first of pseudo[i, 1], by insertion layer."""
    view, device = setup.view, setup.view.device
    ranks: dict[int, list[Tensor]] = {depth: [] for depth in maps}
    for answer in setup.answers:
        tokens = torch.cat([answer.prompt, torch.tensor(answer.tokens)]).to(device)
        anchors = torch.arange(len(answer.prompt) - 1, len(tokens) - 2, device=device)
        if not len(anchors):
            continue
        attention = RecordingAttention(min(maps))
        states = states_after(view, tokens[None], [*maps, view.num_layers], attention)
        for depth, weight in maps.items():
            real = RealRows(states[depth], states[view.num_layers], attention.recorded)
            weight = weight[:1].to(device, view.dtype)
            for part in anchors.split(POSITIONS_AT_ONCE):
                scores = view.logits(pseudo_rows(view, weight, real, part[None], depth)[0])
                ranks[depth].append(rank_of(scores, tokens[part + 2][:, None])[:, 0])
    joined = {depth: torch.cat(parts) for depth, parts in ranks.items()}
    return {
        depth: {"positions": len(found), "top": {str(n): (found < n).double().mean().item() for n in RANKS}}
        for depth, found in joined.items()
    }


def draw(document: dict, pyplot: Any) -> Any:
    parts = {name: part["figures"]["top"] for name, part in document["parts"].items()}
    trained, trained_from = parts.pop("predictor"), document["parts"]["predictor"]["made_from"]["source_layer"]
    drawn, axes = pyplot.subplots(figsize=(6, 4))
    found = sorted((int(depth), top) for depth, top in parts.items())
    for i, n in enumerate(RANKS):
        line = [100 * top[str(n)] for _, top in found]
        axes.plot([depth for depth, _ in found], line, color=f"C{i}", marker="o", label=f"ridge, top-{n}")
        axes.plot([trained_from], [100 * trained[str(n)]], color=f"C{i}", marker="*", markersize=11, linestyle="")
    axes.plot([], [], color="grey", marker="*", markersize=11, linestyle="", label="the trained predictor")
    axes.set(xlabel="insertion layer t", ylabel="model's token among the first n, %")
    axes.legend()
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    from benchmarks.paper.alone import alone

    alone(NAME)
