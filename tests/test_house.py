"""The house: imports flow one way, and every op has its schema, oracle and docstring."""

import ast
from pathlib import Path

import firp_kernels
from firp_kernels import ops, reference, registry

ROOT = Path(__file__).parents[1]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_kernels_know_nothing_of_models():
    for path in (ROOT / "firp_kernels").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in ("firp", "transformers", "huggingface_hub"), (path, name)


def test_the_model_side_holds_no_kernels():
    for path in (ROOT / "python/firp").rglob("*.py"):
        assert "triton" not in {name.split(".")[0] for name in imported(path)}, path


def test_every_op_has_oracle_and_contract():
    for name in ops.SCHEMAS:
        assert callable(getattr(reference, name))
        docstring = getattr(firp_kernels, name).__doc__
        assert "Args:" in docstring and "Raises:" in docstring, name


def test_every_kernel_has_its_files():
    """One name everywhere: each op that Triton serves has a kernel module, a test file and a benchmark."""
    assert set(registry.TRITON_OPS) < ops.SCHEMAS.keys()
    for name in registry.TRITON_OPS:
        kernel = ast.parse((ROOT / f"firp_kernels/triton/{name}.py").read_text())
        assert {name, "aot_variants"} <= {node.name for node in kernel.body if isinstance(node, ast.FunctionDef)}, name
        for path in (f"tests/kernels/test_{name}.py", f"benchmarks/{name}.py"):
            assert (ROOT / path).is_file(), path


def test_files_can_be_read_in_one_sitting():
    sources = [*ROOT.glob("firp_kernels/**/*.py"), *ROOT.glob("python/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    assert not [(path, len(lines)) for path in sources if len(lines := path.read_text().splitlines()) > 320 and path.suffix != ".so"]
