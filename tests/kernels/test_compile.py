"""Every Triton kernel compiles for every architecture, without a GPU, within the limits and rules that `aot` states."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(cache, *command):
    """What a command prints that compiles kernels, outside of the interpreter; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    places = [ROOT, ROOT / "python", ROOT / "tests/decode", os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, places))
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of all compiled kernels: the two tests have some in common."""
    return tmp_path_factory.mktemp("triton")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_engines_launch_is_what_compiles(arch, cache, request):
    """Exactly the variants of steps of one well-known shape, plain and with its largest tree, on sm_90; with
    --exhaustive of all of them, everywhere.
    """
    exhaustive = request.config.getoption("exhaustive")
    if arch != 90 and not exhaustive:
        pytest.skip("compiled by --exhaustive")
    every = ["--every"] if exhaustive else []
    printed = run(cache, "tests/decode/launched.py", "--arch", str(arch), *every)
    assert " 0 over a limit" in printed and "not among them: none" in printed
    assert all(name in printed for name in ("tree_attention_kernel", "walk_kernel", "bf16"))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_other_shapes_compile(arch, cache, request):
    """Heads, widths and dtypes that those models do not have; without --exhaustive one of each kernel on sm_90."""
    exhaustive = request.config.getoption("exhaustive")
    if arch != 90 and not exhaustive:
        pytest.skip("compiled by --exhaustive")
    limit = [] if exhaustive else ["--limit", "1"]
    printed = run(cache, "-m", "firp_kernels.triton.aot", "--arch", str(arch), *limit)
    assert " 0 over a limit" in printed
