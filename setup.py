"""Builds the extension of firp_kernels where a compiler is at hand; without one the package installs as pure Python.

FIRP_BUILD=cpu|cuda|none overrides what is built. By default the CPU part is always tried, the CUDA part where nvcc and
a CUDA build of torch are present; whether a GPU is visible does not matter. FIRP_CUDA_ARCHITECTURES, such as 90 or
80,90, replaces the architectures that CUDA code is built for.

An extension serves the torch it is built with, any patch release of it, and every Python from 3.10 on. Its name says
which torch, and the package then requires that torch.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("cpu", "cuda", "none")
CUDA_ARCHITECTURES = "80,90,100"
OLDEST_TORCH = "torch>=2.10"
DEPENDENCIES = [
    "triton>=3.6; platform_system == 'Linux'",
    "transformers>=5.0",
    "huggingface_hub>=1.0",
    "safetensors",
    "numpy",
    "typer>=0.16",
    "rich",
    "tqdm",
]


def notice(text: str) -> None:
    print(f"firp_kernels: {text}", file=sys.stderr)


def read_sources() -> dict[str, dict[str, str]]:
    """{device: {op: source file}} of csrc/sources.txt."""
    table: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {}}
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            device, op, source = line.split()
            table[device][op] = source
    return table


def wanted() -> str:
    """What to build: the choice in FIRP_BUILD, or what the machine's tools allow."""
    choice = os.environ.get("FIRP_BUILD")
    if choice is not None and choice not in CHOICES:
        raise SystemExit(f"FIRP_BUILD: got {choice!r}, expected one of {', '.join(CHOICES)}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        if choice in ("cpu", "cuda"):
            raise SystemExit(f"FIRP_BUILD={choice} needs Python's stable ABI, which a free-threaded Python has not")
        notice("a free-threaded Python has no stable ABI: installing without the extension")
        return "none"
    try:
        import torch
    except ImportError:
        if choice in ("cpu", "cuda"):
            raise SystemExit(
                f"FIRP_BUILD={choice} needs torch at build time: pip install --no-build-isolation"
            ) from None
        if choice is None:
            notice(
                "torch is not importable while building, so no extension is built (pip install --no-build-isolation)"
            )
        return "none"
    can_cuda = bool(torch.version.cuda) and nvcc().is_file()
    if choice == "cuda" and not can_cuda:
        missing = (
            f"nvcc, not found at {nvcc()} (set CUDA_HOME)"
            if torch.version.cuda
            else f"a CUDA build of torch, found {torch.__version__}"
        )
        raise SystemExit(f"FIRP_BUILD=cuda needs {missing}")
    if choice is not None:
        return choice
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        notice("no C++ compiler found: installing without the extension; the torch reference runs every op on a CPU")
        return "none"
    return "cuda" if can_cuda else "cpu"


def nvcc() -> Path:
    from torch.utils import cpp_extension

    return Path(cpp_extension.CUDA_HOME or "/usr/local/cuda") / "bin/nvcc"


def architecture_flags() -> list[str]:
    """Machine code for the architectures, and PTX of the last for later ones.

    Of the default ones those that nvcc does not know are left out; one that was asked for and is unknown is an error.
    """
    asked = os.environ.get("FIRP_CUDA_ARCHITECTURES")
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    numbers = [number.strip() for number in (asked or CUDA_ARCHITECTURES).split(",")]
    unknown = [number for number in numbers if f"sm_{number}" not in listed]
    if asked and unknown:
        known = ", ".join(sorted(name.removeprefix("sm_") for name in listed))
        raise SystemExit(f"FIRP_CUDA_ARCHITECTURES: got {unknown[0]!r}, expected some of {known}")
    known = [number for number in numbers if number not in unknown]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def extensions(choice: str) -> dict:
    if choice == "none":
        return {"install_requires": [OLDEST_TORCH, *DEPENDENCIES]}
    import torch
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """A compiler error leaves a pure-Python install, unless FIRP_BUILD asked for the extension."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable install would build in a folder that is removed, and compile everything each time.
            self.build_temp = str(ROOT / "build/objects")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if "FIRP_BUILD" in os.environ:
                    raise
                notice(f"the extension did not compile and is left out: {error}")
                self.extensions = []

    table = read_sources()
    if choice == "cpu":
        table["cuda"] = {}
    names = {device: ",".join(f'"{op}"' for op in ops) for device, ops in table.items()}
    cuda_version = torch.version.cuda if choice == "cuda" else ""
    # Flags of the C++ compiler, not macros of the extension: nvcc takes lists and quotes in macros apart.
    macros = {
        "FIRP_CPU_OPS": names["cpu"],
        "FIRP_CUDA_OPS": names["cuda"],
        "FIRP_TORCH_VERSION": f'"{torch.__version__}"',
        "FIRP_CUDA_VERSION": f'"{cuda_version}"',
    }
    flags = {
        "cxx": [
            "-O3",
            "-g0",  # Python's own flags ask for debug information: a quarter of the time, and 30 MB
            "-std=c++20",
            "-fopenmp",
            "-ffp-contract=off",
            f"-ffile-prefix-map={ROOT}=.",
            "-include",
            str(ROOT / "csrc/old_glibc.h"),
            *(f"-D{name}={value}" for name, value in macros.items()),
        ]
    }
    make = cpp_extension.CppExtension
    if choice == "cuda":
        make = cpp_extension.CUDAExtension
        flags["nvcc"] = ["-O3", "-std=c++20", *architecture_flags()]
    sources = sorted({source for ops in table.values() for source in ops.values()})
    name = runpy.run_path(str(ROOT / "firp_kernels/version.py"))["extension_name"](torch.__version__)
    extension = make(
        f"firp_kernels.{name}",
        ["csrc/module.cpp", *sources],
        include_dirs=[str(ROOT / "csrc/include")],
        extra_compile_args=flags,
        # GCC's helpers for 16-bit numbers, from its archive: a machine with an older libgcc_s has not all of them.
        extra_link_args=["-lgcc"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        "install_requires": [torch_requirement(torch.__version__), *DEPENDENCIES],
    }


def torch_requirement(version: str) -> str:
    """What an extension built with this torch needs: no minor release keeps the C++ ABI of another."""
    major, minor = version.split(".")[:2]
    return f"torch=={major}.{minor}.*"


setup(**extensions(wanted()))
