"""Figure 4: cosine similarity of pseudo and real hidden states, from the insertion layer to the last.

python -m benchmarks.paper.figure_4

Hidden states of a model all point in similar directions. "centred" therefore takes the layer's mean state from both
first, and "anchor" compares the anchor's own real state instead of the pseudo state: what copying it would give.
"""

from __future__ import annotations

from typing import Any

import torch
from firp.decoder.passes import PseudoAttention, RecordingAttention
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.paper.setup import Answer, Setup

NAME = "figure-4"
SERIES = ("pseudo", "anchor", "pseudo, centred", "anchor, centred")


def measure(setup: Setup) -> None:
    """One part: for each series the mean cosine [k, layers]."""
    document = setup.document(NAME, series=SERIES)
    document.part("firp", setup.made_from("firp"), lambda: _similarities(setup))


@torch.no_grad()
def states(setup: Setup, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
    """Real states after each layer from t to L at the k positions after each anchor, [layers, n, k, d], pseudo states
    there, and the anchors' own real states [layers, n, 1, d]."""
    view, predictor = setup.view, setup.predictor
    layer, k, device = predictor.insertion_layer, predictor.num_offsets, view.device
    tokens = torch.cat([answer.prompt, torch.tensor(answer.tokens)])[None].to(device)
    attention = RecordingAttention(record_from=layer)
    positions = torch.arange(tokens.shape[1], device=device)[None]
    hidden = view.embed(tokens)
    rotary = view.rotary(hidden, positions)
    hidden = view.run_layers(hidden, rotary, attention, 0, layer)
    real = [hidden]
    for below in range(layer, view.num_layers):
        real.append(view.run_layers(real[-1], rotary, attention, below, below + 1))
    anchors = torch.arange(len(answer.prompt) - 1, tokens.shape[1] - k, device=device)[None]
    later = anchors[0, :, None] + torch.arange(1, k + 1, device=device)
    rows = torch.einsum("kod,bad->bako", predictor.weight.to(device, view.dtype), hidden[:, anchors[0]]).flatten(1, 2)
    pseudo, chain = [rows], PseudoAttention(attention.recorded, anchors, k)
    rotary = view.rotary(rows, later.flatten()[None])
    for below in range(layer, view.num_layers):
        pseudo.append(view.run_layers(pseudo[-1], rotary, chain, below, below + 1))
    reals = torch.cat(real)
    return reals[:, later], torch.cat(pseudo).unflatten(1, later.shape), reals[:, anchors[0], None]


def _similarities(setup: Setup) -> dict:
    long_enough = [answer for answer in setup.answers if len(answer.tokens) > setup.num_offsets]
    if not long_enough:
        raise ValueError(f"prompts: got no answer of more than {setup.num_offsets} tokens, expected at least one")
    found = [[part.float().cpu() for part in states(setup, answer)] for answer in long_enough]
    real, pseudo, anchor = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    mean = real.mean((1, 2), keepdim=True)
    pairs = ((pseudo, real), (anchor, real), (pseudo - mean, real - mean), (anchor - mean, real - mean))
    means = [cosine_similarity(a, b, dim=-1).mean(1).T.tolist() for a, b in pairs]
    first = setup.predictor.insertion_layer
    return {
        "positions": real.shape[1], "layers": list(range(first, first + len(real))),
        "cosine": dict(zip(SERIES, means, strict=True)),
    }  # fmt: skip


def draw(document: dict, pyplot: Any) -> Any:
    figures = document["parts"]["firp"]["figures"]
    drawn, every = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, centred in zip(every, ("", ", centred"), strict=True):
        for kind, style in (("pseudo", "-"), ("anchor", ":")):
            for offset, line in enumerate(figures["cosine"][kind + centred], start=1):
                label = f"{kind}, step {offset}"
                axes.plot(figures["layers"], line, style, color=f"C{offset - 1}", marker=".", label=label)
        axes.set(title=f"real states{centred}", xlabel="decoder layers passed")
    every[0].set_ylabel("mean cosine with the real state")
    every[1].legend()
    drawn.tight_layout()
    return drawn


if __name__ == "__main__":
    from benchmarks.paper.alone import alone

    alone(NAME)
