"""Figure 5: accuracy of the first prediction step against the insertion layer.

python -m benchmarks.paper.figure_5 --data text.npz

The map of each depth is a ridge regression in closed form, solved on training text in one pass. That is enough for the
curve's shape; maps that are trained further are better everywhere. What a pass has gathered is kept beside the JSON.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from firp.decoder.passes import RealRows, RecordingAttention, pseudo_rows
from firp.decoder.view import DecoderView
from firp.tools.files import write_atomically
from firp.train.data import BatchOrder, load_dataset, make_batch
from firp.train.ridge import RidgeAccumulator
from firp.train.targets import rank_of
from torch import Tensor
from tqdm import tqdm

from benchmarks.paper.setup import Setup

NAME = "figure-5"
DEPTHS = 6
BATCH, MAX_LENGTH, SEED = 8, 512, 0
BATCHES_BETWEEN_FILES = 5
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
    found: dict[int, dict] = {}

    def of_depth(depth: int) -> dict:
        if not found:
            found.update(_shares(setup, _maps(setup, dataset, document.path.with_suffix(".partial.pt"))))
        return found[depth]

    for depth in depths(setup.view.num_layers):
        document.part(str(depth), {"depth": depth}, lambda depth=depth: of_depth(depth))
    document.path.with_suffix(".partial.pt").unlink(missing_ok=True)


@torch.no_grad()
def _maps(setup: Setup, dataset: Any, partial: Path) -> dict[int, Tensor]:
    """Ridge maps [1, d, d] by depth."""
    view, device = setup.view, setup.view.device
    found = {d: RidgeAccumulator(1, view.config.hidden_size, device) for d in depths(view.num_layers)}
    order, step = BatchOrder(dataset, torch.arange(len(dataset)).numpy(), BATCH, SEED), 0
    key = [str(setup.data), setup.ridge_tokens, setup.dtype, list(found)]
    if partial.is_file():
        step = _restore(partial, key, found)
    first = next(iter(found.values()))
    bar = tqdm(total=setup.ridge_tokens, initial=first.count, desc="ridge", unit="tok", disable=None)
    while first.count < setup.ridge_tokens:
        batch = make_batch(dataset, order.at(step), MAX_LENGTH).to(device)
        hidden, below = view.embed(batch.tokens), 0
        positions = torch.arange(batch.tokens.shape[1], device=device).expand(batch.tokens.shape)
        rotary, attention = view.rotary(hidden, positions), RecordingAttention(view.num_layers)
        for depth, accumulator in found.items():
            hidden, below = view.run_layers(hidden, rotary, attention, below, depth), depth
            accumulator.add(hidden, batch.lengths)
        bar.update(first.count - bar.n)
        step += 1
        if step % BATCHES_BETWEEN_FILES == 0:
            state = {"key": key, "step": step, "sums": {d: [a.covariance, a.cross, a.count] for d, a in found.items()}}
            write_atomically(partial, lambda staged, state=state: torch.save(state, staged))
    bar.close()
    return {depth: accumulator.solve() for depth, accumulator in found.items()}


def _restore(partial: Path, key: list, found: dict[int, RidgeAccumulator]) -> int:
    """Go on with the sums of a pass that was cut off; returns its step, 0 where it had other settings."""
    try:
        with zipfile.ZipFile(partial) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum differs")
        state = torch.load(partial, map_location=next(iter(found.values())).covariance.device, weights_only=True)
        if state["key"] != key:
            return 0
        for depth, accumulator in found.items():
            accumulator.covariance, accumulator.cross, accumulator.count = state["sums"][depth]
        return state["step"]
    except Exception as error:
        raise ValueError(f"{partial}: cannot be read: {error}; remove it to begin again") from error


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
        for depth, real in _real_rows(view, tokens[None], sorted(maps)):
            weight = maps[depth][:1].to(device, view.dtype)
            for part in anchors.split(POSITIONS_AT_ONCE):
                scores = view.logits(pseudo_rows(view, weight, real, part[None], depth)[0])
                ranks[depth].append(rank_of(scores, tokens[part + 2][:, None])[:, 0])
    joined = {depth: torch.cat(parts) for depth, parts in ranks.items()}
    return {
        depth: {"positions": len(found), "top": {str(n): (found < n).double().mean().item() for n in RANKS}}
        for depth, found in joined.items()
    }


def _real_rows(view: DecoderView, tokens: Tensor, depths: list[int]) -> Iterator[tuple[int, RealRows]]:
    """`real_rows` [1, T] for each insertion layer, in one pass."""
    attention, hidden, below = RecordingAttention(depths[0]), view.embed(tokens), 0
    rotary = view.rotary(hidden, torch.arange(tokens.shape[1], device=tokens.device)[None])
    inserted = {}
    for depth in (*depths, view.num_layers):
        hidden, below = view.run_layers(hidden, rotary, attention, below, depth), depth
        inserted[depth] = hidden
    for depth in depths:
        yield depth, RealRows(inserted[depth], hidden, attention.recorded)


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
