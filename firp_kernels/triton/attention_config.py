"""Block sizes and split counts of tree attention, from shapes and architecture alone.

Nothing here reads a tensor: a launch's grid is the same whatever the lengths are, so that it captures in a CUDA graph,
and nothing is tried at run time, so that no trial writes into a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

# Bytes of shared memory that a program may use. Architectures that are not listed have at least what sm_86 has.
SHARED_MEMORY = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
LEAST_SHARED_MEMORY = 101_376
MAX_SPLITS = 64


@dataclass(frozen=True)
class AttentionConfig:
    """Rows (BLOCK_M) and keys (BLOCK_N) of one program's tile, how it runs, and how many share a multiprocessor."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    resident: int

    @property
    def tile(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}

    @property
    def options(self) -> dict[str, object]:
        """Launch options; multiply-adds may contract, whatever a Triton version takes for its default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def attention_config(packed_rows: int, width: int, element_size: int, capability: int) -> AttentionConfig:
    """Tile for `packed_rows` = R * H / Hkv rows of one key/value head; chosen so that registers do not spill.

    A tile holds up to 128 rows, as each further tile reads all keys again. float32 multiplies outside the tensor cores,
    so that its tiles are small.
    """
    block_d = max(16, triton.next_power_of_2(width))
    block_m = max(16, triton.next_power_of_2(packed_rows))
    block_n = 64
    if element_size == 4:
        block_m, block_n, resident = 16, 32, (1 if block_d > 128 else 2)
    else:
        block_m = min(block_m, 128 if block_d <= 128 and capability >= 90 else 64)
        if block_d > 128 or (block_m == 64 and capability < 90):
            block_n = 32
        resident = 1 if block_m == 128 or (block_m == 64 and capability < 90) or (block_m >= 32 and block_d > 128) else 2
    # Shared memory holds the queries, the weights and num_stages blocks of keys and values; one block less where the
    # multiply takes its operands from registers.
    block_bytes = 2 * block_n * block_d * element_size
    room = SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY) // resident - block_m * (block_d + block_n) * element_size
    from_registers = element_size == 2 and (capability < 90 or block_m < 64)
    num_stages = room // block_bytes + int(from_registers)
    num_warps = 8 if resident == 1 or element_size == 4 else 4
    return AttentionConfig(block_m, block_n, block_d, num_warps, max(1, min(num_stages, 3)), resident)


def split_count(tiles: int, key_blocks: int, config: AttentionConfig, multiprocessors: int) -> int:
    """Programs that share the keys of one tile: the fewest within a tenth of the fastest, by a count of key blocks.

    Time is waves of programs times blocks a program walks; a split adds its start and its partial result, which
    weighs (float32, written and read) as much as 2 * BLOCK_M / BLOCK_N blocks of keys and values.
    """
    slots = multiprocessors * config.resident
    added = 1 + 2 * config.block_m / config.block_n

    def cost(splits: int) -> float:
        return triton.cdiv(tiles * splits, slots) * (triton.cdiv(key_blocks, splits) + (added if splits > 1 else 0))

    costs = [cost(splits) for splits in range(1, max(min(key_blocks // 2, MAX_SPLITS), 1) + 1)]
    return next(splits for splits, each in enumerate(costs, 1) if each <= 1.1 * min(costs))
