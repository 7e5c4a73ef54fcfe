"""Ops on few rows of a model's own layers and head, for CPUs, where a step is many small operations over weights read once.

A row's result does not depend on the other rows, so plain decoding and tree decoding agree bit for bit. Roundings are
those of the Hugging Face modules. Letters as in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from firp_kernels import registry


def _fake_linear(input, weight, bias=None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _fake_joint_linear(input, weights, biases) -> Tensor:
    return input.new_empty(*input.shape[:-1], sum(weight.shape[0] for weight in weights))


def _fake_gated_linear(input, gate, up) -> Tensor:
    return input.new_empty(*input.shape[:-1], gate.shape[0])


def _fake_rms_norm(input, weight, eps) -> Tensor:
    return input.new_empty(input.shape)


def _fake_rotary(*_) -> None:
    return None


def _fake_top_marginals(logits, rows, num_ranks) -> tuple[Tensor, Tensor]:
    shape = (*rows.shape, num_ranks)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _fake_condition_marginals(probabilities, candidates, root_token, source, target, num_ranks) -> tuple[Tensor, Tensor]:
    shape = (*probabilities.shape, num_ranks)
    return probabilities.new_empty(shape), candidates.new_empty(shape, dtype=torch.int32)


SCHEMAS: dict[str, tuple[str, Callable]] = {
    "linear": ("(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", _fake_linear),
    "joint_linear": ("(Tensor input, Tensor[] weights, Tensor[] biases) -> Tensor", _fake_joint_linear),
    "gated_linear": ("(Tensor input, Tensor gate, Tensor up) -> Tensor", _fake_gated_linear),
    "rms_norm": ("(Tensor input, Tensor weight, float eps) -> Tensor", _fake_rms_norm),
    "top_marginals": (
        "(Tensor logits, Tensor rows, SymInt num_ranks) -> (Tensor probabilities, Tensor candidates)",
        _fake_top_marginals,
    ),
    "condition_marginals": (
        "(Tensor probabilities, Tensor candidates, Tensor root_token, Tensor source, Tensor target, SymInt num_ranks) "
        "-> (Tensor probabilities, Tensor order)",
        _fake_condition_marginals,
    ),
    "rotary": ("(Tensor(a!) rows, Tensor cos, Tensor sin) -> ()", _fake_rotary),
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str | None = None) -> Tensor:
    """input @ weight.T + bias for few rows, streaming the weight once.

    The extension's result for a row does not depend on how many rows there are, which makes plain decoding and
    tree decoding agree bit for bit on a CPU; torch's own may differ between row counts.

    Args:
        input: [..., in] floats. weight: [out, in], bias: [out] or None, dtype of input.

    Returns:
        [..., out], accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.
    """
    return registry.call("linear", impl, input, weight, bias)


def joint_linear(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), impl: str | None = None
) -> Tensor:
    """Several `linear` over the same rows at once, such as queries, keys and values: their outputs side by side.

    Args:
        input: [..., in] bfloat16, float32 (float16, float64: reference only).
        weights: at least one [out_i, in], dtype of input.
        biases: one [out_i] per weight, dtype of input, or none at all.

    Returns:
        [..., sum of out_i]; each part has the bits that `linear` gives it.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, no weight, a number of biases that is neither 0
            nor that of the weights.
    """
    return registry.call("joint_linear", impl, input, list(weights), list(biases))


def gated_linear(input: Tensor, gate: Tensor, up: Tensor, impl: str | None = None) -> Tensor:
    """silu(input @ gate.T) * (input @ up.T): the upper half of a gated MLP, each weight streamed once.

    Args:
        input: [..., in] bfloat16, float32 (float16, float64: reference only). gate, up: [out, in], dtype of input.

    Returns:
        [..., out]; both products, silu and the last product are each rounded to the dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Source: SwiGLU, arXiv 2002.05202.
    """
    return registry.call("gated_linear", impl, input, gate, up)


def rms_norm(input: Tensor, weight: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """weight * (input / sqrt(mean(input ** 2) + eps)) over the last dimension.

    Args:
        input: [..., d] bfloat16, float32 (float16, float64: reference only). weight: [d], dtype of input.
        eps: added to the mean square.

    Returns:
        [..., d]; computed in float32 (float64 for float64), rounded to the dtype before and after the product with weight.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Source: arXiv 1910.07467.
    """
    return registry.call("rms_norm", impl, input, weight, eps)


def rotary(rows: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> None:
    """Rotary position embedding over the whole head width, in place: halves of a head turn together.

    Args:
        rows: [B, R, H, D] queries or keys, bfloat16, float32 (float16, float64: reference only), D even, last dimension dense.
        cos, sin: [B, R, D], dtype of rows.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees, a strided last dimension.

    Source: arXiv 2104.09864, in the half-split layout of Hugging Face's Llama.
    """
    registry.call("rotary", impl, rows, cos, sin)


def top_marginals(logits: Tensor, rows: Tensor, num_ranks: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The most probable tokens of some rows of scores, which `draft_tree` grows the next tree from.

    Args:
        logits: [B, R, V] floats, any strides.
        rows: [B, k] int64, which of the R rows.
        num_ranks: K, 1..V.

    Returns:
        probabilities: [B, k, K] float32 softmax of the row, descending; 0 in a row that holds NaN or has no finite peak.
        candidates: [B, k, K] int64 their tokens; among equals the extension puts the lower token first, torch any; in
            a row of probability 0 any tokens.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a row out of range.
    """
    return registry.call("top_marginals", impl, logits, rows, num_ranks)


def condition_marginals(
    probabilities: Tensor,
    candidates: Tensor,
    root_token: Tensor,
    source: Tensor,
    target: Tensor,
    num_ranks: int,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Marginals behind each token that may come before them: a bigram factor of rank r, ready for `draft_tree`.

    Row c of depth e > 1 follows candidate c of depth e - 1, every row of depth 1 the root token. In it p'(x) is
    proportional to p(x) * exp(source[previous] . target[x]) over the K candidates of the depth, whose probabilities keep
    their sum. A row that has no finite sum gets probabilities 0.

    Args:
        probabilities: [B, k, K] float32, not negative; k and K at least 1. candidates: [B, k, K] int64 their tokens,
            0..V - 1.
        root_token: [B] int64, 0..V - 1.
        source, target: [V, r] floats of one dtype; products are summed in float32.
        num_ranks: candidates of a row to return, 1..K.

    Returns:
        probabilities: [B, k, K, num_ranks] float32, descending.
        order: [B, k, K, num_ranks] int32, which candidate of the depth has them; among equals the earlier comes first.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees; on a CPU also a token out of range.
    """
    return registry.call("condition_marginals", impl, probabilities, candidates, root_token, source, target, num_ranks)
