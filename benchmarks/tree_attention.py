"""`tree_attention`: context and tree, against SDPA with a dense mask, FlexAttention and FlashInfer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.case import BOUNDS, Alternative, Case, drafted, integers, normal, num_bytes
from benchmarks.shapes import Grid, Tree
from firp_kernels.ops.tree_attention import tree_mask

SDPA_BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
}
# Queries this wide make softmax pick few slots, so that a wrong mask shows in the outcome.
QUERY_SCALE = 3


def cases(grid: Grid) -> Iterator[Case]:
    for tree in grid.trees:
        for context in grid.contexts:
            yield _case(grid, tree, context)


def _case(grid: Grid, tree: Tree, context: int) -> Case:
    shape, rows = grid.shape, tree.rows

    def make(seed: int) -> tuple:
        random = normal(grid.device, grid.dtype, seed)
        query = random(1, shape.heads, rows, shape.head_dim).mul_(QUERY_SCALE).transpose(1, 2)
        caches = (random(1, context + rows, shape.kv_heads, shape.head_dim) for _ in range(2))
        _, _, depths, ancestors, lookahead = drafted(tree, shape.vocabulary, grid.device, seed)
        scale = shape.head_dim**-0.5
        nodes = depths, ancestors, lookahead, tree.num_offsets
        return query, *caches, integers(grid.device, context), *nodes, scale, None

    sample = make(0)
    visible = int(visible_slots(sample).sum())
    return Case(
        "tree_attention", "", shape.name, tree, context, grid.dtype, make,
        num_bytes=num_bytes(sample[0], *sample[:7]),
        operations=4 * visible * shape.heads * shape.head_dim,
        bound=BOUNDS[grid.dtype],
        alternatives=_alternatives(grid, tree, context),
    )  # fmt: skip


def visible_slots(args: tuple) -> Tensor:
    """Bool [B, R, S]: which slots of the cache each row sees."""
    query, _, _, *tree, _, window = args
    return tree_mask(*tree, query.shape[1], window)


def dense_mask(
    context_lens: Tensor, depths: Tensor, ancestors: Tensor, lookahead: Tensor, num_offsets: int, rows: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What SDPA adds to the scores: [B, 1, R, S], 0 or -inf. Rows of it start at multiples of 16 entries, as the fused
    kernels want them."""
    hidden = ~tree_mask(context_lens, depths, ancestors, lookahead, num_offsets, rows)[:, None]
    length = hidden.shape[-1]
    mask = pad(torch.zeros_like(hidden, dtype=dtype), (0, -length % 16))[..., :length]
    return mask.masked_fill_(hidden, float("-inf"))


def _alternatives(grid: Grid, tree: Tree, context: int) -> dict[str, Alternative]:
    made = {
        f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}": Alternative(
            _sdpa, _rows_first, scope=functools.partial(sdpa_kernel, backend)
        )
        for backend in SDPA_BACKENDS[grid.device]
    }
    if grid.shape.heads > grid.shape.kv_heads:
        made["SDPA grouped"] = Alternative(functools.partial(_sdpa, expand=False), _rows_first)
    if grid.device == "cuda":
        missing = None if importlib.util.find_spec("flashinfer") else "flashinfer is not installed"
        # Every shape of it is compiled for ten seconds: at the longest context, and where there is a tree to mask.
        if context == grid.contexts[-1] and tree.num_nodes > 1:
            made["FlexAttention"] = Alternative(_flex, _rows_first)
        made["FlashInfer"] = Alternative(_flashinfer, lambda _, out: (out[None],), unavailable=missing)
    return made


def _rows_first(_args: tuple, returned: Tensor) -> tuple[Tensor]:
    return (returned.transpose(1, 2),)


def _heads_first(args: tuple, expand: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous [B, H, R, D] query and [B, H or Hkv, S, D] key and value without unused slots."""
    query, key, value = args[:3]
    group = query.shape[2] // key.shape[2] if expand else 1
    key, value = (cache.repeat_interleave(group, 2).transpose(1, 2).contiguous() for cache in (key, value))
    return query.transpose(1, 2).contiguous(), key, value


def _sdpa(args: tuple, expand: bool = True):
    """SDPA under a dense additive mask; not expanded, torch chooses the backend and groups the heads."""
    query, key, value = _heads_first(args, expand)
    mask = dense_mask(*args[3:8], args[0].shape[1], query.dtype)
    return functools.partial(
        scaled_dot_product_attention, query, key, value, attn_mask=mask, scale=args[8], enable_gqa=not expand
    )


def _flex(args: tuple):
    query, key, value = _heads_first(args, expand=False)
    dense = visible_slots(args)
    block_mask = create_block_mask(
        lambda b, h, q, kv: dense[b, q, kv], query.shape[0], None, query.shape[2], key.shape[2], device=query.device
    )
    return functools.partial(_compiled_flex(), query, key, value, block_mask=block_mask, scale=args[8], enable_gqa=True)


@functools.cache
def _compiled_flex():
    # Every case is a new static shape; past the limit torch would run the slow eager form without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(flex_attention, dynamic=False)


def _flashinfer(args: tuple):
    import flashinfer

    query, key, value = (tensor[0].contiguous() for tensor in args[:3])
    packed = flashinfer.packbits(visible_slots(args).reshape(-1), bitorder="little")
    return functools.partial(
        flashinfer.single_prefill_with_kv_cache, query, key, value, packed_custom_mask=packed, sm_scale=args[8]
    )
