"""Forks, from one process that has loaded torch but not the kernels, a process for each line of stdin.

A line is JSON: the cap on the instructions or null, "firp" or "pytest", its arguments, and the folder of its stdout and
stderr. The exit code comes back on stdout.
"""

import json
import os
import runpy
import sys
import traceback

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import transformers.generation
import transformers.models.llama.modeling_llama  # noqa: F401


def name() -> None:
    import firp_kernels

    print(firp_kernels.cpu_isa())


def calls() -> None:
    import firp_kernels

    for call in (lambda: firp_kernels.linear(torch.ones(1, 4), torch.ones(4, 4)), firp_kernels.cpu_isa):
        try:
            call()
        except ValueError as error:
            print(error)


def run(cap: str | None, what: str, arguments: list[str], folder: str) -> None:
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if cap is not None:
        os.environ["FIRP_CPU_ISA"] = cap
    if what in OWN:
        return OWN[what]()
    sys.argv = [what, *arguments]
    runpy.run_module(what, run_name="__main__", alter_sys=True)


OWN = {"name": name, "calls": calls}


def main() -> None:
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
                run(*json.loads(line))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
