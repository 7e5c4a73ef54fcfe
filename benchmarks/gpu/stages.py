"""The stages of the check, in the order of their value: what each runs, within how many seconds, and what it shows."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu import figures

WORKERS = 15
# The two that compile for other architectures, at length, and need no GPU.
COMPILE_TESTS = ("tests/kernels/test_compile.py", "tests/kernels/test_cuda_compiles.py")
# Ops with a CUDA or Triton kernel of their own, the most important last: it takes the longest.
MICRO_OPS = (
    "write_cache", "predictor_projection", "verify_tree", "commit_cache", "draft_tree", "condition_marginals",
    "lookup_branch", "emit_tokens", "top_marginals", "keep_top_p", "write_and_attend", "tree_attention",
)  # fmt: skip
MICRO_SHAPES = ("llama2-7b", "llama3-8b", "smollm2-135m")
TREES = ((16, 16), (64, 64), (6, 2))
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Command:
    """One command of a stage; one that does not decide is reported and may fail."""

    arguments: list[str]
    decides: bool = True


@dataclass(frozen=True)
class Stage:
    """Commands that share a limit of seconds; key(parts, log) is what the table shows of them.

    Commands write their figures as JSON files into the folder `parts`. missing says why the stage cannot run on this
    machine: it then counts as failed, since nothing was shown.
    """

    name: str
    seconds: float
    commands: list[Command]
    key: Callable[[Path, str], str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


def stages(parts: Path, model: str, predictor: str | None, dry: bool) -> list[Stage]:
    """All stages.

    Args:
        parts: folder where figures of the running stage are written.
        model, predictor: of the end-to-end bench.
        dry: a rehearsal on a CPU, with tiny shapes and reference ops; nothing is built, compiled or captured.
    """
    return [
        _build(dry), _smoke(dry), _gpu_tests(dry), _kernel_tests(dry), _step_cost(parts, dry), _micro(parts, dry),
        _end_to_end(parts, model, predictor, dry), _sanitizer(dry),
    ]  # fmt: skip


def _python(*arguments: object, decides: bool = True) -> Command:
    return Command([sys.executable, *map(str, arguments)], decides)


def _build(dry: bool) -> Stage:
    environment = {"FIRP_BUILD": "none"}
    if not dry:
        architecture = "".join(map(str, torch.cuda.get_device_capability()))
        environment = {"FIRP_BUILD": "cuda", "FIRP_CUDA_ARCHITECTURES": architecture}
    owners = "from benchmarks.gpu.figures import print_owners; print_owners()"
    commands = [_python("setup.py", "build_ext", "--inplace"), _python("-c", owners)]
    return Stage("build", 150, commands, figures.last_line, environment)


def _smoke(dry: bool) -> Stage:
    command = _python("-m", "benchmarks.gpu.smoke", "cpu" if dry else "cuda")
    return Stage("smoke", 150, [command], figures.last_line)


def _pytest(workers: int, *arguments: str) -> Command:
    # A test that hangs in a kernel ends its worker, not the stage.
    limit = ("--timeout", "120", "--timeout-method", "thread") if importlib.util.find_spec("pytest_timeout") else ()
    options = ["-p", "no:cacheprovider", "-p", "no:benchmark", "--continue-on-collection-errors", "-rf"]
    # Costs differ a hundredfold by what a test compiles: workers that are done take from those that are not.
    options += ["-n", str(workers), "--dist", "worksteal", "--durations", "15"]
    return _python("-m", "pytest", *options, *limit, *arguments)


def _gpu_tests(dry: bool) -> Stage:
    where = ["tests/kernels/test_devices.py"] if dry else ["tests"]
    command = _pytest(1 if dry else WORKERS, "-m", "gpu", *where)
    return Stage("gpu-tests", 180, [command], figures.tests, {"OMP_NUM_THREADS": "1"})


def _kernel_tests(dry: bool) -> Stage:
    others = [word for path in COMPILE_TESTS for word in ("--ignore", path)]
    where = ["tests/kernels/test_linear.py"] if dry else ["tests/kernels", "tests/decode/test_triton.py"]
    command = _pytest(1 if dry else WORKERS, "-m", "not gpu", *others, *where)
    return Stage("kernel-tests", 240, [command], figures.tests, {"OMP_NUM_THREADS": "1"})


def _bench(dry: bool, json: Path, *arguments: object) -> Command:
    where = ("--device", "cpu", "--dtype", "float32", "--repeats", 1) if dry else ("--device", "cuda")
    return _python("-m", "firp", "bench", *where, "--json", json, *arguments)


def _step_cost(parts: Path, dry: bool) -> Stage:
    shapes, options = ("llama3-8b", "llama2-7b"), ("--contexts", "1024,4096")
    if dry:
        shapes, options = ("tiny",), ("--contexts", "16,40", "--nodes", 4, "--lookahead", 2)
    commands = [_bench(dry, parts / f"{shape}.json", "--random-weights", shape, *options) for shape in shapes]
    return Stage("step-cost", 240, commands, figures.step_cost)


def _runner(dry: bool, *arguments: object) -> list[object]:
    where = ("--device", "cpu", "--impl", "reference") if dry else ("--device", "cuda")
    return ["benchmarks/run.py", *where, *arguments]


def _micro(parts: Path, dry: bool) -> Stage:
    # The first op multiplies nothing: a rehearsal need not measure how fast a CPU does it in bfloat16.
    ops, shapes, repeats = (MICRO_OPS[:1], ["tiny"], 1) if dry else (MICRO_OPS, MICRO_SHAPES, 11)
    chosen = ("--op", ",".join(ops), "--shapes", ",".join(shapes), "--repeats", repeats)
    return Stage("micro", 150, [_python(*_runner(dry, *chosen, "--json", parts / "micro.json"))], figures.micro)


def _end_to_end(parts: Path, model: str, predictor: str | None, dry: bool) -> Stage:
    """The first tree beside every other method, the next ones beside plain decoding alone."""
    commands, names, options = [], [["ar", "firp", "hf-compiled", "prompt-lookup"], ["ar", "firp"]], ["--limit", 6]
    chosen = ["--model", model, *(["--predictor", predictor] if predictor else [])]
    if dry:
        tiny = parts / "tiny"
        commands.append(_python("-m", "benchmarks.gpu.tiny_model", tiny))
        names = [["ar-reference", "firp-reference", "prompt-lookup"], ["ar-reference", "firp-reference"]]
        options = ["--limit", 2, "--max-new-tokens", 8, "--raw", "--prompts", tiny / "prompts.jsonl"]
        chosen = ["--model", tiny / "model", "--predictor", tiny / "predictor"]
    for i, (nodes, lookahead) in enumerate(TREES[::2] if dry else TREES):
        tree = ["--nodes", nodes, "--lookahead", lookahead, "--methods", ",".join(names[min(i, 1)])]
        commands.append(_bench(dry, parts / f"{nodes}-{lookahead}.json", *chosen, *options, *tree))
    return Stage("e2e", 240, commands, figures.end_to_end)


def _sanitizer(dry: bool) -> Stage:
    """Every kernel on small shapes; only memcheck decides: the others know asynchronous copies and wgmma poorly."""
    check = [sys.executable, *_runner(dry, "--shapes", "tiny", "--check-only", "--op", ",".join(MICRO_OPS))]
    tool = find_tool("compute-sanitizer")
    prefix = [str(tool), "--error-exitcode", "9", "--print-limit", "20", "--tool"]
    commands = [Command([*prefix, name, *check], decides=name == "memcheck") for name in SANITIZERS]
    # Every tensor its own allocation: an access past its end, or of what nobody wrote, cannot hide in a pool.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if dry:
        return Stage("sanitizer", 300, [Command(check)], figures.sanitizer)
    missing = None if tool else "compute-sanitizer is not installed"
    return Stage("sanitizer", 300, commands, figures.sanitizer, environment, missing)


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, under CUDA_HOME, or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([f"{home}/bin", "/usr/local/cuda/bin"]))
