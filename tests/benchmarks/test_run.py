"""The microbenchmark runner on a CPU: what it reports, what it refuses, and that a wrong kernel gets no figures."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import measure, run, timing
from firp_kernels import ops, registry

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--shapes", "tiny", "--repeats", "2")


@pytest.fixture(autouse=True, scope="module")
def small():
    """Rates and sets of buffers that take no time: no figure is read here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.MATMUL_SIZE, "cpu", 64)
        patch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
        patch.setattr(timing, "MAX_SETS", 3)
        yield


def invoke(*args):
    return CliRunner().invoke(run.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = invoke(*TINY, "--json", folder / "deep/run.json")
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "deep/run.json").read_text())


def test_every_op_has_a_benchmark():
    assert run.OPS.keys() == ops.SCHEMAS.keys()
    assert all((ROOT / f"benchmarks/{name}.py").is_file() for name in ops.SCHEMAS)


def test_the_document(whole_run):
    _, document = whole_run
    assert document["environment"]["torch"] == torch.__version__ and document["environment"]["threads"] >= 1
    assert document["rates"]["copy_bytes_per_second"] > 0
    assert set(document["rates"]["matmul_operations_per_second"]) == {"float32", "bfloat16"}
    entries = document["entries"]
    assert {entry["op"] for entry in entries} == ops.SCHEMAS.keys()
    for entry in entries:
        assert entry["status"] == "ok", entry
        taken = entry["microseconds"]
        assert 0 < taken["min"] <= taken["median"] <= taken["max"]
        assert entry["share_of_floor"] == pytest.approx(entry["floor_microseconds"] / taken["median"])
        assert entry["dtype"] in (
            ("int64",) if entry["op"] in ("emit_tokens", "lookup_branch") else ("float32", "bfloat16")
        )
        assert entry["rows"] >= entry["nodes"]
        if entry["bound"] is not None:
            assert entry["error"] <= entry["bound"]
    for name in ops.SCHEMAS:
        ours = [entry for entry in entries if entry["op"] == name and entry["kind"] == "implementation"]
        assert {entry["implementation"] for entry in ours} == {registry.owner(name, "cpu"), "reference"}
        assert len({entry["case"] for entry in ours}) * len({entry["implementation"] for entry in ours}) == len(ours)


def test_speedups_are_against_every_alternative(whole_run):
    _, document = whole_run
    for entry in document["entries"]:
        others = [
            e for e in document["entries"] if e["case"] == entry["case"] and e["op"] == entry["op"] and e is not entry
        ]
        if entry["kind"] != "implementation":
            assert "speedup" not in entry
            continue
        expected = {
            e["implementation"] for e in others if e["kind"] != "implementation" or e["implementation"] == "reference"
        }
        assert entry["speedup"].keys() == expected
    names = {entry["implementation"] for entry in document["entries"]}
    assert {"SDPA flash", "SDPA math", "index_put", "argmax + host walk", "torch.amax"} <= names


def test_the_table(whole_run):
    for text in (*ops.SCHEMAS, "SDPA flash", "copy", "GB/s", "of floor"):
        assert text in whole_run[0]


def test_a_plot_of_two_ops(tmp_path):
    """Of integers without an error bound, and of floats with alternatives; a panel of each op would take 10 s."""
    result = invoke(*TINY, "--op", "emit_tokens,tree_attention", "--plot", tmp_path / "deep/run.png")
    assert result.exit_code == 0, result.output
    image = (tmp_path / "deep/run.png").read_bytes()
    assert image.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--op", "tree_attention,fast"], "op: got 'fast', expected one of write_cache"),
        (["--shapes", "gpt2"], "shapes: got 'gpt2', expected one of llama2-7b"),
        (["--device", "tpu"], "device: got 'tpu', expected one of cuda, cpu"),
        (["--impl", "cublas"], "impl: got 'cublas', expected one of reference"),
        (["--repeats", "0"], "repeats: got 0, expected at least 1"),
        (["--check-only", "--plot", "x.png"], "plot: nothing is timed"),
    ],
)
def test_a_bad_argument_is_refused_by_name(args, message):
    result = invoke("--device", "cpu", *args)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_refused():
    result = invoke("--device", "cuda")
    assert result.exit_code == 2 and "torch sees no CUDA device" in result.output


def wrong_linear(*args):
    return torch.nn.functional.linear(*args) * 1.1


def broken_linear(*_):
    raise RuntimeError("illegal instruction")


