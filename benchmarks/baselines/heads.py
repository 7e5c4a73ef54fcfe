"""Draft heads that add no rows to a forward: Medusa-1's, and the early exit that the FIRP paper compares with.

Both give the distribution of token i + j + 1 from a hidden state of position i, as pseudo[i, j] does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from firp.decoder.view import DecoderView
from firp.tools.files import explained, read_object, staging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("medusa", "early-exit")
CONFIG, WEIGHTS = "heads.json", "heads.safetensors"
CURVES = "curves.json"  # of `benchmarks.baselines.train`, beside the folders of heads
FIELDS = ("kind", "num_offsets", "hidden_size", "source_layer", "base_model")


class Heads(nn.Module):
    """k heads over the base model's own head.

    "medusa" (arXiv 2401.10774, section 3.1.1, first stage): x is the final hidden state after the final norm, and
    scores[j] = head(x + silu(weight[j] @ x + bias[j])). Zeros in the beginning: the model's own scores.

    "early-exit" (FIRP, arXiv 2410.20488, the comparison of its Figure 3): h is the hidden state after `source_layer`,
    and scores[j] = head(norm(weight[j] @ h)).

    Args:
        kind: of `KINDS`.
        num_offsets: k.
        hidden_size: d of the base model.
        source_layer: decoder layers below the state that the heads read; all of them for "medusa".
        base_model: its name, for people.

    Attributes:
        weight: [k, d, d].
        bias: [k, d]; None for "early-exit".

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, kind: str, num_offsets: int, hidden_size: int, source_layer: int, base_model: str = "") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
        sizes = {"num_offsets": num_offsets, "hidden_size": hidden_size, "source_layer": source_layer}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer of at least 1")
        self.kind, self.num_offsets, self.hidden_size = kind, num_offsets, hidden_size
        self.source_layer, self.base_model = source_layer, base_model
        if kind == "medusa":
            self.weight = nn.Parameter(torch.zeros(num_offsets, hidden_size, hidden_size))
            self.bias = nn.Parameter(torch.zeros(num_offsets, hidden_size))
        else:
            self.weight = nn.Parameter(torch.eye(hidden_size).repeat(num_offsets, 1, 1))
            self.bias = None

    def scores(self, view: DecoderView, source: Tensor) -> Tensor:
        """Scores [..., k, V] of states [..., d] after `source_layer`, in their dtype."""
        weight = self.weight.to(source.dtype)
        if self.bias is None:
            return view.logits(torch.einsum("koi,...i->...ko", weight, source))
        normed = view.norm(source)
        inner = torch.einsum("koi,...i->...ko", weight, normed) + self.bias.to(source.dtype)
        scores = view.head(normed[..., None, :] + functional.silu(inner))
        if view.score_factor == view.score_divisor == 1:
            return scores
        return scores * view.score_factor / view.score_divisor

    def check_view(self, view: DecoderView) -> None:
        """Raise ValueError, naming the field, unless these heads fit the model of `view`."""
        if self.hidden_size != view.config.hidden_size:
            raise ValueError(
                f"heads: hidden_size differs: they were made for {self.hidden_size} ({self.base_model or 'unnamed'}), "
                f"the model has {view.config.hidden_size}"
            )
        last = view.num_layers
        if self.source_layer > last or (self.kind == "medusa" and self.source_layer != last):
            expected = f"{last} (the last)" if self.kind == "medusa" else f"1..{last}"
            raise ValueError(f"heads: source_layer: got {self.source_layer}, expected {expected}")

    def save(self, folder: Path) -> None:
        """Write `heads.safetensors`, then `heads.json`, each whole.

        Raises:
            OSError: what the disk refuses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with explained(folder), staging(folder / CONFIG) as staged:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_parameters()}
            save_file(tensors, staged / WEIGHTS)
            (staged / CONFIG).write_text(json.dumps({name: getattr(self, name) for name in FIELDS}, indent=1) + "\n")
            for name in (WEIGHTS, CONFIG):
                os.replace(staged / name, folder / name)


def load_heads(folder: str | Path) -> Heads:
    """Heads that `Heads.save` wrote, in float32.

    Raises:
        FileNotFoundError: a folder without one of the files.
        ValueError: files that do not hold exactly these heads; the file, and the field or tensor, are named.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"heads: {folder} has no {name}, expected a folder that benchmarks.baselines trained"
            )
    try:
        fields = read_object(folder / CONFIG)
        if fields.keys() != set(FIELDS):
            raise ValueError(f"got the fields {sorted(fields)}, expected {sorted(FIELDS)}")
        heads = Heads(**fields)
    except ValueError as error:
        raise ValueError(f"heads: {folder / CONFIG}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in heads.named_parameters()}
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise ValueError(f"heads: cannot read {folder / WEIGHTS}: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"heads: {folder / WEIGHTS}: got {found}, expected {expected}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"heads: {folder / WEIGHTS}: {name} holds {tensor.dtype} or infinite values, expected floats"
            )
    heads.load_state_dict(tensors)
    return heads.eval()
