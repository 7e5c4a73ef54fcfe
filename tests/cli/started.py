"""Processes forked from a server that has imported the package: a start takes no seven seconds of imports."""

import multiprocessing
import os
import runpy
import sys
from multiprocessing import util
from pathlib import Path
from unittest import mock

import firp.cli.main  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")
# Where the server's socket will be: a test's own TMPDIR is too long for the name of one.
util.get_temp_dir()


def start(function, *arguments):
    """A process that runs a function of a module under today's environment; the server's own is an older one."""
    CONTEXT.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process = CONTEXT.Process(target=_run, args=(dict(os.environ), function, *arguments), daemon=True)
        process.start()
    return process


def start_firp(output: Path, *arguments):
    """`python -m firp` with arguments; its stdout and stderr are files of `output`."""
    return start(_firp, output, *map(str, arguments))


def _run(environment: dict[str, str], function, *arguments) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _firp(output: Path, *arguments: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["firp", *arguments]
    runpy.run_module("firp", run_name="__main__", alter_sys=True)
