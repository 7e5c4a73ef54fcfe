"""Run a script's command, and a check that several have."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.console import Console


def run(main: Callable[..., None]) -> None:
    """Run `main` as a command line; an error that a user can mend is one line, and the exit code 2."""
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        app()
    except SystemExit as end:
        if end.code == 130:
            print("stopped; the same command goes on with what is kept", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {text}", markup=False)
        sys.exit(2)


def check_length(max_new_tokens: int) -> None:
    """Refuse answers of no token."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
