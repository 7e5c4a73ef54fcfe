"""The refiner: pseudo states updated with tokens that are decided only after their forward.

A pseudo row is computed before the token after its node is chosen. When the next tree is drafted that token is known,
the root. The refiner updates the final states of the k pseudo rows with it before the head scores them. A row of depth
2 or more is updated once more for each candidate of the depth above, so that a child is scored given its parent:

    inner = inputs[0] @ unit(state) + inputs[1] @ unit(embedding of the root) [+ inputs[2] @ unit(embedding of the
    parent)] state' = state + rms(state) * outputs @ silu(inner + bias)

Every depth has weights of its own. Zeros in `outputs` change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-6


def unit(rows: Tensor) -> Tensor:
    """Rows [..., d] scaled to a mean square of 1."""
    return rows / root_mean_square(rows)


def root_mean_square(rows: Tensor) -> Tensor:
    """[..., d] to [..., 1], in the rows' dtype."""
    return rows.float().pow(2).mean(-1, keepdim=True).add(EPSILON).sqrt().to(rows.dtype)


@dataclass(frozen=True)
class Refiner:
    """Weights of the refiner, of one dtype, on one device.

    Attributes:
        inputs: [k, 3, w, d] maps of the state, of the root's embedding and of the parent's embedding.
        bias: [k, w].
        outputs: [k, d, w].
        linear: the function that multiplies rows [..., a] by a weight [b, a].
    """

    inputs: Tensor
    bias: Tensor
    outputs: Tensor
    linear: Callable[[Tensor, Tensor], Tensor] = functional.linear

    def inner(self, states: Tensor, root: Tensor) -> Tensor:
        """What the root makes of rows of the first k' depths, before the parent's part.

        Args:
            states: [n, k', d] final states before the last norm; depth 0 has no drafted token between it and the root.
            root: [n, d] `unit` embeddings of the token that is known.

        Returns:
            [n, k', w].
        """
        sized = unit(states)
        parts = [
            self.linear(sized[:, depth], self.inputs[depth, 0])
            + self.linear(root, self.inputs[depth, 1])
            + self.bias[depth]
            for depth in range(states.shape[1])
        ]
        return torch.stack(parts, 1)

    def updated(self, depth: int, state: Tensor, inner: Tensor, parent: Tensor | None = None) -> Tensor:
        """States of one depth, updated.

        Args:
            state, inner: [..., d] and [..., w] of the depth.
            parent: [..., d] `unit` embeddings of the token before; None where it is not known. It may have more rows
                than `state`, which is then the same for all of them.

        Returns:
            [..., d].
        """
        if parent is not None:
            inner = inner + self.linear(parent, self.inputs[depth, 2])
        return state + root_mean_square(state) * self.linear(functional.silu(inner), self.outputs[depth])

    def marginal(self, states: Tensor, inner: Tensor) -> Tensor:
        """States [n, k', d] of the first k' depths, updated with the root alone."""
        return torch.stack([self.updated(d, states[:, d], inner[:, d]) for d in range(states.shape[1])], 1)
