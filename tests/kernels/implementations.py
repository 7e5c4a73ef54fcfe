"""Which implementations of an op a test can run here, and how it runs one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import moved

import firp_kernels
from firp_kernels import registry

SOURCES = (Path(__file__).parents[2] / "csrc/sources.txt").read_text().splitlines()
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees")
# Triton kernels run on a GPU where there is one, else in Triton's interpreter.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error of an attention output. A GPU's exp2 adds 2^-22 of each weight, in numerator and denominator, to values
# that reach 4.5 here.
EXP2_ERROR = 2 * 2**-22 * 4.5 if TRITON_DEVICE == "cuda" else 0.0
ATTENTION_TOLERANCE = {
    torch.float32: 3e-6 + EXP2_ERROR, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2,
}  # fmt: skip


def available(name: str) -> list[tuple[str, str]]:
    """(implementation, device) pairs of op `name` that run here, the reference first."""
    pairs = [("reference", "cpu")]
    if registry.owner(name, "cpu") == "extension":
        pairs.append(("extension", "cpu"))
    if name in registry.TRITON_OPS:
        pairs.append(("triton", TRITON_DEVICE))
    return pairs


def on_devices(name: str) -> pytest.MarkDecorator:
    """Runs a test with `impl` and `device` of every implementation of op `name`; what needs a GPU is marked."""
    pairs = [pytest.param(*pair, id=pair[0]) for pair in available(name)]
    if any(line.startswith(f"cuda {name} ") for line in SOURCES):
        not_built = pytest.mark.skipif(
            registry.owner(name, "cuda") != "extension", reason="the extension has no CUDA part"
        )
        pairs.append(pytest.param("extension", "cuda", id="extension-cuda", marks=(pytest.mark.gpu, NO_GPU, not_built)))
    return pytest.mark.parametrize("impl, device", pairs)


def seeds(count: int, impl: str, device: str) -> range:
    """Seeds of `count` random cases; an eighth of them where Triton's interpreter takes a second for each."""
    return range(-(-count // 8) if (impl, device) == ("triton", "cpu") else count)


def run(name: str, args, impl: str, device: str):
    """What op `name` returns on `device`, brought to the CPU: a tensor, or a list of them."""
    out = getattr(firp_kernels, name)(*moved(args, device), impl=impl)
    return out.cpu() if isinstance(out, torch.Tensor) else moved(out, "cpu")
