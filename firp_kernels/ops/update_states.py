"""`firp::update_states`: final states of pseudo rows, given the token after their anchor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from firp_kernels import checks, registry

SCHEMA = "(Tensor states, Tensor first, Tensor inputs, Tensor bias, Tensor outputs) -> Tensor"

EPSILON = 1e-6


def update_states(
    states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, outputs: Tensor, impl: str | None = None
) -> Tensor:
    """state + rms(state) * outputs[j] @ silu(inputs[j] @ (unit(state), unit(first)) + bias[j]) for each offset j.

    unit(x) is x / sqrt(mean(x ** 2) + 1e-6), and rms(x) is sqrt(mean(x ** 2)).

    Args:
        states: [B, k, d] bfloat16, float32 (float16, float64: reference only), final states before the last norm.
        first: [B, d], dtype of states, embeddings of the token after each anchor.
        inputs: [k, w, 2 d], bias: [k, w], outputs: [k, d, w], dtype of states.

    Returns:
        [B, k, d]; products are accumulated in float32 (float64 for float64). A row does not depend on the others.

    Raises:
        ValueError, TypeError: a shape, dtype or device that disagrees.

    Example:
        >>> import torch, firp_kernels
        >>> states, first = torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 2)
        >>> inputs, outputs = torch.zeros(1, 3, 4), torch.ones(1, 2, 3)
        >>> firp_kernels.update_states(states, first, inputs, torch.zeros(1, 3), outputs).tolist()
        [[[3.0, 4.0]]]
    """
    return registry.call("update_states", impl, states, first, inputs, bias, outputs)


def fake(states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, outputs: Tensor) -> Tensor:
    return states.new_empty(states.shape)


def check(states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, outputs: Tensor) -> None:
    checks.same_device(states=states, first=first, inputs=inputs, bias=bias, outputs=outputs)
    checks.shape("states", states, None, None, None)
    batch, offsets, width = states.shape
    checks.shape("first", first, batch, width)
    checks.shape("inputs", inputs, offsets, None, 2 * width)
    checks.shape("bias", bias, *inputs.shape[:2])
    checks.shape("outputs", outputs, offsets, width, inputs.shape[1])
    checks.dtype("states", states, *checks.FLOATS)
    for name, tensor in (("first", first), ("inputs", inputs), ("bias", bias), ("outputs", outputs)):
        checks.dtype(name, tensor, states.dtype)


def updated(states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, outputs: Tensor) -> Tensor:
    """The formula in torch, to be differentiated or compiled."""
    known, seen = (functional.rms_norm(rows, rows.shape[-1:], eps=EPSILON) for rows in (first, states))
    rows = torch.cat([seen, known[:, None].expand_as(seen)], -1)
    inner = functional.silu(torch.einsum("nka,kba->nkb", rows, inputs) + bias)
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=checks.computed_in(states.dtype))
    size = (length * states.shape[-1] ** -0.5).to(states.dtype)
    return states + size * torch.einsum("nka,kba->nkb", inner, outputs)


def reference(states: Tensor, first: Tensor, inputs: Tensor, bias: Tensor, outputs: Tensor) -> Tensor:
    check(states, first, inputs, bias, outputs)
    return updated(states, first, inputs, bias, outputs)
