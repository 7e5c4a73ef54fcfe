"""Maps of other shapes and from other text, each solved in closed form at equal tokens.

python -m benchmarks.ablations --data text.npz

Run the same command again to go on with the parts that are missing. The maps have no token transition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import firp
import numpy as np
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.cli.options import choose_device
from firp.decoder.view import DecoderView
from firp.tools.environment import environment
from firp.tools.files import locked
from firp.train.data import BatchOrder, load_dataset, split_held_out
from torch import Tensor

from benchmarks.ablations.held_out import HeldOut
from benchmarks.ablations.units import gather, train_units
from benchmarks.closed_form import BATCH, SEED, Source, solve
from benchmarks.commands import run
from benchmarks.document import Document, digest, make_folder

OUT = Path(__file__).parents[1] / "results/ablations.json"
OFFSETS, MOST_OFFSETS, UNITS = 3, 6, 1024
SHARES = (30, 10, 3)


class Ablations:
    """Parts of the document, each computed where it is not there."""

    def __init__(self, data: Path, model: str, layer: int, tokens: int, held_out: int, device: str, out: Path) -> None:
        self.data, self.layer, self.tokens = data, layer, tokens
        self.dataset = load_dataset(data)
        self.train, indices = split_held_out(self.dataset, held_out)
        base, _ = firp.load_model(model, "float32", device)
        base.requires_grad_(False)
        self.dataset.check_vocabulary(base.config.vocab_size)
        self.view = DecoderView(base)
        if not 1 <= layer < self.view.num_layers:
            raise ValueError(f"insertion_layer: got {layer}, expected 1..{self.view.num_layers - 1}")
        self.held_out = HeldOut(self.view, self.dataset, indices.tolist(), layer)
        settings = {
            "model": model, "dtype": "float32", "insertion_layer": layer, "tokens": tokens, "held_out": held_out,
            "seed": SEED, "batch_size": BATCH, "tau": TAU_FORMULA, "trees": "dynamic: nodes, lookahead nodes",
            "text": digest(self.dataset.tokens.tobytes()),
        }  # fmt: skip
        self.document = Document(out, settings, environment(base))
        self.partial = out.with_suffix(".partial.pt")

    def maps(
        self, name: str, sources: dict[str, Source], num_offsets: int, tokens: int, indices: np.ndarray | None = None
    ) -> dict[str, tuple[Source, Tensor]]:
        """Ridge maps of each source, from training text or some sequences of it."""
        order = BatchOrder(self.dataset, self.train if indices is None else indices, BATCH, SEED)
        found = solve(self.view, self.dataset, order, sources, num_offsets, tokens, self.partial, [name])
        self.partial.unlink(missing_ok=True)
        return {name: (source, found[name]) for name, source in sources.items()}

    def sources(self) -> dict:
        """Further states beside that of the insertion layer, and how many offsets a map per offset can reach."""
        layer, half = self.layer, self.layer // 2
        generator = torch.Generator().manual_seed(SEED)
        size = self.view.config.hidden_size
        units = torch.randn(UNITS, size, generator=generator) * size**-0.5
        shapes = {
            "t": Source((layer,)), "t, t/2": Source((layer, half)), "t, embedding": Source((layer, 0)),
            "t, t/2, embedding": Source((layer, half, 0)),
            f"t, {UNITS} random units": Source((layer,), units.to(self.view.device)),
        }  # fmt: skip
        maps = self.maps("sources", shapes, MOST_OFFSETS, self.tokens)
        found = self.held_out.accuracy(maps)
        found["t"]["tau"] = self.held_out.tau(maps["t"][1], list(range(1, MOST_OFFSETS + 1)))
        return found

    def alone(self, name: str, tokens: int, indices: np.ndarray | None = None) -> dict:
        """The ordinary maps from so many tokens."""
        source, weight = self.maps(name, {"t": Source((self.layer,))}, OFFSETS, tokens, indices)["t"]
        found = self.held_out.accuracy({"t": (source, weight)})["t"]
        return found | {"tau": self.held_out.tau(weight, [2, OFFSETS])}

    def units(self) -> dict:
        """Trained units beside the maps, and the maps alone from the same tokens."""
        tokens = self.tokens // SHARES[-1]
        order = BatchOrder(self.dataset, self.train, BATCH, SEED)
        linear = self.maps("units", {"t": Source((self.layer,))}, OFFSETS, tokens)
        states, usable = gather(self.view, self.dataset, order, self.layer, OFFSETS, tokens)
        trained = train_units(states, usable, linear["t"][1], UNITS, self.layer)
        return self.held_out.accuracy(linear | {f"t, {UNITS} trained units": trained})

    def run(self) -> None:
        part = self.document.part
        part("sources", {"offsets": MOST_OFFSETS}, self.sources)
        for share in SHARES:
            tokens = self.tokens // share
            part(f"tokens / {share}", {"tokens": tokens}, lambda tokens=tokens: self.alone("tokens", tokens))
        part("units", {"units": UNITS}, self.units)
        greedy = self.greedy()
        if greedy is None:
            return
        for name, chosen in (("greedy", greedy), ("sampled", ~greedy)):
            indices, tokens = self.train[chosen[self.train]], self.tokens // SHARES[-1]
            part(
                f"{name} answers", {"tokens": tokens},
                lambda name=name, indices=indices, tokens=tokens: self.alone(name, tokens, indices),
            )  # fmt: skip

    def greedy(self) -> np.ndarray | None:
        """Which sequences are greedy answers, [n]; None where the file does not tell."""
        with np.load(self.data, allow_pickle=False) as arrays:
            found = arrays["greedy"] if "greedy" in arrays.files else None
        mixed = found is not None and found.shape == (len(self.dataset),) and 0 < found.sum() < len(found)
        return found if mixed else None


def main(
    data: Annotated[Path, typer.Option(help="Training text: a file written by `firp distill`.")],
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    insertion_layer: Annotated[int, typer.Option(help="t.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens that maps are solved from.")] = 90_000,
    held_out: Annotated[int, typer.Option(help="Sequences kept for accuracy.")] = 48,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Solve and measure every variant."""
    if tokens < SHARES[0]:
        raise ValueError(f"tokens: got {tokens}, expected at least {SHARES[0]}")
    make_folder("json", json_path.parent)
    with locked(json_path.parent):
        Ablations(data, model, insertion_layer, tokens, held_out, choose_device(device), json_path).run()
    print(f"wrote {json_path}")


if __name__ == "__main__":
    run(main)
