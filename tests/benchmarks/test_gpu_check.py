"""`make gpu-check` as far as it goes without a GPU: arguments, stages that pass, fail and hang, the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu_check
from benchmarks.gpu_check import Stage

ROOT = Path(__file__).parents[2]


def python(code):
    return [sys.executable, "-c", code]


def first_line(_out, log):
    return log.splitlines()[1]


def test_the_stages_and_their_files(tmp_path):
    stages = gpu_check.stages(tmp_path, "model", "predictor")
    assert [stage.name for stage in stages] == ["build", "tests", "sanitizer", "micro", "e2e"]
    assert all(stage.seconds <= 600 for stage in stages)
    words = [word for stage in stages for command in stage.commands for word in command]
    written = {Path(word).name for word in words if word.startswith(str(tmp_path))}
    assert written == {"micro.json", "bench.json"}
    assert len(written) + len(stages) + len({"summary.json"}) <= 8
    for script in ("benchmarks/run.py", "setup.py"):
        assert script in words and (ROOT / script).is_file()


def test_a_failing_stage_does_not_stop_the_next(tmp_path, capfd):
    stages = [
        Stage("good", [python("print('two figures')")], first_line),
        Stage("bad", [python("print('seen'); raise SystemExit(3)"), python("print('also run')")], lambda out, log: log.splitlines()[-1]),
        Stage("hangs", [["sleep", "600"]], first_line, seconds=0.3),
        Stage("absent", [["never-run"]], first_line, missing="the tool is not installed"),
        Stage("last", [python("import os, firp_kernels; print(os.environ['LEVEL'])")], first_line, {"LEVEL": "11"}),
    ]
    assert not gpu_check.run_stages(stages, tmp_path / "out", {"gpu": "none"})
    printed = capfd.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in printed[-8:]}
    assert "passed" in rows["good"] and "two figures" in rows["good"]
    assert "FAILED" in rows["bad"] and "also run" in rows["bad"]
    assert "FAILED" in rows["hangs"] and "FAILED" in rows["absent"]
    assert "passed" in rows["last"] and rows["last"].endswith("11")
    records = json.loads((tmp_path / "out/summary.json").read_text())["stages"]
    reasons = {record["stage"]: record["reason"] for record in records}
    assert reasons["good"] is None and reasons["bad"].startswith("exit code 3")
    assert reasons["hangs"] == "past its limit of 0.3 s" and reasons["absent"] == "the tool is not installed"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{s.name}.log" for s in stages} | {"summary.json"}


def test_passing_stages_pass(tmp_path):
    assert gpu_check.run_stages([Stage("good", [python("print(1)")], first_line)], tmp_path, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(gpu_check.app, [])
    assert result.exit_code == 2 and result.output.splitlines() == ["gpu-check needs a GPU: torch sees no CUDA device here"]


def test_an_unknown_stage_is_refused():
    result = CliRunner().invoke(gpu_check.app, ["--stage", "fast"])
    assert result.exit_code == 2 and "stage: got 'fast', expected all or one of build, tests" in result.output


def test_make_hands_its_variables_on():
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "PYTHON=py", "STAGE=micro", "OUT=here", "MODEL=m", "PREDICTOR=p"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == "py benchmarks/gpu_check.py --stage micro --out here --model m --predictor p"


def test_the_key_figures_of_logs(tmp_path):
    assert gpu_check._tests(tmp_path, "....\n12 passed, 3 deselected in 1.20s\nF\n1 failed, 2 passed in 3s\n") == "12 passed, 3 deselected in 1.20s; 1 failed, 2 passed in 3s"
    log = "$ s --tool memcheck x\n===== ERROR SUMMARY: 0 errors\n$ s --tool racecheck x\n$ s --tool initcheck x\n===== ERROR SUMMARY: 2 errors\n"
    assert gpu_check._sanitizer(tmp_path, log) == "memcheck 0, racecheck no summary, initcheck 2"
    entry = {"op": "linear", "case": "c", "kind": "implementation", "implementation": "triton", "status": "ok"}
    figures = {"microseconds": {"median": 2.0}, "share_of_floor": 0.5, "speedup": {"reference": {"median": 3.0}}}
    (tmp_path / "micro.json").write_text(json.dumps({"entries": [entry | figures, entry | {"op": "draft_tree", "status": "wrong"}]}))
    assert gpu_check._micro(tmp_path, "") == "linear 50%-50% of floor, 3.00-3.00x; draft_tree wrong"
    methods = {"firp": {"tau": 2.5, "speedup_vs_ar": {"median": 1.5}, "tokens_per_second": {"median": 90.0}}}
    (tmp_path / "bench.json").write_text(json.dumps({"methods": methods}))
    assert gpu_check._bench(tmp_path, "") == "firp 1.50x plain, tau 2.50, firp 90.0 tokens/s"
