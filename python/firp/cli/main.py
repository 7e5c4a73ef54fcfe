"""The command `firp`: one clear line for an error, exit code 2; one for Ctrl-C, exit code 130."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from firp.cli.bench import bench
from firp.cli.chat import chat
from firp.cli.doctor import doctor
from firp.cli.export import export, push
from firp.cli.generate import generate
from firp.cli.train import distill, train
from firp.cli.tune import tune
from firp.tools.hardware import is_out_of_memory
from firp.tools.ranks import launched_rank, launched_ranks, leave
from firp_kernels import cpu_isa

INTERRUPTED = 130

app = typer.Typer(
    help="FIRP speculative decoding for LLaMA-family models: the model's own output, in fewer forwards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, chat, distill, train, tune, export, push, bench, doctor):
    app.command()(command)


def run() -> None:
    """Entry point: errors a user can mend are one line, others keep their traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (lives as long as the process)
    try:
        try:
            cpu_isa()  # before any work: FIRP_CPU_ISA may name no instruction set
            app()
        finally:
            _flush()
    except SystemExit as end:
        if not end.code:
            leave()
        if end.code == INTERRUPTED:
            _say("interrupted; finished work is kept")
        raise
    except Exception as error:
        if is_out_of_memory(error):
            _fail(f"out of memory: {_plain(error)}; `firp doctor --model MODEL` prints what is needed")
        if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)):
            _fail(_plain(error))
        raise


def _flush() -> None:
    """Write out what is left for stdout; a reader that is gone ends quietly, as between other commands in a pipe."""
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes once more at its end)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise OSError(f"cannot write to standard output: {error.strerror}") from error


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def _fail(text: str) -> None:
    rank = f" (rank {launched_rank()})" if launched_ranks() > 1 else ""
    _say(f"[bold red]error:[/]{rank} {text}")
    sys.exit(2)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return escape(" ".join(lines) or type(error).__name__)
