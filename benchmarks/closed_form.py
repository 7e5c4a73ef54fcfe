"""Linear maps from hidden states to later ones, solved on training text in one pass that may be cut off."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from firp.decoder.passes import RecordingAttention
from firp.decoder.view import DecoderView
from firp.tools.files import write_atomically
from firp.train.data import BatchOrder, TextDataset, make_batch
from firp.train.ridge import RidgeAccumulator
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.document import digest

BATCH, MAX_LENGTH, SEED = 8, 512, 0
BATCHES_BETWEEN_FILES = 5


def unit(rows: Tensor) -> Tensor:
    """Rows [..., d] scaled to a mean square of 1."""
    return functional.rms_norm(rows, rows.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class Source:
    """What the maps read at a position: its hidden states after some layers, side by side.

    Attributes:
        layers: the first is the insertion layer, whose states at later positions are predicted; 0 is the embedding.
            Each further state is scaled to the norm of the first.
        units: [m, d] of a layer of SiLU units over the first state, which are read too; None: there is none.
    """

    layers: tuple[int, ...]
    units: Tensor | None = None

    def of(self, states: dict[int, Tensor]) -> Tensor:
        """float32 [..., s] from the hidden states [..., d] by layer."""
        first, *others = (states[layer].float() for layer in self.layers)
        norm = first.norm(dim=-1, keepdim=True)
        # An embedding may be zero, such as that of padding.
        parts = [first] + [other * (norm / other.norm(dim=-1, keepdim=True).clamp(min=1e-6)) for other in others]
        if self.units is not None:
            parts.append(functional.silu(unit(first) @ self.units.T))
        return torch.cat(parts, -1)

    def width(self, hidden_size: int) -> int:
        """s."""
        return len(self.layers) * hidden_size + (0 if self.units is None else len(self.units))


def states_after(view: DecoderView, tokens: Tensor, layers: Sequence[int], attention: RecordingAttention) -> dict:
    """Hidden states [B, T, d] of whole sequences, tokens [B, T], after each of `layers` layers, in one pass."""
    hidden, below, found = view.embed(tokens), 0, {}
    rotary = view.rotary(hidden, torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape))
    for layer in sorted(set(layers)):
        hidden, below = view.run_layers(hidden, rotary, attention, below, layer), layer
        found[layer] = hidden
    return found


@torch.no_grad()
def solve(
    view: DecoderView,
    dataset: TextDataset,
    order: BatchOrder,
    sources: dict[str, Source],
    num_offsets: int,
    tokens: int,
    partial: Path,
    made_from: list,
) -> dict[str, Tensor]:
    """Ridge maps [k, d, s] of each source from at least `tokens` positions; one pass for all.

    Args:
        partial: where the sums so far are kept; the caller removes it.
        made_from: what they depend on beside the model, the text, its order and the sources.
    """
    size, device = view.config.hidden_size, view.device
    found = {name: RidgeAccumulator(num_offsets, size, device, source.width(size)) for name, source in sources.items()}
    layers = [layer for source in sources.values() for layer in source.layers]
    model = [float(parameter.double().sum()) for parameter in view.model.parameters()]
    text = [digest(array.tobytes()) for array in (dataset.tokens, dataset.offsets, order.arguments[1])]
    key = [
        *made_from,
        model,
        text,
        order.arguments[3],
        tokens,
        num_offsets,
        [[name, *source.layers] for name, source in sources.items()],
    ]
    step = _restore(partial, key, found) if partial.is_file() else 0
    first = next(iter(found.values()))
    bar = tqdm(total=tokens, initial=first.count, desc="ridge", unit="tok", disable=None)
    while first.count < tokens:
        batch = make_batch(dataset, order.at(step), MAX_LENGTH).to(device)
        states = states_after(view, batch.tokens, layers, RecordingAttention(view.num_layers))
        for name, accumulator in found.items():
            accumulator.add(sources[name].of(states), batch.lengths, states[sources[name].layers[0]])
        bar.update(first.count - bar.n)
        step += 1
        if step % BATCHES_BETWEEN_FILES == 0:
            sums = {name: [sums.covariance, sums.cross, sums.count] for name, sums in found.items()}
            state = {"key": key, "step": step, "sums": sums}
            write_atomically(partial, lambda staged, state=state: torch.save(state, staged))
    bar.close()
    return {name: accumulator.solve() for name, accumulator in found.items()}


def _restore(partial: Path, key: list, found: dict[str, RidgeAccumulator]) -> int:
    """Go on with the sums of a pass that was cut off; returns its step, 0 where it had other settings."""
    try:
        with zipfile.ZipFile(partial) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum differs")
        state = torch.load(partial, map_location=next(iter(found.values())).covariance.device, weights_only=True)
        if state["key"] != key:
            return 0
        for name, accumulator in found.items():
            accumulator.covariance, accumulator.cross, accumulator.count = state["sums"][name]
        return state["step"]
    except Exception as error:
        raise ValueError(f"{partial}: cannot be read: {error}; remove it to begin again") from error
