"""`make gpu-check`: build, tests, sanitizer, microbenchmarks and the end-to-end bench on a machine with a GPU.

Every stage runs in its own process with a time limit, and a failing stage does not stop the next. The current Python
is used as it is: nothing is downloaded, no virtual environment is made. Exit code: 0, 1 where a stage failed, 2 for a
bad argument or without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/gpu"
STAGE_SECONDS = 600
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Stage:
    """Commands of one stage, all run within its limit; key(out, log) is what the table shows of it.

    missing says why the stage cannot run on this machine: it then counts as failed, since nothing was shown.
    """

    name: str
    commands: list[list[str]]
    key: Callable[[Path, str], str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = STAGE_SECONDS
    missing: str | None = None


def stages(out: Path, model: str, predictor: str | None) -> list[Stage]:
    """The stages of `make gpu-check`, in order."""
    python = [sys.executable]
    runner = [*python, "benchmarks/run.py", "--device", "cuda"]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    check = [*runner, "--shapes", "tiny", "--check-only"]
    owners = "import benchmarks.gpu_check as g; g.print_owners()"
    memcheck = [str(sanitizer), "--error-exitcode", "9", "--print-limit", "20"]
    bench = [*python, "-m", "firp", "bench", "--device", "cuda", "--model", model, "--limit", "8"]
    return [
        Stage(
            "build", [[*python, "setup.py", "build_ext", "--inplace"], [*python, "-c", owners]],
            _last_line, {"FIRP_BUILD": "cuda" if shutil.which("nvcc") and torch.version.cuda else "cpu"},
        ),
        Stage(
            "tests", [[*python, "-m", "pytest", "-p", "no:cacheprovider", "-rf", "-m", "gpu", "tests"],
                      [*python, "-m", "pytest", "-p", "no:cacheprovider", "-rf", "-m", "not gpu", "tests/kernels"]],
            _tests,
        ),
        Stage(
            "sanitizer",
            [[*memcheck, "--tool", tool, *check] for tool in SANITIZERS],
            _sanitizer,
            # Every tensor its own allocation: an access past its end, or of what nobody wrote, cannot hide in a pool.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            missing=None if sanitizer else "compute-sanitizer is not installed",
        ),
        Stage("micro", [[*runner, "--json", str(out / "micro.json")]], _micro),
        Stage(
            "e2e",
            [[*bench, *(["--predictor", predictor] if predictor else []), "--json", str(out / "bench.json")]],
            _bench,
        ),
    ]  # fmt: skip


def run_stage(stage: Stage, out: Path) -> dict:
    """Run one stage, its output in out/NAME.log; its record: name, passed, seconds, key figures or the reason."""
    begin = time.monotonic()
    path = out / f"{stage.name}.log"
    reason = stage.missing
    with path.open("w") as log:
        for command in () if reason else stage.commands:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            code = _run(command, log, stage.environment, stage.seconds - (time.monotonic() - begin))
            if code is None:
                reason = reason or f"past its limit of {stage.seconds:g} s"
                break
            if code:
                reason = reason or f"exit code {code}: {Path(command[0]).name} {' '.join(command[1:4])}"
    text = path.read_text(errors="replace")
    try:
        key = stage.key(out, text)
    except (OSError, ValueError, KeyError, IndexError) as error:
        key = f"no figures ({type(error).__name__})"
    return {
        "stage": stage.name,
        "passed": reason is None,
        "seconds": round(time.monotonic() - begin, 1),
        "key": key,
        "reason": reason,
    }


def _run(command: list[str], log, environment: dict[str, str], seconds: float) -> int | None:
    """Exit code of a command in the repository, or None where it was stopped at its limit with all its children."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    settings = os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def print_owners() -> None:
    """The owner of each op on CUDA; run in a process of its own, after the build."""
    from firp_kernels import ops, registry

    owners = {name: registry.owner(name, "cuda") for name in ops.SCHEMAS}
    print(
        "; ".join(
            f"{impl}: {', '.join(n for n in owners if owners[n] == impl)}" for impl in sorted(set(owners.values()))
        )
    )


def _last_line(_out: Path, log: str) -> str:
    return log.strip().splitlines()[-1]


