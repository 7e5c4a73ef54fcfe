"""write_and_attend: the bits of write_cache, then tree_attention, in every implementation and through `bind`."""

import pytest
import torch
from cases import attention_case, moved
from implementations import TRITON_DEVICE, on_devices, seeds
from triton.runtime.jit import KernelInterface

import firp_kernels as kernels
from firp_kernels.ops import rotary

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


def angles(query, seed):
    """Cosines and sines [B, R, D], strided; the same for all sequences of the batch, as for one position."""
    batch, rows, _, head_dim = query.shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.rand(1, rows + 2, head_dim, generator=generator) * 6
    return [part.to(query.dtype)[:, 1:-1].expand(batch, -1, -1) for part in (wide.cos(), wide.sin())]


@on_devices("write_and_attend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotates_queries_and_keys_on_their_way(impl, device, dtype):
    """The bits of rotary, then the op without it, for rows that are parts of one product."""
    if dtype == torch.bfloat16 and (impl, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    for seed in seeds(12, impl, device):
        args, _ = case(seed, dtype)
        turns = moved(angles(args[0], seed), device)
        query, key, value, cache, *tree = moved(args, device)
        heads = query.shape[2], key.shape[2], key.shape[2]
        parts = torch.cat([query, key, value], 2).split(heads, 2)
        before, own = [part.clone() for part in parts], cache.clone()
        out = kernels.write_and_attend(*parts, cache, *tree, *turns, impl=impl)
        assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
        query, key = (rotary.rotated(part, *turns) for part in parts[:2])
        assert torch.equal(out, kernels.write_and_attend(query, key, parts[2], own, *tree, impl=impl))
        torch.testing.assert_close(cache, own, rtol=0, atol=0, equal_nan=True)


def test_rotary_takes_no_launch_of_its_own(monkeypatch):
    """Two launches on a GPU: rows into the cache, attention."""
    names, subscript = [], KernelInterface.__getitem__
    recorded = lambda kernel, grid: names.append(kernel.__name__) or subscript(kernel, grid)  # noqa: E731
    monkeypatch.setattr(KernelInterface, "__getitem__", recorded)
    args, _ = case(1, torch.float32)
    kernels.write_and_attend(*moved([*args, *angles(args[0], 1)], TRITON_DEVICE), impl="triton")
    assert names == ["rotate_and_write_kernel", "tree_attention_kernel"]


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
