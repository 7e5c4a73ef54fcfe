"""Predictor projection in one launch: gather of the lookahead nodes, k products and the concatenation.

The k weights are one matrix of k*d outputs. A program owns a tile of outputs and takes all gathered rows (or a tile of
them) through it, so a weight is read from memory once and the rows, few, come from the L2. For a slot the k*d outputs
lie side by side in the result. The node rows are copied through by further programs of the same launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels import checks
from firp_kernels.triton.aot import Variant
from firp_kernels.triton.launch import TYPE_NAMES, on_device_of

COPY_BLOCK = 2048


@triton.jit
def _copy_node_rows(
    i_c, hidden, out, s_hb, s_hn, s_hd, num_nodes, out_rows, WIDTH: tl.constexpr, COPY_BLOCK: tl.constexpr
):
    """Copy one block of one node row."""
    blocks: tl.constexpr = (WIDTH + COPY_BLOCK - 1) // COPY_BLOCK
    i_row = i_c // blocks
    i_b, i_n = (i_row // num_nodes).to(tl.int64), i_row % num_nodes
    o_d = (i_c % blocks) * COPY_BLOCK + tl.arange(0, COPY_BLOCK)
    row = tl.load(hidden + i_b * s_hb + i_n * s_hn + o_d * s_hd, mask=o_d < WIDTH)
    tl.store(out + (i_b * out_rows + i_n) * WIDTH + o_d, row, mask=o_d < WIDTH)


@triton.jit(do_not_specialize=["num_nodes", "num_slots", "num_offsets", "rows"])
def predictor_projection_kernel(
    hidden, weight, lookahead, out,
    s_hb, s_hn, s_hd, s_wk, s_wo, s_wd, s_lb, s_lp,
    num_nodes, num_slots, num_offsets, rows,
    WIDTH: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, COPY_BLOCK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0)
    outputs = num_offsets * WIDTH
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tiles = tl.cdiv(outputs, BLOCK_O) * row_tiles
    out_rows = num_nodes + num_slots * num_offsets
    if i_t < tiles:
        # Row tiles of one weight tile run side by side: all but the first find it in the L2.
        o_o = (i_t // row_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
        o_r = (i_t % row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_o, m_r = o_o < outputs, o_r < rows
        i_b, i_p = (o_r // num_slots).to(tl.int64), o_r % num_slots
        node = tl.load(lookahead + i_b * s_lb + i_p * s_lp, mask=m_r, other=-1)
        m_node = node >= 0
        o_d = tl.arange(0, BLOCK_D)
        p_w = weight + (o_o // WIDTH).to(tl.int64)[:, None] * s_wk + (o_o % WIDTH).to(tl.int64)[:, None] * s_wo + o_d[None, :] * s_wd
        p_h = hidden + i_b[None, :] * s_hb + node[None, :] * s_hn + o_d[:, None] * s_hd
        total = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            if WIDTH % BLOCK_D == 0:
                w = tl.load(p_w, mask=m_o[:, None], other=0.0)
                h = tl.load(p_h, mask=m_node[None, :], other=0.0)
            else:
                m_d = o_d < WIDTH - start
                w = tl.load(p_w, mask=m_o[:, None] & m_d[None, :], other=0.0)
                h = tl.load(p_h, mask=m_d[:, None] & m_node[None, :], other=0.0)
            total = tl.dot(w, h, total, input_precision="ieee")
            p_w += BLOCK_D * s_wd
            p_h += BLOCK_D * s_hd
        # An empty slot's rows are zero whatever the weight holds: 0 * NaN would not be.
        total = tl.where(m_node[None, :], total, 0.0)
        first = (i_b * out_rows + num_nodes + i_p * num_offsets) * WIDTH
        tl.store(out + first[None, :] + o_o[:, None], total.to(out.dtype.element_ty), mask=m_o[:, None] & m_r[None, :])
    else:
        _copy_node_rows(i_t - tiles, hidden, out, s_hb, s_hn, s_hd, num_nodes, out_rows, WIDTH, COPY_BLOCK)


def config(capability: int, dtype: torch.dtype, rows: int, width: int) -> dict[str, int]:
    """Tile sizes and launch options for `rows` gathered rows.

    Few rows: small output tiles, so that even k*d = 12,288 makes programs for every multiprocessor. More rows: larger
    ones, as each tile reads all rows from the L2.
    """
    if dtype == torch.float32 or width % 16:
        # Exact float32 products run on no tensor core, and their operands live in registers; so do the addresses of
        # rows that are not aligned and cannot be loaded as vectors.
        return {"BLOCK_O": 32, "BLOCK_R": 16 if rows <= 16 else 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 4}
    if rows <= 16:
        return {"BLOCK_O": 32, "BLOCK_R": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        block_r = 32 if rows <= 32 else 64
        return {"BLOCK_O": 64, "BLOCK_R": block_r, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3 if capability < 90 else 4}
    return {"BLOCK_O": 128, "BLOCK_R": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


def predictor_projection(hidden: Tensor, weight: Tensor, lookahead: Tensor) -> Tensor:
    checks.predictor_projection(hidden, weight, lookahead)
    with on_device_of("hidden", hidden, predictor_projection_kernel) as capability:
        batch, num_nodes, width = hidden.shape
        num_slots, num_offsets = lookahead.shape[1], weight.shape[0]
        out = hidden.new_empty(batch, num_nodes + num_slots * num_offsets, width)
        rows = batch * num_slots
        tiling = config(capability, hidden.dtype, rows, width)
        tiles = triton.cdiv(num_offsets * width, tiling["BLOCK_O"]) * triton.cdiv(rows, tiling["BLOCK_R"])
        copies = batch * num_nodes * triton.cdiv(width, COPY_BLOCK)
        if tiles + copies:
            predictor_projection_kernel[(tiles + copies,)](
                hidden, weight, lookahead, out, *hidden.stride(), *weight.stride(), *lookahead.stride(),
                num_nodes, num_slots, num_offsets, rows,
                WIDTH=width, COPY_BLOCK=COPY_BLOCK, enable_fp_fusion=True, **tiling,
            )  # fmt: skip
    return out


def aot_variants(capability: int) -> Iterator[Variant]:
    cases = [(4096, torch.bfloat16), (576, torch.float32), (577, torch.float16), (576, torch.float16), (5120, torch.bfloat16), (577, torch.bfloat16)]
    for rows, (width, dtype) in itertools.product((64, 16, 256, 32), cases):
        tiling = config(capability, dtype, rows, width)
        options = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
        short, stride = TYPE_NAMES[dtype], "i32:16" if width % 16 == 0 else "i32"
        pointers = {"hidden": f"*{short}:16", "weight": f"*{short}:16", "lookahead": "*i32:16", "out": f"*{short}:16"}
        strides = dict.fromkeys(("s_hb", "s_hn", "s_wk", "s_wo"), stride) | {"s_lb": "i32"}
        counts = dict.fromkeys(("num_nodes", "num_slots", "num_offsets", "rows"), "i32")
        yield Variant(
            f"{short} d{width} rows{rows}",
            predictor_projection_kernel,
            pointers | strides | counts,
            {"s_hd": 1, "s_wd": 1, "s_lp": 1, "WIDTH": width, "COPY_BLOCK": COPY_BLOCK, **tiling},
            {**options, "enable_fp_fusion": True},
        )
