"""A tiny model with a tokenizer in a folder, and a predictor for it."""

import sys
from pathlib import Path

import pytest

from benchmarks.gpu import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny_model.write(root)
    return root


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `firp` with arguments; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from firp.cli.main import run as entry

        monkeypatch.setattr(sys, "argv", ["firp", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            entry()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
