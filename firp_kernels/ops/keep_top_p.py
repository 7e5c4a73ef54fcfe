"""`firp::keep_top_p`: nucleus sampling over rows of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from firp_kernels import checks, registry

SCHEMA = "(Tensor scores, float top_p, int min_tokens_to_keep, float filter_value) -> Tensor"


def keep_top_p(
    scores: Tensor, top_p: float, min_tokens_to_keep: int = 1, filter_value: float = float("-inf"),
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """The most probable tokens of each row whose probabilities together reach top_p; the others get `filter_value`.

    Tokens stand in ascending order of their scores, equal ones in the order of their ids. A token is left out where it
    and all before it have at most 1 - top_p of the probability, unless it is one of the last `min_tokens_to_keep`. This
    is Hugging Face's `TopPLogitsWarper`. The reference adds up in its order and float32. The Triton kernel sorts
    nothing and adds up in float64, so the two may part by the token at which the sum meets 1 - top_p.

    Args:
        scores: [R, V] float32 (float64: reference only), -inf allowed. A row with NaN, inf or nothing finite stays.
        top_p: 0..1.
        min_tokens_to_keep: at least 1.
        filter_value: of the tokens that are left out.

    Returns:
        [R, V] contiguous, dtype of scores.

    Raises:
        ValueError, TypeError: a shape or dtype that disagrees, a number out of range.

    Source: nucleus sampling, arXiv 1904.09751.

    Example:
        >>> import torch, firp_kernels
        >>> scores = torch.tensor([[0.1, 0.5, 0.4]]).log()
        >>> firp_kernels.keep_top_p(scores, 0.8, filter_value=-9.0).exp().mul(10).round().tolist()
        [[0.0, 5.0, 4.0]]
    """
    return registry.call("keep_top_p", impl, scores, top_p, min_tokens_to_keep, filter_value)


def fake(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape)


def check(scores: Tensor, top_p: float, min_tokens_to_keep: int) -> None:
    checks.shape("scores", scores, None, None)
    checks.dtype("scores", scores, torch.float32, torch.float64)
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected 0..1")
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep: got {min_tokens_to_keep}, expected at least 1")


def reference(scores: Tensor, top_p: float, min_tokens_to_keep: int, filter_value: float) -> Tensor:
    check(scores, top_p, min_tokens_to_keep)
    ascending, tokens = scores.sort(dim=-1, stable=True)
    left_out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    left_out[:, -min_tokens_to_keep:] = False
    return scores.masked_fill(left_out.scatter(1, tokens, left_out), filter_value).contiguous()