@pytest.mark.parametrize(
    "function, status, reason", [(wrong_linear, "wrong", "error"), (broken_linear, "failed", "illegal instruction")]
)
def test_a_wrong_implementation_gets_no_figures(monkeypatch, tmp_path, function, status, reason):
    honest = measure.implementation
    monkeypatch.setattr(
        measure,
        "implementation",
        lambda op, impl, device: honest(op, impl, device) if impl == "reference" else function,
    )
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    result = invoke(*TINY, "--op", "linear", "--impl", "extension,reference", "--json", path, "--plot", picture)
    assert (
        result.exit_code == 1
        and "a check of linear failed: no times and no speedups" in result.output
        and not picture.exists()
    )
    entries = json.loads(path.read_text())["entries"]
    assert {entry["status"] for entry in entries} == {status, "withheld"}
    for entry in entries:
        assert not entry.keys() & {"microseconds", "floor_microseconds", "share_of_floor", "speedup"}
        assert entry["implementation"] != "extension" or reason in entry["reason"]


def test_a_wrong_alternative_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(run.OPS["tree_attention"], "scaled_dot_product_attention", lambda query, *_, **__: query)
    path = tmp_path / "run.json"
    result = invoke(*TINY, "--op", "tree_attention", "--json", path)
    assert result.exit_code == 0, result.output
    for entry in json.loads(path.read_text())["entries"]:
        ours = entry["kind"] == "implementation"
        assert entry["status"] == ("ok" if ours else "wrong") and ours == ("microseconds" in entry)
        assert not ours or entry["speedup"].keys() <= {"reference"}


def test_wrong_integers_are_wrong(monkeypatch):
    def other_order(*args):
        tokens, *rest = registry.bound("draft_tree", "reference")(*args)
        return tokens + 1, *rest

    monkeypatch.setattr(measure, "implementation", lambda op, impl, device: other_order)
    result = invoke(*TINY, "--op", "draft_tree", "--impl", "extension")
    assert result.exit_code == 1 and "wrong: result 0 differs from the reference" in result.output


def test_check_only_says_which_cases_pass(monkeypatch):
    right_in_float32 = lambda rows, *rest: torch.nn.functional.linear(rows, *rest) + (rows.dtype != torch.float32)  # noqa: E731
    monkeypatch.setattr(measure, "implementation", lambda op, impl, device: right_in_float32)
    result = invoke(*TINY, "--op", "linear", "--impl", "extension", "--check-only")
    assert result.exit_code == 1 and "a check of linear failed\n" in result.output
    rows = [line for line in result.output.splitlines() if " extension " in line]
    assert (
        all((" ok " in row) == ("float32" in row) and ("wrong: error" in row) == ("bfloat16" in row) for row in rows)
        and len(rows) == 12
    )


def test_an_implementation_that_is_not_there_is_named():
    result = invoke(*TINY, "--op", "draft_tree", "--impl", "triton,reference", "--check-only")
    assert result.exit_code == 0 and "unavailable: impl: op 'draft_tree' has no 'triton'" in result.output


def test_check_only_times_nothing_and_runs_as_a_script(tmp_path):
    path = tmp_path / "check.json"
    command = [
        sys.executable,
        "benchmarks/run.py",
        *TINY,
        "--op",
        "commit_cache",
        "--impl",
        "reference",
        "--check-only",
        "--json",
        str(path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    document = json.loads(path.read_text())
    assert document["rates"] == {} and document["entries"]
    assert all(entry["status"] == "ok" and "microseconds" not in entry for entry in document["entries"])


def test_passes_interleave_rotate_and_reset():
    events = []
    calls = {name: [lambda name=name, i=i: events.append((name, i)) for i in range(3)] for name in "ab"}
    reset = lambda: events.append("reset")  # noqa: E731
    passes = {name: timing.start("cpu", timing.Timed(calls[name], nullcontext), reset) for name in "ab"}
    events.clear()
    samples = timing.interleave(passes, 2, reset)
    everything = {name: ["reset", (name, 0), (name, 1), (name, 2)] for name in "ab"}
    assert events == everything["a"] + everything["b"] + everything["b"] + everything["a"]
    assert all(len(taken) == 2 and min(taken) > 0 for taken in samples.values())


def test_sets_exceed_twice_the_cache():
    cache = timing.cache_bytes("cpu")
    assert timing.num_sets("cpu", cache, 1) * cache > 2 * cache
    assert timing.num_sets("cpu", 1, 1) == timing.MAX_SETS
    assert timing.num_sets("cpu", cache, 2 * timing.MEMORY["cpu"]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tmp_path):
    path = tmp_path / "run.json"
    result = invoke("--device", "cuda", "--shapes", "tiny", "--repeats", "2", "--json", path)
    assert result.exit_code == 0, result.output
    ours = [
        e
        for e in json.loads(path.read_text())["entries"]
        if e["kind"] == "implementation" and e["implementation"] != "reference"
    ]
    assert ours and all(entry["clock"] == "graph" for entry in ours)
