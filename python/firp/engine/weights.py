"""The weights of a model that is not loaded: what a rank holds of each, and what ranks exchange after its product."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from firp.decoder.model_rules import windows

LAYERS, EMBEDDING, HEAD = "model.layers.", "model.embed_tokens.", "lm_head."
# Which dimension a style of transformers' plans cuts; a bias after cut rows is whole on every rank.
FIRST_CUT = ("colwise", "colwise_gather_output", "packed_colwise")
LAST_CUT = ("rowwise", "rowwise_split_input")
# What follows the product: the sum of all ranks' outputs, or the outputs side by side.
SUMMED, GATHERED = (*LAST_CUT, "embedding_rowwise"), ("colwise_gather_output",)


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: in the model.
        shape: of the whole parameter: [out, in] of a linear, [experts, out, in] of experts, [n] of a norm or bias.
        style: of transformers' tensor parallel plan; empty where every rank holds all.
        ranks: that share it.
    """

    name: str
    shape: tuple[int, ...]
    style: str
    ranks: int

    @property
    def held(self) -> int:
        """Numbers on the rank that holds most."""
        shape, cut = list(self.shape), None
        if self.style in FIRST_CUT:
            cut = max(len(shape) - 2, 0)
        elif self.style in LAST_CUT and len(shape) > 1:
            cut = len(shape) - 1
        elif self.style == "embedding_rowwise":
            cut = 0
        if cut is not None:
            shape[cut] = -(-shape[cut] // self.ranks)
        return math.prod(shape)

    @property
    def multiplies(self) -> bool:
        """Whether it is the matrix of a product, or those of several experts."""
        return len(self.shape) > 1

    @property
    def experts(self) -> int:
        """Experts that it holds the matrices of; 1 for what every row passes."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Weights:
    """All weights of a model, by what reads them.

    Attributes:
        layers: of each layer.
        embedding, norm: of tokens; after the last layer.
        head: with its bias; the embedding's own matrix where they are tied.
        tied: whether the head's matrix is the embedding's.
        itemsize: bytes of a number.
        active_experts: experts that a row passes; 1 where there are none.
        windows: sliding window of each layer, or None.
        architecture: the model's class.
    """

    layers: tuple[tuple[Weight, ...], ...]
    embedding: tuple[Weight, ...]
    norm: tuple[Weight, ...]
    head: tuple[Weight, ...]
    tied: bool
    itemsize: int
    active_experts: int
    windows: tuple[int | None, ...]
    architecture: str

    @property
    def bytes(self) -> int:
        """On the rank that holds most; tied ones count once."""
        head = [weight for weight in self.head if not (self.tied and weight.multiplies)]
        held = [*self.embedding, *self.norm, *head, *(weight for layer in self.layers for weight in layer)]
        return self.itemsize * sum(weight.held for weight in held)


def weights_of(config: PreTrainedConfig, dtype: torch.dtype, tp_size: int = 1) -> Weights:
    """The weights of the model that `config` describes, from shapes alone.

    Args:
        dtype: of all weights.
        tp_size: tensor parallel ranks, each of which holds its share of what the model's plan names, and all of the
            rest.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plan = dict(model.tp_plan or {}) if tp_size > 1 else {}
    every = [
        Weight(name, tuple(parameter.shape), _style(name, plan), tp_size)
        for name, parameter in model.named_parameters()
    ]

    def named(prefix: str) -> tuple[Weight, ...]:
        return tuple(weight for weight in every if weight.name.startswith(prefix))

    embedding, head = named(EMBEDDING), named(HEAD)
    tied = not any(weight.multiplies for weight in head)
    if tied:
        matrix = Weight(f"{HEAD}weight", embedding[0].shape, _style(f"{HEAD}weight", plan), tp_size)
        head = (matrix, *head)
    return Weights(
        layers=tuple(named(f"{LAYERS}{layer}.") for layer in range(config.num_hidden_layers)),
        embedding=embedding,
        norm=tuple(weight for weight in every if not weight.name.startswith((LAYERS, EMBEDDING, HEAD))),
        head=head,
        tied=tied,
        itemsize=dtype.itemsize,
        active_experts=getattr(config, "num_experts_per_tok", None) or 1,
        windows=tuple(windows(model)),
        architecture=type(model).__name__,
    )


def _style(name: str, plan: Mapping[str, str]) -> str:
    wildcard = re.sub(r"\.\d+\.", ".*.", name)
    return plan.get(wildcard) or plan.get(wildcard.rpartition(".")[0]) or ""
