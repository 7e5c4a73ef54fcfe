"""`firp::decoder_layers`: rows of a step through decoder layers, with their caches."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from firp_kernels import checks, registry
from firp_kernels.ops import norm_qkv_rotary, output_norm_mlp, write_and_attend

SCHEMA = (
    "(Tensor input, Tensor cos, Tensor sin, float eps, Tensor[] norms, Tensor[] projections, Tensor[] biases, "
    "Tensor[] outputs, Tensor[] output_biases, Tensor[] mlps, Tensor(a!) cache, Tensor context_lens, Tensor depths, "
    "Tensor ancestors, Tensor lookahead, int num_offsets, float scale, int? sliding_window=None) -> Tensor"
)
PARTS = ("norm_qkv_rotary", "write_and_attend", "output_norm_mlp")


def decoder_layers(
    input: Tensor, cos: Tensor, sin: Tensor, eps: float, norms: Sequence[Tensor], projections: Sequence[Tensor],
    biases: Sequence[Tensor], outputs: Sequence[Tensor], output_biases: Sequence[Tensor], mlps: Sequence[Tensor],
    cache: Tensor, context_lens: Tensor, depths: Tensor, ancestors: Tensor, lookahead: Tensor, num_offsets: int,
    scale: float, sliding_window: int | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """`norm_qkv_rotary`, `write_and_attend` and `output_norm_mlp`, layer after layer, in one call.

    Args:
        input: [B, R, d] bfloat16, float32 (float16, float64: reference only).
        cos, sin: [B, R, D], dtype of input, as in `norm_qkv_rotary`.
        eps: added to the mean square, in every norm.
        norms: of each layer the weights [d] of the norm before attention and of that after it.
        projections: of each layer the weights of queries [H*D, d], of keys and of values [Hkv*D, d].
        biases: of all projections, or none at all.
        outputs: of each layer the weight [d, H*D] after attention; output_biases: one each, [d], or none at all.
        mlps: of each layer gate [m, d], up [m, d] and down [d, m].
        cache: [L, 2, B, S, Hkv, D], keys then values of each layer, written in place.
        context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window: as in `tree_attention`.

    Returns:
        [B, R, d], dtype of input: what the three ops return one after another, bit for bit. Without layers a copy.

    Raises:
        ValueError, TypeError: as these three; a number of weights that does not fit the layers of the cache.

    Example:
        >>> import torch, firp_kernels
        >>> eye, zeros, one = torch.eye(2), torch.zeros(2, 2), torch.ones(1, 1, 2)
        >>> zero = torch.zeros(1, 1, dtype=torch.int32)  # one root node, which sees itself, after an empty context
        >>> out = firp_kernels.decoder_layers(
        ...     torch.tensor([[[3.0, -3.0]]]), one, 0 * one, 0.0, [one[0, 0]] * 2, [eye] * 3, [], [eye], [],
        ...     [zeros] * 3, torch.zeros(1, 2, 1, 3, 1, 2), zero[0], zero, zero[..., None] + 1, zero, 3, 0.5,
        ... )
        >>> out.tolist()
        [[[4.0, -4.0]]]
    """
    return registry.call(
        "decoder_layers", impl, input, cos, sin, eps, list(norms), list(projections), list(biases), list(outputs),
        list(output_biases), list(mlps), cache, context_lens, depths, ancestors, lookahead, num_offsets, scale,
        sliding_window,
    )  # fmt: skip


def fake(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


def check(
    input: Tensor, cos: Tensor, norms: Sequence[Tensor], projections: Sequence[Tensor], biases: Sequence[Tensor],
    outputs: Sequence[Tensor], output_biases: Sequence[Tensor], mlps: Sequence[Tensor], cache: Tensor,
) -> None:  # fmt: skip
    """The weights by this op's own names; the three ops check what is left."""
    checks.shape("cache", cache, None, 2, None, None, None, None)
    layers, _, batch, _, kv_heads, head_dim = cache.shape
    for name, tensors, each in (
        ("norms", norms, 2), ("projections", projections, 3), ("biases", biases, 3), ("outputs", outputs, 1),
        ("output_biases", output_biases, 1), ("mlps", mlps, 3),
    ):  # fmt: skip
        optional = name.endswith("biases")
        if len(tensors) != each * layers and not (optional and not tensors):
            expected = f"{each * layers}{' or none' if optional else ''} ({layers} layers)"
            raise ValueError(f"{name}: got {len(tensors)}, expected {expected}")
    checks.shape("input", input, batch, None, None)
    checks.dtype("input", input, *checks.FLOATS)
    checks.dtype("cache", cache, input.dtype)
    checks.shape("cos", cos, batch, input.shape[1], head_dim)
    if head_dim % 2 or not head_dim:
        raise ValueError(f"cos: got head_dim {head_dim}, expected an even one")
    width, keys = input.shape[2], kv_heads * head_dim

    def part(name: str, place: int, tensor: Tensor, *shape: int | None) -> None:
        checks.same_device(input=input, **{f"{name}[{place}]": tensor})
        checks.shape(f"{name}[{place}]", tensor, *shape)
        checks.dtype(f"{name}[{place}]", tensor, input.dtype)

    for i in range(layers):
        for place in (2 * i, 2 * i + 1):
            part("norms", place, norms[place], width)
        for place, shape in ((3 * i, None), (3 * i + 1, keys), (3 * i + 2, keys)):
            part("projections", place, projections[place], shape, width)
        queries = projections[3 * i].shape[0]
        if not keys or not queries or queries % keys:
            raise ValueError(
                f"projections[{3 * i}]: got {queries} outputs, expected a multiple of {keys}, those of the keys"
            )
        for place in range(3 * i, 3 * i + 3) if biases else ():
            part("biases", place, biases[place], projections[place].shape[0])
        part("outputs", i, outputs[i], width, queries)
        if output_biases:
            part("output_biases", i, output_biases[i], width)
        wide = mlps[3 * i].shape[:1]
        for place, shapes in ((3 * i, (None, width)), (3 * i + 1, (*wide, width)), (3 * i + 2, (width, *wide))):
            part("mlps", place, mlps[place], *shapes)


