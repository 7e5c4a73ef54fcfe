"""The CUDA sources compile with the headers of the torch that is here, a CPU-only build included; no GPU is needed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def sources(device):
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line.startswith(device)]
    return {op: ROOT / source for _, op, source in lines}


def test_sources_are_named_after_their_op():
    for device in ("cpu", "cuda"):
        for op, source in sources(device).items():
            assert source.is_file() and source.stem == op and source.parent.name == device


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_cuda_sources_compile(tmp_path, pytestconfig):
    if not pytestconfig.getoption("exhaustive"):
        pytest.skip("a minute of nvcc: --exhaustive; `make test-device-versions` builds them too")
    together = tmp_path / "together.cu"
    together.write_text("".join(f'#include "{source}"\n' for source in sources("cuda").values()))
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = [
        NVCC,
        "-std=c++20",
        "-O0",
        "-arch=sm_90",
        "-I",
        ROOT / "csrc/include",
        *headers,
        "-c",
        together,
        "-o",
        tmp_path / "out.o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
