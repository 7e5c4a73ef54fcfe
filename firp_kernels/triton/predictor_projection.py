"""Predictor projection in one launch: gather of the lookahead nodes, k products and the concatenation.

The k weights are one matrix of k*d outputs. A program owns a tile of outputs and takes all gathered rows (or a tile of
them) through it, so a weight is read from memory once and the rows, few, come from the L2. For a slot the k*d outputs
are side by side in the result. The node rows are copied through by further programs of the same launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_kernels.ops.predictor_projection import check
from firp_kernels.triton.launch import LaunchConfig, meta, on_device_of


@triton.jit
def _copy_node_rows(
    i_c, hidden, out, s_hidden_b, s_hidden_n, s_hidden_d, num_nodes, out_rows,
    WIDTH: tl.constexpr, BLOCK_COPY: tl.constexpr,
):  # fmt: skip
    """out[b, n] = hidden[b, n]: one block of one node row."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COPY - 1) // BLOCK_COPY
    i_row = i_c // blocks
    i_b, i_n = (i_row // num_nodes).to(tl.int64), i_row % num_nodes
    o_d = (i_c % blocks) * BLOCK_COPY + tl.arange(0, BLOCK_COPY)
    m_d = o_d < WIDTH
    b_row = tl.load(hidden + i_b * s_hidden_b + i_n * s_hidden_n + o_d * s_hidden_d, mask=m_d)  # [BLOCK_COPY]
    tl.store(out + (i_b * out_rows + i_n) * WIDTH + o_d, b_row, mask=m_d)


@triton.jit(do_not_specialize=["num_nodes", "num_slots", "num_offsets", "rows"])
def predictor_projection_kernel(
    hidden, weight, lookahead, out,
    s_hidden_b, s_hidden_n, s_hidden_d, s_weight_k, s_weight_o, s_weight_d, s_lookahead_b, s_lookahead_p,
    num_nodes, num_slots, num_offsets, rows,
    WIDTH: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_COPY: tl.constexpr,
):  # fmt: skip
    """out[b, N + p*k + j] = weight[j] @ hidden[b, lookahead[b, p]]: BLOCK_O of the k*d outputs of BLOCK_R slots.

    One program a tile. The programs past these copy the node rows. `rows` is B * P, the slots of all sequences.
    """
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
        o_b, o_p = (o_r // num_slots).to(tl.int64), o_r % num_slots
        b_node = tl.load(lookahead + o_b * s_lookahead_b + o_p * s_lookahead_p, mask=m_r, other=-1)  # [BLOCK_R]
        m_node = b_node >= 0
        o_d = tl.arange(0, BLOCK_D)
        p_output = weight + (o_o // WIDTH).to(tl.int64) * s_weight_k + (o_o % WIDTH).to(tl.int64) * s_weight_o
        p_weight = p_output[:, None] + o_d[None, :] * s_weight_d
        p_hidden = hidden + o_b[None, :] * s_hidden_b + b_node[None, :] * s_hidden_n + o_d[:, None] * s_hidden_d
        b_out = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
        for i_d in range(0, WIDTH, BLOCK_D):
            if WIDTH % BLOCK_D == 0:
                b_weight = tl.load(p_weight, mask=m_o[:, None], other=0.0)  # [BLOCK_O, BLOCK_D]
                b_hidden = tl.load(p_hidden, mask=m_node[None, :], other=0.0)  # [BLOCK_D, BLOCK_R]
            else:
                m_d = o_d < WIDTH - i_d
                b_weight = tl.load(p_weight, mask=m_o[:, None] & m_d[None, :], other=0.0)  # [BLOCK_O, BLOCK_D]
                b_hidden = tl.load(p_hidden, mask=m_d[:, None] & m_node[None, :], other=0.0)  # [BLOCK_D, BLOCK_R]
            b_out = tl.dot(b_weight, b_hidden, b_out, input_precision="ieee")
            p_weight += BLOCK_D * s_weight_d
            p_hidden += BLOCK_D * s_hidden_d
        # An empty slot's rows are zero for any weight: 0 * NaN would not be.
        b_out = tl.where(m_node[None, :], b_out, 0.0)
        o_first = (o_b * out_rows + num_nodes + o_p * num_offsets) * WIDTH
        p_out = out + o_first[None, :] + o_o[:, None]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_o[:, None] & m_r[None, :])
    else:
        _copy_node_rows(
            i_t - tiles, hidden, out, s_hidden_b, s_hidden_n, s_hidden_d, num_nodes, out_rows, WIDTH, BLOCK_COPY
        )


def launch_config(capability: int, dtype: torch.dtype, rows: int, width: int) -> LaunchConfig:
    """Tile for `rows` gathered rows.

    Few rows: small output tiles, so that even k*d = 12,288 makes programs for every multiprocessor. More rows: larger
    ones, as each tile reads all rows from the L2.
    """

    def config(block_o: int, block_r: int, block_d: int, num_warps: int, num_stages: int) -> LaunchConfig:
        tile = {"BLOCK_O": block_o, "BLOCK_R": block_r, "BLOCK_D": block_d, "BLOCK_COPY": 2048}
        return LaunchConfig(tile, num_warps, num_stages)

    if dtype == torch.float32 or width % 16:
        # Exact float32 products run on no tensor core, and their operands live in registers; so do the addresses of
        # rows that are not aligned and cannot be loaded as vectors.
        return config(32, 16 if rows <= 16 else 32, 32, 4, 4)
    if rows <= 16:
        return config(32, 16, 128, 4, 4)
    if rows <= 64:
        return config(64, 32 if rows <= 32 else 64, 64, 4, 3 if capability < 90 else 4)
    return config(128, 128, 64, 8, 3)


def predictor_projection(hidden: Tensor, weight: Tensor, lookahead: Tensor) -> Tensor:
    """`firp_kernels.predictor_projection` on a CUDA device."""
    check(hidden, weight, lookahead)
    with on_device_of("hidden", hidden, predictor_projection_kernel) as capability:
        batch, num_nodes, width = hidden.shape
        num_slots, num_offsets = lookahead.shape[1], weight.shape[0]
        out = hidden.new_empty(batch, num_nodes + num_slots * num_offsets, width)
        rows = batch * num_slots
        config = launch_config(capability, hidden.dtype, rows, width)
        tiles = triton.cdiv(num_offsets * width, config.tile["BLOCK_O"]) * triton.cdiv(rows, config.tile["BLOCK_R"])
        copies = batch * num_nodes * triton.cdiv(width, config.tile["BLOCK_COPY"])
        if tiles + copies:
            predictor_projection_kernel[(tiles + copies,)](
                hidden, weight, lookahead, out, *hidden.stride(), *weight.stride(), *lookahead.stride(),
                num_nodes, num_slots, num_offsets, rows, WIDTH=width, **config.keywords,
            )  # fmt: skip
    return out


def aot_calls() -> Iterator[tuple]:
    """Arguments of launches for `aot`: every tile in every dtype, aligned widths and others."""
    cases = [(4096, torch.bfloat16), (576, torch.float32), (577, torch.float16)]
    cases += [(576, torch.float16), (5120, torch.bfloat16), (577, torch.bfloat16)]
    for rows, (width, dtype) in itertools.product((64, 16, 256, 32), cases):
        lookahead = meta(1, rows, dtype=torch.int32)
        yield meta(1, rows, width, dtype=dtype), meta(3, width, width, dtype=dtype), lookahead