def composed(
    ops: Any, input: Tensor, cos: Tensor, sin: Tensor, eps: float, norms: Sequence[Tensor],
    projections: Sequence[Tensor], biases: Sequence[Tensor], outputs: Sequence[Tensor],
    output_biases: Sequence[Tensor], mlps: Sequence[Tensor], cache: Tensor, *tree_and_scale: Any,
) -> Tensor:  # fmt: skip
    """The op made of `ops.norm_qkv_rotary`, `ops.write_and_attend` and `ops.output_norm_mlp`."""
    check(input, cos, norms, projections, biases, outputs, output_biases, mlps, cache)
    hidden = input.clone()
    for i, layer_cache in enumerate(cache.unbind(0)):
        three = slice(3 * i, 3 * i + 3)
        heads = ops.norm_qkv_rotary(hidden, norms[2 * i], eps, projections[three], biases[three], cos, sin)
        kv_heads = layer_cache.shape[3]
        queries = heads.shape[2] - 2 * kv_heads
        parts = heads.split([queries, kv_heads, kv_heads], 2)
        attended = ops.write_and_attend(*parts, layer_cache, *tree_and_scale)
        bias = output_biases[i] if output_biases else None
        hidden = ops.output_norm_mlp(attended, hidden, outputs[i], bias, norms[2 * i + 1], eps, *mlps[three])
    return hidden


def reference(*args: Any) -> Tensor:
    parts = {
        "norm_qkv_rotary": norm_qkv_rotary.reference,
        "write_and_attend": write_and_attend.reference,
        "output_norm_mlp": output_norm_mlp.reference,
    }
    return composed(SimpleNamespace(**parts), *args)


def fallback(*args: Any) -> Tensor:
    return composed(torch.ops.firp, *args)
