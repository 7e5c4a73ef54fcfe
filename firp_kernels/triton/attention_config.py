"""Block sizes and split counts of tree attention, from shapes and architecture alone.

Nothing here reads a tensor. A launch's grid is the same for all lengths, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from firp_kernels.triton.launch import LaunchConfig, shared_memory

MAX_SPLITS = 64
# Of a cache's slots a context fills this share, between half and all of a bucket.
FILLED = 3 / 4
# What a split adds, in the time of a key block, taken as 0.6 us: itself, and the join. By whole steps on an H100, four
# splits of 64 rows joined in place cost 2.3 us a layer, of 16 rows nothing to speak of. A second launch is an estimate.
OWN, JOIN_OF_BLOCK, SECOND_LAUNCH = 1.0, 4.0, 5.5


@dataclass(frozen=True)
class AttentionConfig(LaunchConfig):
    """Rows (BLOCK_M), keys (BLOCK_N) and head (BLOCK_D) of one program's tile; `resident` programs share a
    multiprocessor."""

    resident: int = 1


def launch_config(packed_rows: int, head_dim: int, element_size: int, capability: int) -> AttentionConfig:
    """Tile for `packed_rows` = R * H / Hkv rows of one key/value head; chosen so that registers do not spill.

    A tile holds up to 128 rows, as each further tile reads all keys again. float32 multiplies outside the tensor cores,
    so its tiles are small.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = max(16, triton.next_power_of_2(packed_rows))
    block_n = 64
    if element_size == 4:
        block_m, block_n, resident = 16, 32, (1 if block_d > 128 else 2)
    else:
        block_m = min(block_m, 128 if block_d <= 128 and capability >= 90 else 64)
        if block_d > 128 or (block_m == 64 and capability < 90):
            block_n = 32
        alone = block_m == 128 or (block_m == 64 and capability < 90) or (block_m >= 32 and block_d > 128)
        resident = 1 if alone else 2
    # Shared memory holds the queries, the weights and num_stages blocks of keys and values; one block less where the
    # multiply takes its operands from registers.
    block_bytes = 2 * block_n * block_d * element_size
    room = shared_memory(capability) // resident - block_m * (block_d + block_n) * element_size
    from_registers = element_size == 2 and (capability < 90 or block_m < 64)
    num_stages = room // block_bytes + int(from_registers)
    num_warps = 8 if resident == 1 or element_size == 4 else 4
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return AttentionConfig(tile, num_warps, max(1, min(num_stages, 3)), resident=resident)


def split_count(tiles: int, key_blocks: int, config: AttentionConfig, multiprocessors: int) -> int:
    """Programs that share the keys of one tile: the fewest within a tenth of the fastest, by a count of key blocks.

    Time is waves of programs times blocks that a program walks. A split adds its start and the join of its result.
    """
    slots = multiprocessors * config.resident
    added = OWN + min(JOIN_OF_BLOCK * config.tile["BLOCK_M"] / config.tile["BLOCK_N"], SECOND_LAUNCH)

    def cost(splits: int) -> float:
        return triton.cdiv(tiles * splits, slots) * (triton.cdiv(key_blocks, splits) + (added if splits > 1 else 0))

    costs = [cost(splits) for splits in range(1, max(min(key_blocks // 2, MAX_SPLITS), 1) + 1)]
    return next(splits for splits, each in enumerate(costs, 1) if each <= 1.1 * min(costs))
