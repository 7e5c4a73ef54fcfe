"""The checker of memory and races finds planted faults, and no fault in the kernels."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from cases import example_arguments, shaped_attention_case, verify_case
from memory_checker import KernelFault, checked

import firp_kernels
from firp_kernels import ops
from firp_kernels.registry import TRITON_OPS

KERNELS = Path(firp_kernels.__file__).parent / "triton"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are not interpreted")


def planted(tmp_path, op, right, wrong):
    """The launcher of an op, with a fault in its kernels."""
    text = (KERNELS / f"{op}.py").read_text()
    assert text.count(right) == 1
    path = tmp_path / f"planted_{op}.py"
    path.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, op)


ATTENTION = shaped_attention_case(5, [300, 1], slots=2, offsets=3, head_dim=16)
# One row that fills the cache: what goes past its end leaves the tensor.
ROW = torch.ones(1, 1, 2, 12)
WRITE = ROW, ROW, torch.zeros(1, 1, 2, 12), torch.zeros(1, 1, 2, 12), torch.zeros(1, dtype=torch.int32)
VERIFY = next(case for case in (verify_case(seed, torch.float32, False) for seed in range(9)) if case[0].shape[1] > 2)
EXAMPLES = {"tree_attention": ATTENTION, "write_cache": WRITE, "verify_tree": VERIFY}
# op -> a correct piece of its source, a wrong one, and the fault
FAULTS = {
    "store out of bounds": (
        "write_cache", "o_d * s_value_cache_d, b_value, mask=m_hd)", "o_d * s_value_cache_d, b_value)",
    ),
    "load out of bounds": (
        "write_cache", "o_h * s_value_h + o_d * s_value_d, mask=m_hd)", "o_h * s_value_h + o_d * s_value_d)",
    ),
    "stores of two programs to one address": ("verify_tree", "+ i_n) * num_splits + i_s", "+ i_n) * 0 + i_s"),
    "load of what nobody wrote": (
        "tree_attention", "tl.store(log_sums + o_part, b_max + tl.log2(b_sum), mask=m_m)", "pass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(tmp_path, fault):
    op, right, wrong = FAULTS[fault]
    with checked() as checker:
        launcher = checker.launcher(planted(tmp_path, op, right, wrong))
        with pytest.raises(KernelFault, match=fault):
            launcher(*EXAMPLES[op])


@triton.jit
def neighbour_kernel(values, out, BLOCK: tl.constexpr):
    """out = values, then the sum with what the program before this one has stored."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(values + o))
    before = tl.load(out + o - BLOCK, mask=o >= BLOCK, other=0.0)
    tl.store(out + o, tl.load(out + o) + before)


def test_a_race_is_found_and_shows():
    values = torch.arange(1.0, 33.0)
    in_order, at_once = torch.zeros(32), torch.zeros(32)
    neighbour_kernel[(4,)](values, in_order, 8)
    with checked(), pytest.raises(KernelFault, match="loads of what another program stores"):
        neighbour_kernel[(4,)](values, at_once, 8)
    assert not torch.equal(in_order, at_once)


@pytest.mark.parametrize("op", TRITON_OPS)
def test_the_kernels_are_without_fault(op):
    arguments = example_arguments(1)[op]
    wanted = listed(getattr(ops, op).reference(*copy.deepcopy(arguments)))
    with checked() as checker:
        found = listed(getattr(firp_kernels, op)(*arguments, impl="triton"))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert checker.launches


def listed(results):
    return [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
