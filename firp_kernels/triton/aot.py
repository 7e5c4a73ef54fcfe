"""Compile every kernel ahead of time, without a GPU, and hold it to its architecture's limits.

    python -m firp_kernels.triton.aot [--arch 90] [--op verify_tree] [--limit 2]

Each kernel module yields, from `aot_variants(capability)`, the variants its launcher can ask for on that architecture.
The exit status is 1 if a variant does not compile, asks for more shared memory than a block can have, or spills more
than `MAX_SPILL_BYTES`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

import firp_kernels.triton
from firp_kernels.triton.launch import shared_memory

ARCHITECTURES = (80, 90, 100)
# Local memory of a thread, where registers that do not fit are spilled.
MAX_SPILL_BYTES = 64


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        name: what distinguishes it, e.g. "bf16 D128".
        kernel: the `@triton.jit` function.
        signature: type of each argument that is no constexpr: "*bf16", "i32", ...; a ":16" marks a pointer or a number
            divisible by 16, as Triton specialises it at a launch ("*bf16:16").
        constexprs: value of each constexpr argument.
        options: num_warps, num_stages, enable_fp_fusion, as given at the launch.
    """

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: Mapping[str, object]
    options: Mapping[str, object] = field(default_factory=dict)


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
    """Compile to a cubin of `capability`, through Triton's cache on disk."""
    types = dict.fromkeys(variant.constexprs, "constexpr")
    types |= {name: type.removesuffix(":16") for name, type in variant.signature.items()}
    order = variant.kernel.arg_names
    if set(order) != set(types):
        raise ValueError(f"{variant.name}: arguments {sorted(set(order) ^ set(types))} are not given once each")
    by_16 = [["tt.divisibility", 16]]
    divisible = {(order.index(name),): by_16 for name, type in variant.signature.items() if ":16" in type}
    source = ASTSource(variant.kernel, {name: types[name] for name in order}, dict(variant.constexprs), divisible)
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
    """Module name and variant of every kernel (of `op` alone), at most `limit` of each kernel function."""
    for module in pkgutil.iter_modules(firp_kernels.triton.__path__):
        if op not in (None, module.name) or module.name == "aot":
            continue
        kernels = importlib.import_module(f"firp_kernels.triton.{module.name}")
        seen: Counter = Counter()
        for variant in kernels.aot_variants(capability) if hasattr(kernels, "aot_variants") else ():
            seen[variant.kernel] += 1
            if limit is None or seen[variant.kernel] <= limit:
                yield module.name, variant


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
    line = "{:<22}{:<30}{:<34}{:<8}{:>10}{:>9}{:>10}{:>9}  {}"
    print(line.format("op", "kernel", "variant", "arch", "registers", "spill B", "shared B", "cubin B", "limits"))
    broken = count = 0
    for capability in options.arch or ARCHITECTURES:
        for module, variant in variants(capability, options.op, options.limit):
            compiled = compile_variant(variant, capability)
            cubin, taken = compiled.asm["cubin"], resources(compiled)
            violations = taken.violations(capability)
            figures = (taken.registers, taken.spill, taken.shared, len(cubin))
            row = module, compiled.name, variant.name, f"sm_{capability}", *figures, "; ".join(violations) or "ok"
            print(line.format(*row), flush=True)
            broken += bool(violations)
            count += 1
    if not count:
        parser.error(f"op: {options.op!r} has no Triton kernel")
    print(f"{count} variants, {broken} over a limit")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
