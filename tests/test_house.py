"""The house: imports flow one way, and an op has one name everywhere."""

import ast
import doctest
from pathlib import Path

import pytest

import firp_kernels
from firp_kernels import ops, registry

ROOT = Path(__file__).parents[1]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_kernels_know_nothing_of_models():
    for path in (ROOT / "firp_kernels").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in ("firp", "transformers", "huggingface_hub"), (path, name)


def test_the_model_side_holds_no_kernels():
    for path in (ROOT / "python/firp").rglob("*.py"):
        assert "triton" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_an_op_has_one_name_everywhere(name):
    """`ops/x.py`, a kernel in `triton/x.py` or `csrc/**/x.*`, `tests/kernels/test_x.py`, `benchmarks/x.py`."""
    assert {name, "fake", "check", "reference"} <= functions(ROOT / f"firp_kernels/ops/{name}.py")
    kernel = ROOT / f"firp_kernels/triton/{name}.py"
    assert kernel.is_file() == (name in registry.TRITON_OPS)
    assert not kernel.is_file() or name in functions(kernel)
    assert kernel.is_file() or [path for path in (ROOT / "csrc").rglob(f"{name}.*") if path.parent.name != "tests"]
    assert f'on_devices("{name}")' in (ROOT / f"tests/kernels/test_{name}.py").read_text()
    assert "cases" in functions(ROOT / f"benchmarks/{name}.py")


def test_every_op_of_the_kernels_is_defined():
    assert {path.stem for path in (ROOT / "firp_kernels/ops").glob("*.py")} - {"__init__"} == ops.SCHEMAS.keys()
    listed = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line[0] != "#"]
    assert {op for _, op, _ in listed} | set(registry.TRITON_OPS) == ops.SCHEMAS.keys()
    assert [f"csrc/{device}/{op}{Path(source).suffix}" for device, op, source in listed] == [line[2] for line in listed]


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_a_contract_ends_with_an_example_that_runs(name):
    contract = getattr(firp_kernels, name)
    assert "Args:" in contract.__doc__ and "Raises:" in contract.__doc__
    (example,) = doctest.DocTestFinder().find(contract, name, globs={})
    assert 2 <= len(example.examples) <= 6 and not doctest.DocTestRunner().run(example).failed


def test_files_can_be_read_in_one_sitting():
    sources = [
        *ROOT.glob("firp_kernels/**/*.py"),
        *ROOT.glob("python/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("csrc/**/*.*"),
    ]
    assert not [
        (path, len(lines))
        for path in sources
        if len(lines := path.read_text().splitlines()) > 320 and path.suffix != ".so"
    ]
