"""The command `firp`: one clear line for an error, exit code 2."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from firp.cli.bench import bench
from firp.cli.chat import chat
from firp.cli.doctor import doctor
from firp.cli.generate import generate
from firp.cli.train import distill, train
from firp.cli.tune import tune

app = typer.Typer(
    help="FIRP speculative decoding for LLaMA-family models: the model's own output, in fewer forwards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, chat, distill, train, tune, bench, doctor):
    app.command()(command)


def run() -> None:
    """Entry point: errors a user can mend are one line, others keep their traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; finished work is kept")
        sys.exit(130)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return escape(" ".join(lines) or type(error).__name__)
