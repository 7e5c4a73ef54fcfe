"""The gates agree with the package: versions that the workflow tries, tools that pre-commit runs."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def pinned(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / name).read_text(), flags=re.MULTILINE))


def test_the_oldest_versions_are_the_lower_bounds_of_the_package():
    oldest = pinned(".github/constraints-oldest.txt")
    for name in ("torch", "triton", "transformers"):
        bound = re.search(rf'"{name}>=([\d.]+)', PYPROJECT)[1]
        assert oldest[name] == f"{bound}.0", name


def test_the_workflow_tries_the_oldest_and_the_newest_python_and_versions():
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"][0] == re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    assert {entry["versions"] for entry in matrix["include"]} == set(matrix["versions"])
    assert all((ROOT / entry["constraints"]).is_file() for entry in matrix["include"])


def test_pre_commit_runs_the_clang_format_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    assert f"clang-format=={pinned('constraints.txt')['clang-format']}" in pins
    assert {"ruff", "ruff-format", "clang-format", "mypy", "codespell", "end-of-file-fixer"} <= {
        hook["id"] for hook in hooks
    }
