"""write_cache: every implementation puts a row into its slot, bit for bit, and touches no other."""

import pytest
import torch
from cases import moved
from test_implementations import implementations

import firp_kernels as kernels

IMPLEMENTATIONS = [*implementations("write_cache"), "triton"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def run(args, impl):
    """The cache after the call; `args` stay as they are."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    key, value, cache, lens = moved(args, device)
    written = cache.clone()
    kernels.write_cache(key, value, written[1, 0], written[1, 1], lens, impl=impl)
    return written.cpu()


def case(lens, rows, heads, width, dtype, seed=0):
    """Rows as transposed views, a whole cache [L, 2, B, S, Hkv, D] with NaN in it, lengths."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, len(lens), heads, rows, width, generator=generator).to(dtype).transpose(2, 3)
    cache = torch.randn(3, 2, len(lens), max(lens, default=0) + rows + 2, heads, width, generator=generator).to(dtype)
    cache[..., ::3, :, 1:2] = float("nan")
    return [key, value, cache, torch.tensor(lens, dtype=torch.int32)]


def assert_written(out, key, value, cache, lens):
    expected = cache.clone()
    for b, length in enumerate(lens.tolist()):
        expected[1, 0, b, length : length + key.shape[1]] = key[b]
        expected[1, 1, b, length : length + key.shape[1]] = value[b]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 5), (2, 64), (5, 80), (3, 128), (5, 256)])
def test_rows_go_to_their_slots(impl, dtype, heads, width):
    for lens, rows in (([0], 1), ([7, 0, 3], 4), ([2, 2], 9)):
        args = case(lens, rows, heads, width, dtype)
        assert_written(run(args, impl), *args)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(impl):
    key, value, cache, lens = case([5, 1], 3, 2, 16, torch.float32)
    strided = [torch.stack([key, value], -1)[..., 0], torch.stack([key, value], 1)[:, 1], cache, torch.stack([lens, lens], 1)[:, 0]]
    assert_written(run(strided, impl), key, value, cache, lens)
    apart = cache.transpose(3, 4).contiguous().transpose(3, 4)
    assert_written(run([key, value, apart, lens], impl), key, value, cache, lens)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_write(impl):
    for args in (case([3], 0, 2, 8, torch.float32), case([], 2, 2, 8, torch.float32)):
        assert_written(run(args, impl), *args)


def test_offsets_past_32_bits():
    key, value, cache, lens = case([5, 2], 3, 2, 16, torch.float16)
    apart = 2**31 + 160
    far = torch.empty(apart + 2 * cache[0].numel(), dtype=torch.float16)
    caches = [far.as_strided(cache[0, 0].shape, (apart, 64, 16, 1), start) for start in (0, 32)]
    for into, old in zip(caches, cache[1], strict=True):
        into.copy_(old)
    kernels.write_cache(*moved([key, value, *caches, lens], key.device), impl="triton")
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
