"""The GPU check as far as it goes without a GPU: a rehearsal of every stage, limits, resumption, the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu_check
from benchmarks.gpu import figures, runner, stages
from benchmarks.gpu.stages import Command, Stage

ROOT = Path(__file__).parents[2]
NAMES = ["build", "smoke", "gpu-tests", "kernel-tests", "step-cost", "micro", "e2e", "sanitizer"]
ABOUT = {"sources": "abc", "gpu": "none"}


def python(code, decides=True):
    return Command([sys.executable, "-c", code], decides)


def first_line(_parts, log):
    return log.splitlines()[2]


def stage(name, *codes, seconds=60, **options):
    return Stage(name, seconds, [python(code) for code in codes], first_line, **options)


def records(out):
    return {record["stage"]: record for record in json.loads((out / "summary.json").read_text())["stages"]}


def test_the_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    made = stages.stages(tmp_path, "model", "predictor", dry=False)
    assert [one.name for one in made] == NAMES
    assert all(one.seconds <= 600 for one in made)
    assert made[0].environment == {"FIRP_BUILD": "cuda", "FIRP_CUDA_ARCHITECTURES": "90"}
    words = [word for one in made for command in one.commands for word in command.arguments]
    written = sorted(Path(word).name for word in words if word.startswith(str(tmp_path)))
    assert written == ["16-16.json", "6-2.json", "64-64.json", "llama2-7b.json", "llama3-8b.json", "micro.json"]
    for path in ("benchmarks/run.py", "setup.py", "tests/decode/test_triton.py", *stages.COMPILE_TESTS):
        assert path in words and (ROOT / path).is_file()
    assert [command.decides for command in made[-1].commands] == [True, False, False]


def rehearsed(tmp_path, *options):
    """Name and outcome of the stages, and the figures of each."""
    command = [sys.executable, "benchmarks/gpu_check.py", "--dry-run", "--out", str(tmp_path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_check.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "figures.json", "gpu_check.log"}
    assert records(tmp_path)["smoke"]["key"] == "9 of 9 checks passed"
    made = json.loads((tmp_path / "figures.json").read_text())
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    return rows, {name: set(parts) for name, parts in made.items()}


def test_a_rehearsal_passes_two_stages(tmp_path):
    rows, made = rehearsed(tmp_path, "--stage", "smoke,micro")
    assert rows[-2:] == [["smoke", "passed"], ["micro", "passed"]] and made == {"micro": {"micro"}}


def test_a_rehearsal_passes_every_stage(tmp_path, request):
    if not request.config.getoption("exhaustive"):
        pytest.skip("two minutes of starting processes: --exhaustive")
    rows, made = rehearsed(tmp_path)
    assert rows[-len(NAMES) :] == [[name, "passed"] for name in NAMES]
    assert made == {"step-cost": {"tiny"}, "micro": {"micro"}, "e2e": {"16-16", "6-2"}}


def test_a_failing_stage_does_not_stop_the_next(tmp_path, capfd):
    chosen = [
        stage("good", "print('two figures')"),
        stage("bad", "print('seen'); raise SystemExit(3)", "print('also run')"),
        stage("hangs", "import time; time.sleep(600)", seconds=1),
        stage("absent", "raise SystemExit(0)", missing="the tool is not installed"),
        Stage("advice", 60, [python("print('ok')"), python("raise SystemExit(9)", decides=False)], first_line),
        stage("last", "import os, firp_kernels; print(os.environ['LEVEL'])", environment={"LEVEL": "11"}),
    ]
    assert not runner.run_stages(chosen, tmp_path / "out", ABOUT)
    printed = capfd.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in printed[printed.index(runner.table([])) :]}
    assert "passed" in rows["good"] and rows["good"].endswith("two figures")
    assert "FAILED" in rows["bad"] and "FAILED" in rows["hangs"] and "FAILED" in rows["absent"]
    assert "passed" in rows["advice"] and "passed" in rows["last"] and rows["last"].endswith("11")
    reasons = {name: record["reason"] for name, record in records(tmp_path / "out").items()}
    assert reasons["good"] is reasons["advice"] is None and reasons["bad"].startswith("exit code 3")
    assert reasons["hangs"] == "past its limit of 1 s" and reasons["absent"] == "the tool is not installed"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.log", "summary.json"}
    log = (tmp_path / "out/gpu_check.log").read_text()
    assert "also run" in log and "exit code 9" in log and log.count("=== ") == len(chosen)


def test_what_passed_before_is_not_run_again(tmp_path, capfd):
    out, count = tmp_path / "out", tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); print('figure')"
    runs = lambda about, **options: runner.run_stages([stage("one", code)], out, about, **options)  # noqa: E731
    assert runs(ABOUT) and runs(ABOUT, again=False)
    assert len(count.read_text()) == 1 and "passed before: figure" in capfd.readouterr().out
    for position, about in enumerate((ABOUT | {"sources": "other"}, ABOUT | {"gpu": "another"}), 2):
        assert runs(about, again=False) and len(count.read_text()) == position
    assert runs(ABOUT | {"gpu": "another"}) and len(count.read_text()) == 4  # named, so it runs


def test_stages_past_the_budget_are_skipped_by_name(tmp_path, capfd):
    chosen = [stage("first", "print('x')"), stage("second", "print('x')")]
    assert not runner.run_stages(chosen, tmp_path, ABOUT, seconds=5)
    found = records(tmp_path)
    assert found["first"]["passed"] is found["second"]["passed"] is None
    assert found["second"]["reason"] == "skipped: the 5 s for all stages are used up"
    assert "second       skipped" in capfd.readouterr().out


def test_figures_and_logs_are_joined_and_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "STAGE_LOG_CHARACTERS", 200)
    code = "print('x' * 5000); open({!r}, 'w').write('{{\"a\": {}}}')"
    for value in (1, 2):
        path = str(tmp_path / f"running/part{value}.json")
        assert runner.run_stages([stage(f"s{value}", code.format(path, value))], tmp_path, ABOUT)
    assert json.loads((tmp_path / "figures.json").read_text()) == {"s1": {"part1": {"a": 1}}, "s2": {"part2": {"a": 2}}}
    assert len((tmp_path / "gpu_check.log").read_text()) < 600 and not (tmp_path / "running").exists()


def test_the_hash_follows_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/a.py").write_text("1")
    first = runner.source_hash()
    (tmp_path / "tests/figures.json").write_text("1")
    assert runner.source_hash() == first
    (tmp_path / "tests/a.py").write_text("2")
    assert runner.source_hash() != first


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(gpu_check.app, [])
    assert result.exit_code == 2
    assert result.output.splitlines() == ["gpu-check needs a GPU: torch sees no CUDA device here"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--stage", "build,fast"), "stage: got 'fast', expected all or some of build, smoke, gpu-tests"),
        (("--seconds", "0"), "seconds: got 0, expected more than 0"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    result = CliRunner().invoke(gpu_check.app, ["--dry-run", *arguments])
    assert result.exit_code == 2 and message in result.output


def test_make_hands_its_variables_on():
    variables = ["PYTHON=py", "STAGE=micro", "OUT=here", "MODEL=m", "PREDICTOR=p", "SECONDS=500"]
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = "py benchmarks/gpu_check.py --stage micro --out here --model m --predictor p --seconds 500"
    assert shown.stdout.strip() == wanted


def test_the_key_figures_of_logs(tmp_path):
    log = "....\n12 passed, 3 deselected in 1.20s\nF\n1 failed, 2 passed in 3s\n"
    assert figures.tests(tmp_path, log) == "12 passed, 3 deselected in 1.20s; 1 failed, 2 passed in 3s"
    log = "$ s --tool memcheck x\n== ERROR SUMMARY: 0 errors\n$ s --tool racecheck x\n"
    log += "$ s --tool initcheck x\n== ERROR SUMMARY: 2 errors\n"
    assert figures.sanitizer(tmp_path, log) == "memcheck 0, racecheck no summary, initcheck 2"


def test_the_key_figures_of_microbenchmarks(tmp_path):
    entry = {"op": "linear", "case": "c", "kind": "implementation", "implementation": "triton", "status": "ok"}
    timed = {"microseconds": {"median": 2.0}, "share_of_floor": 0.5, "speedup": {"reference": {"median": 3.0}}}
    entries = [entry | timed, entry | {"op": "draft_tree", "status": "wrong"}]
    (tmp_path / "micro.json").write_text(json.dumps({"entries": entries}))
    assert figures.micro(tmp_path, "") == "linear 50%-50% of floor, 3.00-3.00x; draft_tree wrong"


def test_the_key_figures_of_runs(tmp_path):
    assert (
        figures.end_to_end(tmp_path, "x\nerror: model: the wheel is not there\n")
        == "error: model: the wheel is not there"
    )
    methods = {
        "ar": {"tokens_per_second": {"median": 60.0}},
        "firp": {"tau": 2.5, "speedup_vs_ar": {"median": 1.5}, "tokens_per_second": {"median": 90.0}},
    }
    (tmp_path / "a.json").write_text(json.dumps({"methods": methods, "settings": {"tree": {"N": 6, "P": 2}}}))
    assert figures.end_to_end(tmp_path, "") == "(6, 2) 1.50x plain, tau 2.50, ar 60 tokens/s, firp 90 tokens/s"
    steps = [
        {
            "context": 1024,
            "num_nodes": nodes,
            "num_lookahead": lookahead,
            "rows": rows,
            "step_ms": {"median": 6.0},
            "bandwidth_share": 0.75,
            "break_even_tau": {"median": tau},
        }
        for nodes, lookahead, rows, tau in ((1, 0, 1, 1.0), (16, 16, 64, 1.1), (4, 2, 10, 1.05))
    ]
    document = {"random_weights": "tiny", "steps": steps, "settings": {"num_offsets": 3}}
    document |= {"copy_bandwidth_bytes_per_second": 4.195e12, "environment": {"device": "some CPU"}}
    (tmp_path / "a.json").write_text(json.dumps(document))
    shown = "tiny 1024: plain 6.00 ms (75% of bandwidth), 1.05x at 10 rows, 1.10x at 64 rows"
    assert figures.step_cost(tmp_path, "") == shown
    document |= {"random_weights": "llama3-8b", "environment": {"device": "NVIDIA H200"}}
    (tmp_path / "a.json").write_text(json.dumps(document))
    shown = (
        "llama3-8b 1024: plain 6.00 ms (75% of bandwidth) [4.21], 1.05x [1.01x] at 10 rows, 1.10x [1.01x] at 64 rows"
    )
    assert figures.step_cost(tmp_path, "") == shown
