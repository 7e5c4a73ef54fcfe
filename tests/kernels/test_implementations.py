"""Every op's schema, fake implementation and tracing agree with what it does."""

import pytest
import torch
from cases import example_arguments

from firp_kernels import ops


@pytest.mark.parametrize("seed", range(4))
def test_opcheck(seed):
    calls = example_arguments(seed)
    if calls["write_cache"][2].shape[1] < 2:
        calls.pop("write_cache")
    assert calls.keys() | {"write_cache"} == ops.SCHEMAS.keys()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.firp, name).default, tuple(args), test_utils=checks)
