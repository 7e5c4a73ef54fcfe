"""FIRP_CPU_ISA: the CPU kernels under each cap against their oracles, the name in use, one error for another value."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from firp_kernels import registry

pytestmark = pytest.mark.skipif(registry.load_extension()[0] is None, reason="the C++ extension is not built")
ROOT = Path(__file__).parents[2]
SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
OPS = ("linear", "gated_linear", "joint_linear", "rms_norm", "output_norm_mlp", "threads", "tree_attention")
WRONG = ("", "AVX2")


@pytest.fixture(scope="module")
def server():
    """The kernels read the cap when they are loaded: each in a process of its own, forked from one without them."""
    environment = {name: value for name, value in os.environ.items() if name != "FIRP_CPU_ISA"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    script = Path(__file__).with_name("capped.py")
    with subprocess.Popen([sys.executable, script], cwd=ROOT, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def under(server, tmp_path_factory):
    """Exit code, stdout and stderr of what `capped.py` runs under a cap; None is none."""

    def run(cap, what, *arguments):
        folder = tmp_path_factory.mktemp("capped")
        server.stdin.write(json.dumps([cap, what, arguments, str(folder)]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), *((folder / name).read_text() for name in ("stdout", "stderr"))

    return run


@pytest.fixture(scope="module")
def best(under):
    """The set in use without a cap."""
    return under(None, "name")[1].strip()


@pytest.mark.parametrize("cap", SETS)
def test_a_cap_is_the_set_in_use_where_the_processor_has_it(cap, best, under):
    assert under(cap, "name")[:2] == (0, min(best, cap, key=SETS.index) + "\n")


@pytest.mark.parametrize("cap", SETS)
def test_ops_under_a_cap(cap, best, under):
    """The tests of the ops themselves; of tree_attention the one with the most cases."""
    if SETS.index(cap) >= SETS.index(best):
        pytest.skip(f"the same kernels as without a cap: {best}")
    files = [f"tests/kernels/test_{op}.py" for op in OPS]
    files[-1] += "::test_random_cases"
    chosen = "extension and (float32 or bfloat16)"
    code, out, err = under(cap, "pytest", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert code == 0 and " passed" in out, out + err


def error(wrong):
    return f"FIRP_CPU_ISA: got '{wrong}', expected one of {', '.join(SETS)}"


@pytest.mark.parametrize("wrong", WRONG)
def test_another_value_is_one_error_at_every_call(wrong, under):
    assert under(wrong, "calls")[:2] == (0, f"{error(wrong)}\n" * 2)


def test_another_value_is_one_line_of_the_command(under):
    assert under("sse4", "firp", "doctor") == (2, "", f"error: {error('sse4')}\n")


def test_doctor_shows_the_cap(under):
    lines = under("portable", "firp", "doctor")[1].splitlines()
    for fact in ("extension: cpu_instructions", "cap on cpu_instructions"):
        assert any(fact in line and "portable" in line for line in lines), lines
