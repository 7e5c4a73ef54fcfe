"""write_cache: every implementation puts a row into its slot, bit for bit, and touches no other."""

import pytest
import torch
from cases import moved
from implementations import TRITON_DEVICE, on_devices, seeds

import firp_kernels as kernels
from firp_kernels.ops import write_cache

IMPLEMENTATIONS = on_devices("write_cache")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def run(args, impl, device):
    """The cache after the call; `args` stay as they are."""
    key, value, cache, lens = moved(args, device)
    written = cache.clone()
    kernels.write_cache(key, value, written[1, 0], written[1, 1], lens, impl=impl)
    return written.cpu()


def case(lens, rows, heads, head_dim, dtype, seed=0):
    """Rows as transposed views, a whole cache [L, 2, B, S, Hkv, D] with NaN in it, lengths."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, len(lens), heads, rows, head_dim, generator=generator).to(dtype).transpose(2, 3)
    cache = torch.randn(3, 2, len(lens), max(lens, default=0) + rows + 2, heads, head_dim, generator=generator).to(
        dtype
    )
    cache[..., ::3, :, 1:2] = float("nan")
    return [key, value, cache, torch.tensor(lens, dtype=torch.int32)]


def assert_written(out, key, value, cache, lens):
    expected = cache.clone()
    for b, length in enumerate(lens.tolist()):
        expected[1, 0, b, length : length + key.shape[1]] = key[b]
        expected[1, 1, b, length : length + key.shape[1]] = value[b]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, head_dim", [(1, 1), (3, 5), (2, 64), (5, 80), (3, 128), (5, 256)])
def test_rows_go_to_their_slots(impl, device, dtype, heads, head_dim):
    for lens, rows in (([0], 1), ([7, 0, 3], 4), ([2, 2], 9)):
        args = case(lens, rows, heads, head_dim, dtype)
        assert_written(run(args, impl, device), *args)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_oracle(impl, device, dtype):
    for seed in seeds(40, impl, device):
        generator = torch.Generator().manual_seed(seed)
        batch, rows = 1 + seed % 3, seed % 7
        lens = torch.randint(0, 10, (batch,), generator=generator).to(torch.int32)
        key = torch.randn(batch, 3, rows, 4, generator=generator).to(dtype).transpose(1, 2)
        exact = torch.randn(2, batch, rows + 10, 3, 4, generator=generator).to(dtype)
        cache = exact.clone().to(device)
        kernels.write_cache(*moved((key, key.flip(1), *cache, lens), device), impl=impl)
        write_cache.reference(key, key.flip(1), *exact, lens)
        assert torch.equal(cache.cpu(), exact)


@IMPLEMENTATIONS
def test_strides(impl, device):
    key, value, cache, lens = case([5, 1], 3, 2, 16, torch.float32)
    strided = [
        torch.stack([key, value], -1)[..., 0],
        torch.stack([key, value], 1)[:, 1],
        cache,
        torch.stack([lens, lens], 1)[:, 0],
    ]
    assert_written(run(strided, impl, device), key, value, cache, lens)
    apart = cache.transpose(3, 4).contiguous().transpose(3, 4)
    assert_written(run([key, value, apart, lens], impl, device), key, value, cache, lens)


@IMPLEMENTATIONS
def test_nothing_to_write(impl, device):
    for args in (case([3], 0, 2, 8, torch.float32), case([], 2, 2, 8, torch.float32)):
        assert_written(run(args, impl, device), *args)


def test_offsets_past_32_bits():
    key, value, cache, lens = case([5, 2], 3, 2, 16, torch.float16)
    apart = 2**31 + 160
    far = torch.empty(apart + 2 * cache[0].numel(), dtype=torch.float16, device=TRITON_DEVICE)
    caches = [far.as_strided(cache[0, 0].shape, (apart, 64, 16, 1), start) for start in (0, 32)]
    for into, old in zip(caches, cache[1], strict=True):
        into.copy_(old)
    kernels.write_cache(*moved([key, value, *caches, lens], TRITON_DEVICE), impl="triton")
    out = cache.clone()
    out[1, 0], out[1, 1] = caches
    assert_written(out, key, value, cache, lens)


@pytest.mark.gpu
def test_graph_replay_follows_the_lengths():
    key, value, cache, lens = moved(case([5, 2], 3, 8, 128, torch.bfloat16), "cuda")
    written = cache.clone()
    kernels.write_cache(key, value, written[1, 0], written[1, 1], lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.write_cache(key, value, written[1, 0], written[1, 1], lens)
    written.copy_(cache)
    lens.copy_(torch.tensor([0, 4]))
    graph.replay()
    assert_written(written, key, value, cache, lens)
