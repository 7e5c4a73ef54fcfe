"""Tensors on different devices are refused with a name, by every implementation, before any of them is read."""

import pytest
import torch
from cases import example_arguments, moved
from implementations import NO_GPU, available

from firp_kernels import ops, registry

# An op of one tensor runs wherever that is.
ONE_TENSOR = {"keep_top_p"}
EXAMPLES = {name: args for name, args in example_arguments(1).items() if name not in ONE_TENSOR}
REFUSED = r": is on \S+, expected \S+ \(as "


def each_elsewhere(args, device):
    """The arguments with one tensor after another on `device`, those in lists included."""
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            yield [*args[:index], arg.to(device), *args[index + 1 :]]
        elif isinstance(arg, list):
            yield from ([*args[:index], changed, *args[index + 1 :]] for changed in each_elsewhere(arg, device))


def test_every_op_has_several_tensors():
    assert EXAMPLES.keys() | ONE_TENSOR == ops.SCHEMAS.keys()
    assert all(len(list(each_elsewhere(args, "meta"))) >= 2 for args in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_tensor_elsewhere(name):
    """The meta device stands in for another. The dispatcher would choose its kernel, so the CPU's is called by key."""
    for impl, _ in available(name):
        function = registry.bound(name, impl)
        if impl == "extension":
            operator = getattr(torch.ops.firp, name).default
            function = lambda *args, operator=operator: operator._op_dk(torch.DispatchKey.CPU, *args)  # noqa: E731
        for args in each_elsewhere(EXAMPLES[name], "meta"):
            with pytest.raises(ValueError, match=REFUSED):
                function(*args)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("home, other", [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("name", EXAMPLES)
def test_host_and_gpu_mixed(name, home, other):
    functions = [getattr(torch.ops.firp, name).default, registry.bound(name, "reference")]
    if name in registry.TRITON_OPS:
        functions.append(registry.bound(name, "triton"))
    for args in each_elsewhere(moved(EXAMPLES[name], home), other):
        for function in functions:
            with pytest.raises(ValueError, match=REFUSED):
                function(*args)
