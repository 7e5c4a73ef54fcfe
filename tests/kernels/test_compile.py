"""Every Triton kernel compiles for every architecture, without a GPU, within the limits that `aot` states."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arch, limit", [(80, 1), (90, 3), (100, 1)])
def test_kernels_compile(arch, limit, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "firp_kernels.triton.aot", "--arch", str(arch), "--limit", str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 over a limit" in done.stdout and "bf16" in done.stdout
