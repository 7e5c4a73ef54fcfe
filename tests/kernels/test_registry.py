"""An implementation that is not there is refused by name."""

import os
import subprocess
import sys

import pytest
import torch

import firp_kernels as kernels
from firp_kernels import registry
from firp_kernels.ops import verify_tree
from firp_kernels.version import extension_name


def test_unknown_implementation():
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        kernels.linear(torch.zeros(1, 2), torch.zeros(3, 2), impl="fast")


def test_bind_names_what_it_cannot_give():
    with pytest.raises(ValueError, match="impl: got op 'attention', expected one of write_cache"):
        kernels.bind({"attention": "triton"})
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        kernels.bind({"linear": "fast"})
    with pytest.raises(ValueError, match="op 'draft_tree' has no 'triton' implementation"):
        kernels.bind({"draft_tree": "triton"})
    with pytest.raises(ValueError, match="has no 'triton' implementation"):
        kernels.bind("triton")
    mixed = kernels.bind({"verify_tree": "reference"})
    assert mixed.verify_tree is verify_tree.reference and mixed.linear is torch.ops.firp.linear.default


def test_triton_kernels_refuse_a_cpu_outside_the_interpreter():
    program = (
        "import torch, firp_kernels\n"
        "try:\n"
        "    args = torch.zeros(1, 1, 8), torch.zeros(1, 8, 8), torch.zeros(1, 1).int()\n"
        "    firp_kernels.predictor_projection(*args, impl='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("hidden: is on cpu, expected a CUDA device"), done.stdout + done.stderr


ANOTHER_TORCH = """
import warnings, torch
torch.__version__ = "2.99.1"
with warnings.catch_warnings(record=True) as caught:
    import firp_kernels
print(len(caught), caught[0].message)
print({firp_kernels.registry.owner(name, "cpu") for name in firp_kernels.ops.SCHEMAS}, firp_kernels.cpu_isa())
print(firp_kernels.linear(torch.ones(1, 2), torch.ones(3, 2)).tolist())
"""


@pytest.mark.skipif(registry.load_extension()[0] is None, reason="the C++ extension is not built")
def test_an_extension_for_another_torch_is_named_and_not_loaded():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ANOTHER_TORCH], env=environment, capture_output=True, text=True)
    warned, owners, result = done.stdout.splitlines()
    (built,) = registry.built_for().values()
    assert warned == (
        "1 the C++ extension of firp_kernels is not used, and ops on a CPU are slower: "
        f"built for torch {built}, found torch 2.99.1; see `firp doctor`"
    )
    assert (owners, result) == ("{'reference'} None", "[[2.0, 2.0, 2.0]]"), done.stderr


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.1", "2.13.0a0+git1234", "2.13.0.dev20260601"])
def test_a_minor_release_of_torch_has_one_extension(version):
    assert extension_name(version) == "_C_torch_2_13"
