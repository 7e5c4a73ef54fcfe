"""`firp::commit_cache`: keep the keys and values of the accepted path."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor(a!) cache, Tensor(b!) context_lens, Tensor path, Tensor num_accepted, Tensor finished) -> ()"


def commit_cache(
    cache: Tensor, context_lens: Tensor, path: Tensor, num_accepted: Tensor, finished: Tensor, impl: str | None = None
) -> None:
    """Move keys and values of the accepted path to the end of the context, in every layer, in place.

    Slot context_lens + i takes what slot context_lens + path[i] held, for i = 0..num_accepted; context_lens then grows
    by num_accepted + 1. path[i] >= i, so that ascending order is safe. Finished sequences stay as they are.

    Args:
        cache: [L, 2, B, S, Hkv, D], keys then values. context_lens: [B] int32.
        path: [B, max_depth + 1] int32, num_accepted: [B] int32, as `verify_tree` returns them. finished: [B] bool.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a path that does not ascend
            from 0 or leaves the cache.

    Example:
        >>> import torch, firp_kernels
        >>> cache, lens = torch.arange(8.0).view(1, 2, 1, 4, 1, 1), torch.tensor([1], dtype=torch.int32)
        >>> path, accepted = torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
        >>> firp_kernels.commit_cache(cache, lens, path, accepted, torch.tensor([False]))
        >>> cache[0, 0, 0, :3, 0, 0].tolist(), lens.tolist()
        ([0.0, 1.0, 3.0], [3])
    """
    registry.call("commit_cache", impl, cache, context_lens, path, num_accepted, finished)


def fake(*_: object) -> None:
    return None


def check(cache: Tensor, context_lens: Tensor, path: Tensor, num_accepted: Tensor, finished: Tensor) -> None:
    checks.same_device(cache=cache, context_lens=context_lens, path=path, num_accepted=num_accepted, finished=finished)
    checks.shape("cache", cache, None, 2, None, None, None, None)
    batch = cache.shape[2]
    checks.shape("context_lens", context_lens, batch)
    checks.shape("path", path, batch, None)
    checks.shape("num_accepted", num_accepted, batch)
    checks.shape("finished", finished, batch)
    checks.dtype("cache", cache, *checks.FLOATS)
    for name, tensor in (("context_lens", context_lens), ("path", path), ("num_accepted", num_accepted)):
        checks.dtype(name, tensor, torch.int32)
    checks.dtype("finished", finished, torch.bool)
    if not checks.on_cpu(path):
        return
    longest = path.shape[1]
    for b in range(batch):
        if bool(finished[b]):
            continue
        count = int(num_accepted[b]) + 1
        if not 1 <= count <= longest:
            raise ValueError(f"num_accepted: got {count - 1}, expected 0..{longest - 1} (path has {longest} entries)")
        nodes = path[b, :count].tolist()
        if nodes[0] != 0 or any(after <= before for before, after in itertools.pairwise(nodes)):
            raise ValueError(f"path: got {nodes}, expected increasing nodes from 0")
        checks.room(context_lens[b : b + 1], nodes[-1] + 1, cache.shape[3])


def reference(cache: Tensor, context_lens: Tensor, path: Tensor, num_accepted: Tensor, finished: Tensor) -> None:
    check(cache, context_lens, path, num_accepted, finished)
    for b in range(cache.shape[2]):
        if finished[b]:
            continue
        start, count = int(context_lens[b]), int(num_accepted[b]) + 1
        source = start + path[b, :count].long()
        cache[:, :, b, start : start + count] = cache[:, :, b, source]
        context_lens[b] += count
