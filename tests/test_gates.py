"""`make lint`, pre-commit and CI run the same tools in the same versions."""

import re
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# Each tool, as `make lint` calls it and as a hook does; a hook mends what the other reports.
TOOLS = {
    "ruff": ("ruff check .", "ruff check --fix --exit-non-zero-on-fix"),
    "ruff-format": ("ruff format --check .", "ruff format"),
    "clang-format": ("clang-format --dry-run --Werror $(FORMATTED)", "clang-format -i"),
    "mypy": ("mypy firp_kernels python/firp python/firp_vllm", "mypy firp_kernels python/firp python/firp_vllm"),
    "codespell": ("codespell", "codespell"),
}
HOOKS = {
    hook["id"]: hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repo["hooks"]
}
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def pins(path):
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / path).read_text(), flags=re.MULTILINE))


def test_make_lint_runs_each_tool_and_no_other():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)[1]
    assert re.findall(r"\$\(BIN\)/(.*)", recipe) == [command for command, _ in TOOLS.values()]


def test_make_test_runs_lint():
    assert re.search(r"^test:.*\n(\t.*\n)*\t\$\(MAKE\) --jobs 2 .*\blint\b", MAKEFILE, flags=re.MULTILINE)


@pytest.mark.parametrize("name", TOOLS)
def test_a_hook_runs_the_same_tool_in_the_same_version(name):
    hook, package = HOOKS[name], name.removesuffix("-format") if name.startswith("ruff") else name
    assert hook["entry"] == TOOLS[name][1]
    assert f"{package}=={pins('constraints.txt')[package]}" in hook["additional_dependencies"]
    assert pins(".github/constraints-oldest.txt")[package] == pins("constraints.txt")[package]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert package in extra


def test_ci_runs_the_hooks_and_the_tests_on_both_ends_of_the_versions():
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in WORKFLOW["jobs"].items()}
    assert any(run.startswith("pre-commit run --all-files") for run in steps["style"])
    assert any(run.startswith("make test ") for run in steps["test"])
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.12", "3.13"]
    assert {entry["constraints"] for entry in matrix["include"]} == {
        ".github/constraints-oldest.txt",
        "constraints.txt",
    }


def test_a_release_is_built_for_the_torch_of_the_tests():
    assert pins(".github/constraints-release.txt")["torch"] == pins("constraints.txt")["torch"]


def test_the_length_of_a_line_is_checked():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert lint["line-length"] == 120 and "E" in lint["lint"]["select"] and "E501" not in lint["lint"]["ignore"]
