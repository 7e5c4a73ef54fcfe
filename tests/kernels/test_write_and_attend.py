"""write_and_attend: the bits of write_cache, then tree_attention, in every implementation and through `bind`."""

import pytest
import torch
from cases import attention_case, moved
from implementations import on_devices, seeds

import firp_kernels as kernels

# NaN is what is tested; numpy, under the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def case(seed, dtype, window=None):
    """Arguments of the op, with NaN in every slot that it has to write, and the cache [2, B, S, Hkv, D] after it."""
    query, key_cache, value_cache, lens, *tree = attention_case(seed, dtype, window)
    rows, batch = query.shape[1], torch.arange(len(lens))[:, None]
    slots = lens.long()[:, None] + torch.arange(rows)
    key, value = key_cache[batch, slots], value_cache[batch, slots]
    after = torch.stack([key_cache, value_cache])
    before = after.clone()
    before[:, batch, slots] = float("nan")
    return [query, key, value, before, lens, *tree], after


@on_devices("write_and_attend")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_its_two_parts(impl, device, dtype, window):
    for seed in seeds(12, impl, device):
        args, after = case(seed, dtype, window)
        args = moved(args, device)
        out = kernels.write_and_attend(*args, impl=impl)
        torch.testing.assert_close(args[3].cpu(), after, rtol=0, atol=0, equal_nan=True)
        query, _, _, cache, *tree = args
        assert torch.equal(out, kernels.tree_attention(query, cache[0], cache[1], *tree, impl=impl))


@on_devices("write_and_attend")
@pytest.mark.parametrize("named", ["write_cache", "tree_attention"])
def test_bind_makes_it_of_the_named_part(impl, device, named):
    """An implementation that is named for one of its parts is what runs."""
    ops, calls = kernels.bind({named: impl}), []
    part = getattr(ops, named)
    setattr(ops, named, lambda *args: calls.append(named) or part(*args))
    args, after = case(0, torch.float32)
    args = moved(args, device)
    ops.write_and_attend(*args)
    assert calls == [named]
    torch.testing.assert_close(args[3].cpu(), after, rtol=0, atol=0, equal_nan=True)


def test_without_a_name_it_is_the_dispatched_op():
    assert kernels.bind(None).write_and_attend is torch.ops.firp.write_and_attend.default
    assert kernels.bind({"linear": "reference"}).write_and_attend is torch.ops.firp.write_and_attend.default