def _tests(_out: Path, log: str) -> str:
    return (
        "; ".join(
            re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error|deselected)[^=\n]*?)\s*=*$", log, re.MULTILINE)
        )
        or "no test ran"
    )


def _sanitizer(_out: Path, log: str) -> str:
    parts = []
    for tool in SANITIZERS:
        own = log.partition(f"--tool {tool} ")[2].partition("\n$ ")[0]
        found = re.search(r"SUMMARY: (\d+) (?:error|hazard)", own)
        parts.append(f"{tool} {found[1] if found else 'no summary'}")
    return ", ".join(parts)


def _micro(out: Path, _log: str) -> str:
    """Per op: share of the floor of our implementation and its speedup over the fastest alternative, worst to best."""
    from benchmarks.report import fastest_alternative

    entries = json.loads((out / "micro.json").read_text())["entries"]
    parts = []
    for op in dict.fromkeys(entry["op"] for entry in entries):
        ours = [
            e for e in entries if e["op"] == op and e["kind"] == "implementation" and e["implementation"] != "reference"
        ]
        timed = [e for e in ours if "microseconds" in e]
        if len(timed) < len(ours):
            parts.append(f"{op} {next(e['status'] for e in ours if e not in timed)}")
        elif timed:
            shares = sorted(e["share_of_floor"] for e in timed)
            ratios = sorted(e["speedup"][fastest_alternative(e, entries)]["median"] for e in timed)
            parts.append(f"{op} {shares[0]:.0%}-{shares[-1]:.0%} of floor, {ratios[0]:.2f}-{ratios[-1]:.2f}x")
    return "; ".join(parts) or "no kernel of ours was timed"


def _bench(out: Path, _log: str) -> str:
    methods = json.loads((out / "bench.json").read_text())["methods"]
    parts = [f"{name} {entry['tokens_per_second']['median']:.1f} tokens/s" for name, entry in methods.items()]
    firp = methods["firp"]
    return ", ".join([f"firp {firp['speedup_vs_ar']['median']:.2f}x plain, tau {firp['tau']:.2f}", *parts])


def run_stages(chosen: list[Stage], out: Path, about: dict) -> bool:
    """Run stages one after the other, write out/summary.json, print the table; whether all passed."""
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for stage in chosen:
        print(f"{stage.name}: running, at most {stage.seconds:g} s, log in {out / stage.name}.log", flush=True)
        records.append(run_stage(stage, out))
        (out / "summary.json").write_text(json.dumps({"environment": about, "stages": records}, indent=1) + "\n")
    print(table(records))
    return all(record["passed"] for record in records)


def table(records: list[dict]) -> str:
    lines = [f"{'stage':10} {'result':7} {'seconds':>8}  key figures"]
    for record in records:
        result = "passed" if record["passed"] else "FAILED"
        lines.append(f"{record['stage']:10} {result:7} {record['seconds']:8.1f}  {record['key']}")
        if record["reason"]:
            lines.append(f"{'':28}{record['reason']}")
    return "\n".join(lines)


@app.command()
def main(
    stage: Annotated[str, typer.Option(help="all, or one of build, tests, sanitizer, micro, e2e.")] = "all",
    out: Annotated[Path, typer.Option(help="Folder of JSON and logs, at most eight files.")] = RESULTS,
    model: Annotated[
        str, typer.Option(help="Model of the end-to-end bench: a folder, a hub id, or smollm2-135m.")
    ] = "smollm2-135m",
    predictor: Annotated[
        str | None, typer.Option(help="Its predictor; default: the one shipped for the model.")
    ] = None,
) -> None:
    """Check this tree on a machine with a GPU, in stages of at most ten minutes each."""
    out = out.resolve()
    known = stages(out, model, predictor)
    names = [one.name for one in known]
    if stage != "all" and stage not in names:
        print(f"stage: got {stage!r}, expected all or one of {', '.join(names)}", file=sys.stderr)
        raise typer.Exit(2)
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU: torch sees no CUDA device here", file=sys.stderr)
        raise typer.Exit(2)
    chosen = [one for one in known if stage in ("all", one.name)]
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if not run_stages(chosen, out, about):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    app()
