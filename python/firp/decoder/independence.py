"""Whether a module that is not known gives a row the result that it would have in Hugging Face's forward.

Draft rows pass the model together with real ones. Where a linear scales activations over a whole tensor, or looks for
outliers over all rows, drafts would change the output. A linear that rounds its input to few levels turns the last bit
of an attention score into another token. Classes of transformers and torch are known; any other module is tried: the
same rows beside others and alone, and with changes too small for a coarse grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from firp.decoder.attention import AttentionStep

# Largest difference, relative to the largest value, that is rounding where another number of rows takes another kernel.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
OUTLIER = 100.0
# Of the largest value: less than half a level of 8 bits; and less than half a level of any coarse grid for most values.
SMALL, TINY = 3e-3, 1e-5


class OwnRowOnly:
    """An `AttentionStep` in which every row attends to itself: queries, keys and values all count."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        group = query.shape[2] // key.shape[2]
        key, value = (rows.repeat_interleave(group, 2) for rows in (key, value))
        return value * (query * key * scale).sum(-1, keepdim=True).sigmoid()


class View(Protocol):
    """What is tried of a model: `firp.decoder.view.DecoderView`."""

    model: PreTrainedModel
    config: PretrainedConfig
    layers: list[nn.Module]

    @property
    def num_layers(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def embed(self, tokens: Tensor) -> Tensor: ...

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@torch.no_grad()
def check_rows(view: View, names: list[str]) -> None:
    """Try the modules `names` of the view's model.

    Raises:
        ValueError: a row's result depends on other rows; names the module and its class.
    """
    model, dtype = view.model, view.dtype
    step: AttentionStep = OwnRowOnly()
    layers: dict[int, tuple[str, nn.Module]] = {}
    for name in names:
        module = model.get_submodule(name)
        width = getattr(module, "in_features", None)
        if isinstance(width, int) and not name.endswith("embed_tokens"):
            _try(module, _rows(width, dtype, view.device), name, module)
            _try_levels(module, width, dtype, view.device, name)
        elif name.startswith("model.layers."):
            layers.setdefault(int(name.split(".")[2]), (name, module))
        elif name == "model.norm":
            _try(module, _rows(view.config.hidden_size, dtype, view.device), name, module)
        elif name == "model.embed_tokens":
            _try(view.embed, _tokens(module, view.device), name, module)
        elif name == "lm_head":
            _try(view.logits, _rows(view.config.hidden_size, dtype, view.device), name, module)
    for place, (name, module) in layers.items():
        if place < view.num_layers:
            layer = view.layers[place]

            def run(rows: Tensor, layer: nn.Module = layer) -> Tensor:
                positions = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
                return layer(
                    rows, attention_mask=None, position_embeddings=view.rotary(rows, positions), firp_step=step
                )

            _try(run, _rows(view.config.hidden_size, dtype, view.device), name, module)


Trial = tuple[Tensor, list[tuple[int, Tensor]]]


def _rows(width: int, dtype: torch.dtype, device: torch.device) -> Trial:
    """Rows [2, 4, width]; and for the first and the last row of each sequence, the same with all others replaced: by
    large ones, by spikes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, width, generator=generator)
    large = torch.randn(2, 4, width, generator=generator) * OUTLIER
    spikes = torch.zeros(2, 4, width)
    spikes[..., width // 2] = OUTLIER
    return rows.to(device, dtype), [
        (kept, _beside(rows, others, kept).to(device, dtype)) for others in (large, spikes) for kept in (0, 3)
    ]


def _tokens(embedding: nn.Module, device: torch.device) -> Trial:
    count = embedding.weight.shape[0]
    tokens = torch.arange(8).view(2, 4) % count
    others = (tokens + count // 2) % count
    return tokens.to(device), [(kept, _beside(tokens, others, kept).to(device)) for kept in (0, 3)]


def _beside(rows: Tensor, others: Tensor, kept: int) -> Tensor:
    changed = others.clone()
    changed[:, kept] = rows[:, kept]
    return changed


def _try(run: Callable[[Tensor], Tensor], trial: Trial, name: str, module: nn.Module) -> None:
    rows, changes = trial
    first, again = run(rows), run(rows)
    exact = torch.equal(first, again) and not any(
        tensor.dim() > 2 for tensor in module.parameters()
    )  # Experts group rows.
    rounding = ROUNDING.get(first.dtype, ROUNDING[torch.bfloat16])
    for kept, changed in changes:
        own = first[:, kept]
        limit = rounding * own.abs().max()
        beside = run(changed)[:, kept]
        if not (torch.equal(beside, own) if exact else bool(((beside - own).abs() <= limit).all())):
            _refuse(name, module, "depends on the rows beside it")
        alone = run(rows[:1, kept : kept + 1])[:, 0]
        if not bool(((alone - own[:1]).abs() <= limit).all()):
            _refuse(name, module, "differs where it stands alone")


def _try_levels(linear: nn.Module, width: int, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Small inputs beside a large one vanish on a grid of 8 bits; in full precision a millionth does on any grid."""
    if type(linear).__module__.startswith("bitsandbytes."):
        return  # Documented, and tested against its own plain decoding.
    rows = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(1))
    spike = torch.zeros(1, 1, width)
    spike[..., 0] = 1.0
    pairs = [(spike, spike + rows.sign() * SMALL * (1 - spike))]
    if dtype in (torch.float32, torch.float64):
        pairs.append((rows, rows * (1 + TINY * (rows.abs() < rows.abs().max()))))
    for before, after in pairs:
        outputs = [linear(part.to(device, dtype)) for part in (before, after)]
        if float((outputs[0] == outputs[1]).float().mean()) > 0.9:
            raise ValueError(
                f"model: {name!r} ({type(linear).__name__}) rounds its input to few levels (quantised activations), "
                f"expected "
                "input as it is: rounding of the last bit elsewhere would give other tokens than Hugging Face's forward"
            )


def _refuse(name: str, module: nn.Module, reason: str) -> None:
    raise ValueError(
        f"model: {name!r} ({type(module).__name__}) gives a row a result that {reason}, expected rows that do not "
        f"depend on "
        "each other: drafts would change the output"
    )
