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
SETS = ("portable", "avx2", "avx512", "avx512bf16")
OPS = ("linear", "gated_linear", "joint_linear", "rms_norm", "output_norm_mlp", "tree_attention")
WRONG = ("", "AVX2")
# The kernels read the cap when they are loaded: each in a process of its own, forked from one that has loaded torch.
PRINTED = """
import json, os, sys, torch

def name():
    import firp_kernels
    print(firp_kernels.cpu_isa())

def calls():
    import firp_kernels
    for call in (lambda: firp_kernels.linear(torch.ones(1, 4), torch.ones(4, 4)), firp_kernels.cpu_isa):
        try:
            call()
        except ValueError as error:
            print(error)

for cap, function in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        if cap is not None:
            os.environ["FIRP_CPU_ISA"] = cap
        globals()[function]()
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print("end", flush=True)
"""


def python(cap, *arguments):
    """Run Python under a cap; None is none."""
    environment = {name: value for name, value in os.environ.items() if name != "FIRP_CPU_ISA"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if cap is not None:
        environment["FIRP_CPU_ISA"] = cap
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def printed():
    """By cap: lines that a process under it prints, of the set in use or, for a wrong one, of the errors of calls."""
    wanted = [*((cap, "name") for cap in (None, *SETS)), *((cap, "calls") for cap in WRONG)]
    done = python(None, "-c", PRINTED, json.dumps(wanted))
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("end\n")[:-1]
    return {cap: part.splitlines() for (cap, _), part in zip(wanted, parts, strict=True)}


@pytest.fixture(scope="module")
def best(printed):
    """The set in use without a cap."""
    return printed[None][0]


@pytest.mark.parametrize("cap", SETS)
def test_a_cap_is_the_set_in_use_where_the_processor_has_it(cap, best, printed):
    assert printed[cap] == [min(best, cap, key=SETS.index)]


@pytest.mark.parametrize("cap", SETS)
def test_ops_under_a_cap(cap, best):
    """The tests of the ops themselves; of tree_attention the one with the most cases."""
    if SETS.index(cap) >= SETS.index(best):
        pytest.skip(f"the same kernels as without a cap: {best}")
    files = [f"tests/kernels/test_{op}.py" for op in OPS]
    files[-1] += "::test_random_cases"
    chosen = "extension and (float32 or bfloat16)"
    done = python(cap, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert done.returncode == 0, done.stdout + done.stderr


def error(wrong):
    return f"FIRP_CPU_ISA: got '{wrong}', expected one of {', '.join(SETS)}"


@pytest.mark.parametrize("wrong", WRONG)
def test_another_value_is_one_error_at_every_call(wrong, printed):
    assert printed[wrong] == [error(wrong)] * 2


def test_another_value_is_one_line_of_the_command():
    done = python("sse4", "-m", "firp", "doctor")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {error('sse4')}\n")


def test_doctor_shows_the_cap():
    lines = python("portable", "-m", "firp", "doctor").stdout.splitlines()
    for fact in ("extension: cpu_instructions", "cap on cpu_instructions"):
        assert any(fact in line and "portable" in line for line in lines), lines
