"""What the machine code of the hot kernels must hold: asynchronous copies, matrix instructions, no local memory.

Read from the cubin where Triton has brought nvdisasm, else from the PTX, which shows the same but for local memory that
the assembler adds; `aot.resources` counts that.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

from triton import knobs
from triton.compiler import CompiledKernel

from firp_kernels.triton.variants import Variant

# Of 16 bytes, past the registers and the L1; on sm_80 with a hint for the L2 in between.
ASYNC_COPY = r"\bLDGSTS\.E\.BYPASS\.(LTC128B\.)?128\b|\bcp\.async\.cg\.shared\.global.*, 0x10\b"
MATRIX = r"\bHMMA\.|\bmma\.sync\b"
# Products of a warp group, for tiles of at least 64 rows.
WIDE_MATRIX = {90: r"\bHGMMA\.|\bwgmma\.mma_async\b", 100: r"\bUTCHMMA\b|\btcgen05\.mma\b"}
WIDE_ROWS = 64
LOCAL = r"\b(LDL|STL)\b|\b(ld|st)\.local\b"
# Kernels that copy and multiply, and the rows of their tile.
PRODUCTS = {"tree_attention_kernel": "BLOCK_M", "predictor_projection_kernel": "BLOCK_O"}


def listing(compiled: CompiledKernel) -> str:
    """Machine code by nvdisasm; PTX where that is not to be had."""
    try:
        tool = knobs.nvidia.nvdisasm.path
    except RuntimeError:
        return compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout


def faults(op: str, variant: Variant, compiled: CompiledKernel, capability: int) -> list[str]:
    """What the code of a kernel lacks, or has and should not have.

    16-bit numbers are multiplied by matrix instructions; where rows are aligned, 16 bytes are copied at once. Neither
    these kernels nor verification use local memory. float32 is multiplied exactly, on no matrix unit, and may spill.
    """
    tile, rows = variant.tile, PRODUCTS.get(variant.kernel.__name__)
    exact = "*fp32" in variant.signature.values() and not {"*fp16", "*bf16"} & set(variant.signature.values())
    if op != "verify_tree" and (rows is None or exact):
        return []
    code, found = listing(compiled), []
    if re.search(LOCAL, code):
        found.append("loads or stores local memory")
    if rows is not None:
        wide = tile[rows] >= WIDE_ROWS and capability in WIDE_MATRIX
        if not re.search(WIDE_MATRIX[capability] if wide else MATRIX, code):
            found.append(f"no matrix instruction {'of a warp group' if wide else ''}".rstrip())
        if tile.get("WIDTH", 0) % 16 == 0 and not re.search(ASYNC_COPY, code):
            found.append("no asynchronous copy of 16 bytes")
    return found
