"""What an engine allocates once and lends to one run after another: the cache, and tensors that keep their
addresses."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from firp.drafting.trees import DraftTree

SMALLEST_BUCKET = 256
STOP_TOKENS_STEP = 8


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def allocated_slots(slots: int) -> int:
    """Cache slots to allocate for `slots`: a quarter of a power of two at a time, so that requests which grow step by
    step allocate again only now and then."""
    step = max(SMALLEST_BUCKET, next_power_of_two(slots) // 8)
    return -(-slots // step) * step


@dataclass
class Buffers:
    """Tensors of one run, for up to B sequences. A run of fewer takes the first of each.

    Attributes:
        cache: [L, 2, B, C, Hkv, D].
        context_lens, sequence, finished, remaining, seed: [B], as in `DecodeState`.
        stop_tokens: by width, the ids that end a sequence.
        trees: (B, N, P) of the run -> its draft tree, where steps are captured.
        graphs: captured steps over these tensors, by `firp.engine.graphs`.
        prefills: captured prompts, by their number and padded length; by the same.
        addresses: of the weights that the graphs read; empty where steps are not captured.
    """

    cache: Tensor
    context_lens: Tensor
    sequence: Tensor
    finished: Tensor
    remaining: Tensor
    seed: Tensor
    stop_tokens: dict[int, Tensor] = field(default_factory=dict)
    trees: dict[tuple[int, int, int], DraftTree] = field(default_factory=dict)
    graphs: dict = field(default_factory=dict)
    prefills: dict = field(default_factory=dict)
    addresses: tuple[int, ...] = ()

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        batch_size: int,
        capacity: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Buffers:
        def per_sequence(dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, dtype=dtype, device=device)

        return cls(
            cache=torch.empty(num_layers, 2, batch_size, capacity, heads, width, dtype=dtype, device=device),
            context_lens=per_sequence(torch.int32),
            sequence=per_sequence(torch.int64),
            finished=per_sequence(torch.bool),
            remaining=per_sequence(torch.int64),
            seed=per_sequence(torch.int64),
        )

    # A pool ends with the last graph in it, and cuBLAS keeps a workspace per stream: both live and die with the graphs.
    @functools.cached_property
    def pool(self) -> tuple[int, int]:
        """Handle of the memory that the graphs share."""
        return torch.cuda.graph_pool_handle()

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream that everything is warmed up and captured on."""
        return torch.cuda.Stream(self.cache.device)

    @functools.cached_property
    def history(self) -> Tensor:
        """[B, C], as in `DecodeState`; made where branches are looked up."""
        return torch.zeros(self.batch_size, self.capacity, dtype=torch.int64, device=self.cache.device)

    @property
    def batch_size(self) -> int:
        return self.cache.shape[2]

    def holds(self, batch_size: int, slots: int) -> bool:
        """Whether a run of B sequences of `slots` slots finds room here."""
        return self.batch_size >= batch_size and self.capacity >= slots

    @property
    def capacity(self) -> int:
        return self.cache.shape[3]

    def bucket(self, slots: int) -> int:
        """The smallest power of two, from `SMALLEST_BUCKET`, that holds `slots`; at most the capacity."""
        return min(max(SMALLEST_BUCKET, next_power_of_two(slots)), self.capacity)

    def set_stop_tokens(self, ids: list[int]) -> Tensor:
        """The ids, padded with -1 to a width that many runs share, in a tensor that later runs reuse."""
        width = max(1, -(-len(ids) // STOP_TOKENS_STEP)) * STOP_TOKENS_STEP
        padded = torch.tensor(ids + [-1] * (width - len(ids)), dtype=torch.int64)
        if width not in self.stop_tokens:
            self.stop_tokens[width] = torch.empty(width, dtype=torch.int64, device=self.cache.device)
        return self.stop_tokens[width].copy_(padded)
