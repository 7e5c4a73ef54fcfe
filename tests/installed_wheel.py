"""An installed wheel beside torch: `make check-wheels` runs this file in an environment that has nothing else."""

import shutil
import sys
from pathlib import Path

import torch

import firp_kernels
from firp_kernels import ops, registry

assert shutil.which("c++") is None, "a compiler is on the path: this is no bare environment"
extension, reason = registry.load_extension()
assert extension is not None, reason
assert Path(extension.__file__).is_relative_to(sys.prefix), extension.__file__

built = extension.registered_ops()["cpu"]
assert set(built) <= set(ops.SCHEMAS) and "linear" in built, built
assert {registry.owner(name, "cpu") for name in built} == {"extension"}

rows, weight = (torch.randint(-4, 5, shape).float() for shape in ((3, 512), (4096, 512)))
assert torch.equal(firp_kernels.linear(rows, weight), rows @ weight.T)  # whole numbers: no sum is rounded
# Parallel code ran in torch and in the extension. Two OpenMP runtimes would have started threads of their own.
maps = Path("/proc/self/maps").read_text().splitlines()
runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
assert len(runtimes) == 1, runtimes
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {len(built)} ops, OpenMP of {runtimes.pop()}")
