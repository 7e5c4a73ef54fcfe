"""commit_cache: every implementation moves the bytes that the oracle moves, and only those."""

import pytest
import torch
from cases import moved, verify_case
from implementations import on_devices

import firp_kernels as kernels
from firp_kernels.ops import verify_tree

IMPLEMENTATIONS = on_devices("commit_cache")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def committed(impl, device, cache, lens, path, accepted, finished):
    """Cache and lengths after the commit, on the CPU; what was passed stays as it is."""
    cache, lens = cache.clone().to(device), lens.clone().to(device)
    kernels.commit_cache(cache, lens, *moved((path, accepted, finished), device), impl=impl)
    return cache.cpu(), lens.cpu()


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, width", [(3, 4), (1, 1), (1, 3), (2, 64)])
def test_equals_the_oracle(impl, device, dtype, heads, width):
    """Slots of 2 to 1024 bytes, so that words of every size move."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        path, accepted = verify_tree.reference(*verify_case(seed, torch.float32, False))[:2]
        batch, rows = path.shape[0], int(path.max()) + 1
        cache = torch.randn(2, 2, batch, rows + 10, heads, width, generator=generator).to(dtype)
        lens = torch.randint(0, 10, (batch,), generator=generator).to(torch.int32)
        finished = torch.rand(batch, generator=generator) < 0.3
        exact = committed("reference", "cpu", cache, lens, path, accepted, finished)
        for out, same in zip(committed(impl, device, cache, lens, path, accepted, finished), exact, strict=True):
            assert torch.equal(out, same), seed


@IMPLEMENTATIONS
def test_overlapping_rows(impl, device):
    """Sources that are targets of earlier entries: the path of a comb, longer than a thread reads ahead."""
    path = torch.tensor([[0, 1, 2, 4, 5, 7, 8, 9, 12, 13, 20]], dtype=torch.int32)
    cache = torch.arange(2 * 2 * 24 * 8, dtype=torch.float32).view(2, 2, 1, 24, 1, 8)
    lens, accepted = torch.tensor([3], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    out, after = committed(impl, device, cache, lens, path, accepted, torch.tensor([False]))
    assert after.tolist() == [14]
    assert torch.equal(out[:, :, 0, 3:14], cache[:, :, 0, 3 + path[0].long()])
    assert torch.equal(out[:, :, :, :3], cache[:, :, :, :3]) and torch.equal(out[:, :, :, 14:], cache[:, :, :, 14:])


@IMPLEMENTATIONS
def test_a_view_into_a_larger_cache(impl, device):
    """A bucket of slots and of layers, off the 16-byte grid: strides and alignment hold, the rest is untouched."""
    whole = torch.randn(4, 2, 3, 40, 2, 3, generator=torch.Generator().manual_seed(0))
    path = torch.tensor([[0, 2, 5], [0, 1, -1], [0, 3, 4]], dtype=torch.int32)
    lens, accepted = torch.tensor([4, 0, 7], dtype=torch.int32), torch.tensor([2, 1, 2], dtype=torch.int32)
    finished = torch.tensor([False, False, True])

    def run(impl, device):
        storage, grown = whole.clone().to(device), lens.clone().to(device)
        kernels.commit_cache(storage[1:3, :, :, 3:30], grown, *moved((path, accepted, finished), device), impl=impl)
        return storage.cpu(), grown.cpu()

    for out, exact in zip(run(impl, device), run("reference", "cpu"), strict=True):
        assert torch.equal(out, exact)
    assert run(impl, device)[1].tolist() == [7, 2, 7]


@IMPLEMENTATIONS
def test_no_sequence(impl, device):
    empty = torch.empty(0, dtype=torch.int32)
    cache, lens = committed(impl, device, torch.zeros(2, 2, 0, 8, 1, 4), empty, empty.view(0, 3), empty, empty.bool())
    assert cache.numel() == 0 and lens.numel() == 0
