"""Argument checks shared by the Python implementations: one error that names the argument."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NODES = 256


def _shape(name: str, tensor: Tensor, *expected: int | None) -> None:
    if tensor.dim() != len(expected) or any(e is not None and e != s for e, s in zip(expected, tensor.shape, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{wanted}]")


def _last(name: str, tensor: Tensor, width: int) -> None:
    if tensor.dim() < 1 or tensor.shape[-1] != width:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected last dimension {width}")


def _dtype(name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    if tensor.dtype not in expected:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {' or '.join(str(e) for e in expected)}")


def _same_device(**tensors: Tensor | None) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(present))
    for name, tensor in present.items():
        if tensor.device != present[first].device:
            raise ValueError(f"{name}: is on {tensor.device}, expected {present[first].device} (as {first})")


def _on_cpu(tensor: Tensor) -> bool:
    """Values are checked on the CPU only; elsewhere reading them would stall the device."""
    return tensor.device.type == "cpu" and not isinstance(tensor, torch._subclasses.FakeTensor)


def _room(context_lens: Tensor, rows: int, capacity: int) -> None:
    if _on_cpu(context_lens) and context_lens.numel():
        low, high = int(context_lens.min()), int(context_lens.max())
        if low < 0:
            raise ValueError(f"context_lens: got {low}, expected at least 0")
        if high + rows > capacity:
            raise ValueError(f"context_lens: {high} + {rows} rows exceed the cache capacity of {capacity} slots")


def _lookahead(lookahead: Tensor, num_nodes: int) -> None:
    if _on_cpu(lookahead) and lookahead.numel():
        low, high = int(lookahead.min()), int(lookahead.max())
        if low < -1 or high >= num_nodes:
            raise ValueError(f"lookahead: got {low}..{high}, expected -1..{num_nodes - 1}")


def write_cache(key, value, key_cache, value_cache, context_lens) -> None:
    _same_device(key=key, value=value, key_cache=key_cache, value_cache=value_cache, context_lens=context_lens)
    _shape("key", key, None, None, None, None)
    batch, rows, heads, width = key.shape
    _shape("value", value, *key.shape)
    _shape("key_cache", key_cache, batch, None, heads, width)
    _shape("value_cache", value_cache, *key_cache.shape)
    _shape("context_lens", context_lens, batch)
    _dtype("key", key, *FLOATS)
    for name, tensor in (("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        _dtype(name, tensor, key.dtype)
    _dtype("context_lens", context_lens, torch.int32)
    _room(context_lens, rows, key_cache.shape[1])


def tree_attention(
    query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, sliding_window
) -> None:
    _same_device(
        query=query, key_cache=key_cache, value_cache=value_cache, context_lens=context_lens, depths=depths,
        ancestors=ancestors, lookahead=lookahead,
    )  # fmt: skip
    _shape("query", query, None, None, None, None)
    batch, rows, heads, width = query.shape
    _shape("key_cache", key_cache, batch, None, None, width)
    _shape("value_cache", value_cache, *key_cache.shape)
    _shape("context_lens", context_lens, batch)
    _shape("depths", depths, batch, None)
    num_nodes = depths.shape[1]
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"depths: got {num_nodes} nodes, expected 1..{MAX_NODES}")
    _shape("ancestors", ancestors, batch, num_nodes, (num_nodes + 31) // 32)
    _shape("lookahead", lookahead, batch, None)
    _dtype("query", query, *FLOATS)
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        _dtype(name, tensor, query.dtype)
    for name, tensor in (("context_lens", context_lens), ("depths", depths), ("ancestors", ancestors), ("lookahead", lookahead)):
        _dtype(name, tensor, torch.int32)
    if heads % key_cache.shape[2]:
        raise ValueError(f"query: {heads} heads are no multiple of the cache's {key_cache.shape[2]} heads")
    if num_offsets < 0:
        raise ValueError(f"num_offsets: got {num_offsets}, expected at least 0")
    with_pseudo = num_nodes + lookahead.shape[1] * num_offsets
    if rows not in (num_nodes, with_pseudo):
        raise ValueError(f"query: got {rows} rows, expected {num_nodes} (nodes) or {with_pseudo} (with pseudo rows)")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: got {sliding_window}, expected at least 1 or None")
    _room(context_lens, rows, key_cache.shape[1])
    _lookahead(lookahead, num_nodes)


def predictor_projection(hidden, weight, lookahead) -> None:
    _same_device(hidden=hidden, weight=weight, lookahead=lookahead)
    _shape("hidden", hidden, None, None, None)
    batch, num_nodes, width = hidden.shape
    _shape("weight", weight, None, width, width)
    _shape("lookahead", lookahead, batch, None)
    _dtype("hidden", hidden, *FLOATS)
    _dtype("weight", weight, hidden.dtype)
    _dtype("lookahead", lookahead, torch.int32)
    _lookahead(lookahead, num_nodes)


def verify_tree(scores, uniforms, tokens, parents, lookahead, max_depth) -> None:
    _same_device(scores=scores, uniforms=uniforms, tokens=tokens, parents=parents, lookahead=lookahead)
    _shape("scores", scores, None, None, None)
    batch, num_nodes, vocab = scores.shape
    if not (num_nodes and vocab):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected at least one node and token")
    if max_depth < 0:
        raise ValueError(f"max_depth: got {max_depth}, expected at least 0")
    if uniforms is not None:
        _shape("uniforms", uniforms, batch, max_depth + 1)
        _dtype("uniforms", uniforms, torch.float32)
    _shape("tokens", tokens, batch, num_nodes)
    _shape("parents", parents, batch, num_nodes)
    _shape("lookahead", lookahead, batch, None)
    _dtype("scores", scores, *FLOATS)
    _dtype("tokens", tokens, torch.int64)
    _dtype("parents", parents, torch.int32)
    _dtype("lookahead", lookahead, torch.int32)
    _lookahead(lookahead, num_nodes)
    if _on_cpu(parents):
        if bool((parents[:, 0] != -1).any()):
            raise ValueError("parents: node 0 is the root, expected parent -1")
        index = torch.arange(num_nodes)
        if bool(((parents >= index) | (parents < -1)).any()):
            raise ValueError("parents: a parent must be -1 or come before its child")


def commit_cache(cache, context_lens, path, num_accepted, finished) -> None:
    _same_device(cache=cache, context_lens=context_lens, path=path, num_accepted=num_accepted, finished=finished)
    _shape("cache", cache, None, 2, None, None, None, None)
    batch = cache.shape[2]
    _shape("context_lens", context_lens, batch)
    _shape("path", path, batch, None)
    _shape("num_accepted", num_accepted, batch)
    _shape("finished", finished, batch)
    _dtype("cache", cache, *FLOATS)
    for name, tensor in (("context_lens", context_lens), ("path", path), ("num_accepted", num_accepted)):
        _dtype(name, tensor, torch.int32)
    _dtype("finished", finished, torch.bool)
    if not _on_cpu(path):
        return
    for b in range(batch):
        if bool(finished[b]):
            continue
        count = int(num_accepted[b]) + 1
        if not 1 <= count <= path.shape[1]:
            raise ValueError(f"num_accepted: got {count - 1}, expected 0..{path.shape[1] - 1} (path has {path.shape[1]} entries)")
        nodes = path[b, :count].tolist()
        if nodes[0] != 0 or any(b <= a for a, b in itertools.pairwise(nodes)):
            raise ValueError(f"path: got {nodes}, expected increasing nodes from 0")
        _room(context_lens[b : b + 1], nodes[-1] + 1, cache.shape[3])


def _some_marginals(probabilities: Tensor) -> None:
    offsets, ranks = probabilities.shape[1], probabilities.shape[-1]
    if offsets < 1 or ranks < 1:
        raise ValueError(f"probabilities: got {offsets} offsets and {ranks} ranks, expected at least one of each")


def draft_tree(probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order) -> None:
    _same_device(
        probabilities=probabilities, candidates=candidates, root_token=root_token, num_offsets=num_offsets, order=order
    )
    _shape("probabilities", probabilities, *[None] * (3 if order is None else 4))
    batch, k, width = probabilities.shape[:3]
    _some_marginals(probabilities)
    _shape("candidates", candidates, batch, k, width)
    if order is not None:
        _shape("order", order, *probabilities.shape)
        _dtype("order", order, torch.int32)
        if _on_cpu(order) and order.numel() and not 0 <= int(order.min()) <= int(order.max()) < width:
            raise ValueError(f"order: got {int(order.min())}..{int(order.max())}, expected 0..{width - 1}")
    _shape("root_token", root_token, batch)
    _shape("num_offsets", num_offsets, batch)
    _dtype("probabilities", probabilities, torch.float32)
    _dtype("candidates", candidates, torch.int64)
    _dtype("root_token", root_token, torch.int64)
    _dtype("num_offsets", num_offsets, torch.int32)
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes: got {num_nodes}, expected 1..{MAX_NODES}")
    if not 1 <= num_lookahead <= num_nodes:
        raise ValueError(f"num_lookahead: got {num_lookahead}, expected 1..{num_nodes} (num_nodes)")
    if _on_cpu(num_offsets) and batch and (int(num_offsets.min()) < 0 or int(num_offsets.max()) > k):
        raise ValueError(f"num_offsets: got {int(num_offsets.min())}..{int(num_offsets.max())}, expected 0..{k}")


def linear(input, weight, bias) -> None:
    _same_device(input=input, weight=weight, bias=bias)
    _shape("weight", weight, None, None)
    _last("input", input, weight.shape[1])
    _dtype("input", input, *FLOATS)
    _dtype("weight", weight, input.dtype)
    if bias is not None:
        _shape("bias", bias, weight.shape[0])
        _dtype("bias", bias, input.dtype)


def joint_linear(input, weights, biases) -> None:
    if not weights:
        raise ValueError("weights: got none, expected at least one")
    if len(biases) not in (0, len(weights)):
        raise ValueError(f"biases: got {len(biases)}, expected none or {len(weights)} (one per weight)")
    _dtype("input", input, *FLOATS)
    for i, weight in enumerate(weights):
        _same_device(input=input, **{f"weights[{i}]": weight})
        _shape(f"weights[{i}]", weight, None, weights[0].shape[1] if i else None)
        _dtype(f"weights[{i}]", weight, input.dtype)
    for i, bias in enumerate(biases):
        _same_device(input=input, **{f"biases[{i}]": bias})
        _shape(f"biases[{i}]", bias, weights[i].shape[0])
        _dtype(f"biases[{i}]", bias, input.dtype)
    _last("input", input, weights[0].shape[1])


def gated_linear(input, gate, up) -> None:
    _same_device(input=input, gate=gate, up=up)
    _shape("gate", gate, None, None)
    _shape("up", up, *gate.shape)
    _last("input", input, gate.shape[1])
    _dtype("input", input, *FLOATS)
    _dtype("gate", gate, input.dtype)
    _dtype("up", up, input.dtype)


def rms_norm(input, weight) -> None:
    _same_device(input=input, weight=weight)
    _shape("weight", weight, None)
    _last("input", input, weight.shape[0])
    _dtype("input", input, *FLOATS)
    _dtype("weight", weight, input.dtype)


def rotary(rows, cos, sin) -> None:
    _same_device(rows=rows, cos=cos, sin=sin)
    _shape("rows", rows, None, None, None, None)
    batch, count, _, width = rows.shape
    _shape("cos", cos, batch, count, width)
    _shape("sin", sin, *cos.shape)
    _dtype("rows", rows, *FLOATS)
    _dtype("cos", cos, rows.dtype)
    _dtype("sin", sin, rows.dtype)
    if width % 2:
        raise ValueError(f"rows: got head width {width}, expected an even one")
    if rows.stride(3) != 1:
        raise ValueError("rows: got a strided last dimension, expected a dense one")


def top_marginals(logits, rows, num_ranks) -> None:
    _same_device(logits=logits, rows=rows)
    _shape("logits", logits, None, None, None)
    batch, count, vocab = logits.shape
    _shape("rows", rows, batch, None)
    _dtype("logits", logits, *FLOATS)
    _dtype("rows", rows, torch.int64)
    if not 1 <= num_ranks <= vocab:
        raise ValueError(f"num_ranks: got {num_ranks}, expected 1..{vocab}")
    if _on_cpu(rows) and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"rows: got {int(rows.min())}..{int(rows.max())}, expected 0..{count - 1}")


def condition_marginals(probabilities, candidates, root_token, source, target, num_ranks) -> None:
    _same_device(probabilities=probabilities, candidates=candidates, root_token=root_token, source=source, target=target)
    _shape("probabilities", probabilities, None, None, None)
    _some_marginals(probabilities)
    _shape("candidates", candidates, *probabilities.shape)
    _shape("root_token", root_token, probabilities.shape[0])
    _shape("source", source, None, None)
    _shape("target", target, *source.shape)
    _dtype("probabilities", probabilities, torch.float32)
    _dtype("candidates", candidates, torch.int64)
    _dtype("root_token", root_token, torch.int64)
    _dtype("source", source, *FLOATS)
    _dtype("target", target, source.dtype)
    if not 1 <= num_ranks <= probabilities.shape[2]:
        raise ValueError(f"num_ranks: got {num_ranks}, expected 1..{probabilities.shape[2]}")
    for name, tokens in (("candidates", candidates), ("root_token", root_token)):
        if _on_cpu(tokens) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(source):
            raise ValueError(f"{name}: got {int(tokens.min())}..{int(tokens.max())}, expected 0..{len(source) - 1}")
