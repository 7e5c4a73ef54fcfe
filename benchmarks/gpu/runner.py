"""Runs stages one after the other and keeps what they showed: three files for any number of stages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("benchmarks", "csrc", "firp_kernels", "python", "tests", "setup.py", "pyproject.toml")
PARTS, LOG, SUMMARY, FIGURES = "running", "gpu_check.log", "summary.json", "figures.json"
# A stage that would get less is not begun.
LEAST_SECONDS = 10
# What a stopped command gets to print what it has.
GRACE_SECONDS = 5
STAGE_LOG_CHARACTERS, LOG_CHARACTERS = 1 << 20, 8 << 20


def source_hash() -> str:
    """A hash of the code: it changes with a commit and with an edit, and needs no git."""
    found = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            text = file.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".txt", ".toml")
            if text and file.is_file() and "results" not in file.parts:
                found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def commit() -> str | None:
    """The commit of the tree; None where there is no git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def run_stages(
    chosen: Iterable[Stage], out: Path, about: dict, seconds: float = float("inf"), again: bool = True
) -> bool:
    """Run stages, write `out` after each, print the table; whether all passed.

    Args:
        out: gets SUMMARY (a record a stage), FIGURES (their JSON documents) and LOG.
        about: what the figures are measured on. What it says of "sources" and "gpu" decides what has passed before.
        seconds: for all stages together. Stages past it are skipped, by name.
        again: also run what has passed before.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, records = time.monotonic(), _read(out / SUMMARY, {}).get("stages", [])
    shown = []
    for stage in chosen:
        passed = next((r for r in records if r["stage"] == stage.name and r["passed"] and _same(r, about)), None)
        if passed and not again:
            shown.append(passed | {"key": f"passed before: {passed['key']}"})
            continue
        left = seconds - (time.monotonic() - began)
        if left < LEAST_SECONDS:
            shown.append(_record(stage, None, 0.0, "", f"skipped: the {seconds:g} s for all stages are used up"))
        else:
            limit = min(stage.seconds, left)
            print(f"{stage.name}: running, at most {limit:.0f} s", flush=True)
            shown.append(run_stage(stage, out, limit))
        shown[-1] |= {name: about.get(name) for name in ("sources", "gpu", "date")}
        if not (passed and shown[-1]["passed"] is None):
            records = [record for record in records if record["stage"] != stage.name] + [shown[-1]]
        _write(out / SUMMARY, {"environment": about, "stages": records})
    print(table(shown))
    return all(record["passed"] for record in shown)


def _same(record: dict, about: dict) -> bool:
    return all(record.get(name) == about.get(name) for name in ("sources", "gpu"))


def run_stage(stage: Stage, out: Path, seconds: float) -> dict:
    """Run one stage; its record: name, passed, seconds, key figures and, where it failed, the reason.

    While it runs, its log and figures are in out/running, so that they survive an interruption from outside.
    """
    began, parts = time.monotonic(), out / PARTS
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    reason = stage.missing
    with (parts / "log.txt").open("w") as log:
        log.write(f"=== {stage.name}\n")
        for command in () if reason else stage.commands:
            log.write(f"$ {' '.join(command.arguments)}\n")
            log.flush()
            code = _run(command.arguments, log, stage.environment, seconds - (time.monotonic() - began))
            failure = f"exit code {code}: {Path(command.arguments[0]).name} {' '.join(command.arguments[1:4])}"
            if code is None:
                failure = f"past its limit of {seconds:.3g} s"
            if code != 0 and command.decides:
                reason = reason or failure
            elif code != 0:
                log.write(f"{failure}; this does not decide\n")
            if code is None:
                break
    text = (parts / "log.txt").read_text(errors="replace")
    try:
        key = stage.key(parts, text)
    except (OSError, ValueError, KeyError, IndexError, StopIteration) as error:
        key = f"no figures ({type(error).__name__})"
    _keep(stage, out, parts, text)
    return _record(stage, reason is None, time.monotonic() - began, key, reason)


def _record(stage: Stage, passed: bool | None, seconds: float, key: str, reason: str | None) -> dict:
    """passed: None where the stage was not run."""
    return {"stage": stage.name, "passed": passed, "seconds": round(seconds, 1), "key": key, "reason": reason}


def _keep(stage: Stage, out: Path, parts: Path, text: str) -> None:
    """Join the stage's log and figures to those of the others."""
    figures = _read(out / FIGURES, {})
    made = {path.stem: _read(path, None) for path in sorted(parts.glob("*.json"))}
    if made:
        _write(out / FIGURES, figures | {stage.name: made})
    if len(text) > STAGE_LOG_CHARACTERS:
        half = STAGE_LOG_CHARACTERS // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    before = (out / LOG).read_text(errors="replace") if (out / LOG).exists() else ""
    (out / LOG).write_text((before + text)[-LOG_CHARACTERS:])
    shutil.rmtree(parts)


def _run(command: list[str], log, environment: dict[str, str], seconds: float) -> int | None:
    """Exit code of a command in the repository, or None where it was stopped at its limit with all its children."""
    paths = {"PYTHONPATH": [str(ROOT), str(ROOT / "python")], "PATH": [str(Path(sys.executable).parent)]}
    joined = {name: os.pathsep.join([*first, os.environ.get(name, "")]).rstrip(":") for name, first in paths.items()}
    fixed = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | fixed | joined | environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Wait a little, then end what is left of the command and its children."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path, default):
    """A JSON file; the default where there is none, or a broken one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def _write(path: Path, document: dict) -> None:
    staging = path.with_name(f".{path.name}")
    staging.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(staging, path)


def table(records: list[dict]) -> str:
    """A line a stage, its reason below it where it did not pass."""
    lines = [f"{'stage':12} {'result':7} {'seconds':>8}  key figures"]
    for record in records:
        result = {True: "passed", False: "FAILED", None: "skipped"}[record["passed"]]
        lines.append(f"{record['stage']:12} {result:7} {record['seconds']:8.1f}  {record['key']}")
        if record["reason"]:
            lines.append(f"{'':30}{record['reason']}")
    return "\n".join(lines)
