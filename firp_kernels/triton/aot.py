"""Compile every kernel ahead of time, without a GPU, and hold it to its architecture's limits.

    python -m firp_kernels.triton.aot [--arch 90] [--op verify_tree] [--limit 2]

Each kernel module yields arguments of launches from `aot_calls()`. The launcher runs on them, and what it would launch
on an architecture is compiled for it. The exit status is 1 if a variant asks for more shared memory than a block can
have, spills more than `MAX_SPILL_BYTES`, or breaks a rule of its machine code (`machine_code.faults`).
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from firp_kernels.registry import TRITON_OPS
from firp_kernels.triton import machine_code
from firp_kernels.triton.launch import shared_memory
from firp_kernels.triton.variants import Variant, recorded

ARCHITECTURES = (80, 90, 100)
# Local memory of a thread, where registers that do not fit are spilled.
MAX_SPILL_BYTES = 64


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and bytes of spills a thread, bytes of shared memory a block."""

    registers: int
    spill: int
    shared: int

    def violations(self, capability: int) -> list[str]:
        limit = shared_memory(capability)
        found = []
        if self.shared > limit:
            found.append(f"shared memory of {self.shared} bytes exceeds {limit}")
        if self.spill > MAX_SPILL_BYTES:
            found.append(f"spills of {self.spill} bytes a thread exceed {MAX_SPILL_BYTES}")
        return found


def compile_variant(variant: Variant, capability: int) -> CompiledKernel:
    """Compile to a cubin of `capability`, through Triton's cache on disk: the code that the launch would get."""
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), dict(variant.attributes))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))


def resources(compiled: CompiledKernel) -> Resources:
    """Read from the cubin, by cuobjdump, what the kernel takes; RuntimeError where it does not say."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = re.search(rf"Function {re.escape(compiled.name)}:\s+REG:(\d+) STACK:(\d+)", usage)
    if figures is None:
        raise RuntimeError(f"cuobjdump: no registers of {compiled.name} in {usage!r}")
    return Resources(int(figures[1]), int(figures[2]), compiled.metadata.shared)


def variants(capability: int, op: str | None = None, limit: int | None = None) -> Iterator[tuple[str, Variant]]:
    """Op and variant of every kernel (of `op` alone), at most `limit` of each kernel function."""
    for name in TRITON_OPS:
        kernels = importlib.import_module(f"firp_kernels.triton.{name}")
        if op not in (None, name) or not hasattr(kernels, "aot_calls"):
            continue
        with recorded(capability) as found:
            for arguments in kernels.aot_calls():
                getattr(kernels, name)(*arguments)
        seen: Counter = Counter()
        for variant in found.values():
            seen[variant.kernel] += 1
            if limit is None or seen[variant.kernel] <= limit:
                yield name, variant


LINE = "{:<21}{:<30}{:<7}{:>9}{:>9}{:>10}{:>9}  {:<4} {}"
HEADER = LINE.format("op", "kernel", "arch", "registers", "spill B", "shared B", "cubin B", "", "variant")


def report(op: str, variant: Variant, compiled: CompiledKernel, capability: int) -> bool:
    """Print a line, and one more for each rule that the kernel breaks; True where it breaks none."""
    taken = resources(compiled)
    broken = taken.violations(capability) + machine_code.faults(op, variant, compiled, capability)
    figures = (taken.registers, taken.spill, taken.shared, len(compiled.asm["cubin"]))
    print(LINE.format(op, compiled.name, f"sm_{capability}", *figures, "no" if broken else "ok", variant.name))
    for fault in broken:
        print(f"    {fault}")
    sys.stdout.flush()
    return not broken


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m firp_kernels.triton.aot", description="Compile the kernels and print what they take."
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="may be repeated; default all")
    parser.add_argument("--op", help="one op's kernels only")
    parser.add_argument("--limit", type=int, help="at most so many variants of each kernel")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: is set, expected unset: the interpreter compiles nothing")
    print(HEADER)
    passed = [
        report(name, variant, compile_variant(variant, capability), capability)
        for capability in options.arch or ARCHITECTURES
        for name, variant in variants(capability, options.op, options.limit)
    ]
    if not passed:
        parser.error(f"op: {options.op!r} has no Triton kernel")
    print(f"{len(passed)} variants, {passed.count(False)} over a limit")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
