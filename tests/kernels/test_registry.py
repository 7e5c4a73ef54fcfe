"""An implementation that is not there is refused by name."""

import os
import subprocess
import sys

import pytest
import torch

import firp_kernels as kernels
from firp_kernels.ops import verify_tree


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
