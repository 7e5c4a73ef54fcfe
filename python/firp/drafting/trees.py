"""Draft trees: which nodes the next step verifies, and which of them look ahead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor

from firp.drafting.rank_paths import smallest_rank_products
from firp.drafting.transition import condition
from firp_kernels.bitmask import num_words, pack_ancestors

TREE_KINDS = ("dynamic", "static")
MAX_NODES = 256
MAX_RANKS = 16


@dataclass(frozen=True)
class DraftTree:
    """The tree one step verifies. Layout and padding are those of `firp_kernels.ops`.

    Attributes:
        tokens: [B, N] int64.
        parents, depths: [B, N] int32.
        ancestors: [B, N, ceil(N/32)] int32 bitmasks.
        lookahead: [B, P] int32.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    lookahead: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """N and P."""
        return self.tokens.shape[1], self.lookahead.shape[1]

    def first(self, count: int) -> DraftTree:
        """The trees of the first `count` sequences alone."""
        return DraftTree(*(tensor[:count] for tensor in vars(self).values()))

    def of_roots(self, roots: Tensor) -> DraftTree:
        """The same shape, one node a sequence, over other roots [B]."""
        return replace(self, tokens=roots[:, None])

    def copy_(self, other: DraftTree) -> None:
        """Take the values of a tree of the same size: one launch for each dtype, none for what the trees share."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        differing = [(tensor, source) for tensor, source in pairs if tensor is not source]
        for dtype in {tensor.dtype for tensor, _ in differing}:
            torch._foreach_copy_(*zip(*((a, b) for a, b in differing if a.dtype == dtype), strict=True))

    def trimmed(self) -> DraftTree:
        """The same tree without the nodes and lookahead slots at its end that hold nothing in any sequence; it reads
        values."""
        nodes, slots = 1 + max(_last_used(self.parents), 0), 1 + _last_used(self.lookahead)
        if (nodes, slots) == self.size:
            return self
        return DraftTree(
            self.tokens[:, :nodes],
            self.parents[:, :nodes],
            self.depths[:, :nodes],
            self.ancestors[:, :nodes, : num_words(nodes)],
            self.lookahead[:, :slots],
        )

    def padded(self, num_nodes: int, num_lookahead: int) -> DraftTree:
        """The same tree with padding nodes and empty lookahead slots at the end, N and P as given."""
        nodes, slots = num_nodes - self.size[0], num_lookahead - self.size[1]
        pad = torch.nn.functional.pad
        alone = pack_ancestors(torch.eye(num_nodes, dtype=torch.bool, device=self.tokens.device)[None])
        ancestors = alone.repeat(self.tokens.shape[0], 1, 1)
        ancestors[:, : self.size[0]] = 0
        ancestors[:, : self.size[0], : self.ancestors.shape[2]] = self.ancestors
        return DraftTree(
            pad(self.tokens, (0, nodes)),
            pad(self.parents, (0, nodes), value=-1),
            pad(self.depths, (0, nodes)),
            ancestors,
            pad(self.lookahead, (0, slots), value=-1),
        )


def check_tree(num_nodes: int, num_lookahead: int, tree_kind: str = "dynamic") -> None:
    """Raise ValueError, naming the field, unless N, P and the tree kind are usable."""
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes: got {num_nodes}, expected 1..{MAX_NODES}")
    if not 1 <= num_lookahead <= num_nodes:
        raise ValueError(f"num_lookahead: got {num_lookahead}, expected 1..{num_nodes} (num_nodes)")
    if tree_kind not in TREE_KINDS:
        raise ValueError(f"tree_kind: got {tree_kind!r}, expected one of {', '.join(TREE_KINDS)}")


@dataclass(frozen=True)
class TreeConfig:
    """Size and kind of the draft tree.

    Attributes:
        num_nodes: N, nodes verified a step, root included; 1 drafts nothing.
        num_lookahead: P, nodes that get pseudo rows.
        kind: "dynamic" grows the N most probable nodes each step; "static" fills a fixed shape.
        paths: for "static", rank paths in Medusa's notation: (0,), (0, 0), (1,) are the most probable token of
            depth 1, its most probable continuation, and the second most probable token of depth 1. Every prefix of a
            path must be a path. None takes the N - 1 paths of the smallest rank products.

    Raises:
        ValueError: a field out of range, or a path without its prefix.
    """

    num_nodes: int = 8
    num_lookahead: int = 2
    kind: str = "dynamic"
    paths: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_tree(self.num_nodes, self.num_lookahead, self.kind)
        if self.paths is None:
            return
        if self.kind != "static":
            raise ValueError(f"paths: given for a {self.kind!r} tree, expected kind 'static'")
        if len(set(self.paths)) != self.num_nodes - 1:
            raise ValueError(
                f"paths: got {len(set(self.paths))} distinct paths, expected num_nodes - 1 = {self.num_nodes - 1}"
            )
        for path in self.paths:
            if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in self.paths):
                raise ValueError(f"paths: {path} is empty, has a negative rank, or lacks its prefix")

    def for_batch(self, batch_size: int) -> TreeConfig:
        """The same kind of tree with a batch's share of the rows: N and P divided by B, at least 1."""
        nodes = max(1, self.num_nodes // batch_size)
        lookahead = max(1, min(nodes, self.num_lookahead // batch_size))
        return TreeConfig(nodes, lookahead, self.kind, self.paths if nodes == self.num_nodes else None)

    def rank_paths(self, num_offsets: int) -> list[tuple[int, ...]]:
        """Static paths in the order of their nodes, parents first; at most `num_offsets` deep."""
        if self.paths is not None:
            if max(len(path) for path in self.paths) > num_offsets:
                raise ValueError(
                    f"paths: deepest path has {max(map(len, self.paths))} levels, expected at most k = {num_offsets}"
                )
            return sorted(self.paths, key=lambda path: (len(path), path))
        return smallest_rank_products(self.num_nodes - 1, num_offsets)


def root_only(root_token: Tensor, num_lookahead: int) -> DraftTree:
    """The tree [B, 1] of the first step, and of plain decoding (num_lookahead 0)."""
    batch, device = root_token.shape[0], root_token.device

    def filled(value: int, *shape: int) -> Tensor:
        return torch.full((batch, *shape), value, dtype=torch.int32, device=device)

    lookahead = filled(0, 1) if num_lookahead else filled(0, 0)
    return DraftTree(root_token[:, None], filled(-1, 1), filled(0, 1), filled(1, 1, 1), lookahead)


def _last_used(places: Tensor) -> int:
    """The last column of [B, n] with a value of at least 0, or -1. A list takes one call of torch."""
    return max((i for row in places.tolist() for i, value in enumerate(row) if value >= 0), default=-1)


class Drafter:
    """Builds draft trees of one `TreeConfig` from marginals.

    Args:
        config: size and kind of the tree.
        num_offsets: k.
        ops: the ops to use, from `firp_kernels.bind`.
        transition: tables of the predictor's token transition (`firp.drafting.transition`), if it has one.
    """

    def __init__(
        self,
        config: TreeConfig,
        num_offsets: int,
        ops: SimpleNamespace,
        transition: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.num_offsets = num_offsets
        self.ops = ops
        self.transition = transition
        self.paths = config.rank_paths(num_offsets) if config.kind == "static" else []
        self._on_device: dict[tuple[torch.device, int], tuple[Tensor, ...]] = {}

    @property
    def num_ranks(self) -> int:
        """K, how many candidates of a depth to draft from; the token before can raise a low one."""
        return self._drafted_ranks if self.transition is None else max(MAX_RANKS, self._drafted_ranks)

    @property
    def _drafted_ranks(self) -> int:
        """How many candidates of a depth a tree can hold."""
        if self.config.kind == "static":
            return 1 + max((rank for path in self.paths for rank in path), default=0)
        return min(max(self.config.num_nodes - 1, 1), MAX_RANKS)

    def draft(
        self,
        probabilities: Tensor,
        candidates: Tensor,
        root_token: Tensor,
        num_offsets: Tensor,
        knows_root: Tensor | None = None,
    ) -> DraftTree:
        """Tree from top-K marginals [B, k, K] of which the first `num_offsets` [B] depths are usable.

        `knows_root` [B]: where the marginals of depth 1 are given the root token already; None: nowhere.
        """
        config, order = self.config, None
        ranks = min(self._drafted_ranks, candidates.shape[2])
        if self.transition is not None:
            probabilities, order = condition(
                self.ops, probabilities, candidates, root_token, self.transition, ranks, knows_root
            )
        if config.kind == "dynamic":
            return DraftTree(
                *self.ops.draft_tree(
                    probabilities, candidates, root_token, num_offsets, config.num_nodes, config.num_lookahead, order
                )
            )
        return self._static(candidates, root_token, num_offsets, order)

    @cached_property
    def _template(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parents [N], depths [N], ranks [N] and ancestors [N, N] (bool) of the static shape."""
        index = {(): 0} | {path: i + 1 for i, path in enumerate(self.paths)}
        parents = [-1] + [index[path[:-1]] for path in self.paths]
        depths = [0] + [len(path) for path in self.paths]
        ranks = [0] + [path[-1] for path in self.paths]
        visible = torch.eye(self.config.num_nodes, dtype=torch.bool)
        for node, parent in enumerate(parents[1:], start=1):
            visible[node] |= visible[parent]
        pad = self.config.num_nodes - len(parents)
        return (
            torch.tensor(parents + [-1] * pad, dtype=torch.int32),
            torch.tensor(depths + [0] * pad, dtype=torch.int32),
            torch.tensor(ranks + [0] * pad),
            visible,
        )

    def _within(self, available: int) -> Tensor:
        """[N] bool: nodes whose path uses ranks below `available` only (a vocabulary may be smaller than a rank)."""
        within = [True] + [max(path) < available for path in self.paths]
        return torch.tensor(within + [False] * (self.config.num_nodes - len(within)))

    def _static(self, candidates: Tensor, root_token: Tensor, num_offsets: Tensor, order: Tensor | None) -> DraftTree:
        available = candidates.shape[2]
        device = candidates.device
        if (device, available) not in self._on_device:
            shape = (*self._template, self._within(available))
            self._on_device[device, available] = tuple(tensor.to(device) for tensor in shape)
        parents, depths, ranks, visible, within = self._on_device[device, available]
        is_root = torch.arange(len(parents), device=device) == 0
        drafted = (depths <= num_offsets[:, None]) & (parents >= 0) & within
        real = drafted | is_root
        level = (depths.long() - 1).clamp(min=0)
        ranks = ranks.clamp(max=available - 1)
        sequence = torch.arange(len(candidates), device=device)[:, None]
        held = ranks.expand(real.shape)
        if order is not None:
            held = torch.zeros_like(held)
            for depth in range(1, self.num_offsets + 1):
                chosen = order[
                    sequence, level, held[:, parents.clamp(min=0)], ranks.clamp(max=order.shape[3] - 1)
                ].long()
                held = torch.where(depths == depth, chosen, held)
        tokens = torch.where(real, candidates[sequence, level, held], 0)
        tokens[:, 0] = root_token
        own = torch.eye(len(parents), dtype=torch.bool, device=device)
        ancestors = pack_ancestors(torch.where(real[..., None], visible, own))
        slots = torch.arange(self.config.num_lookahead, device=device)
        return DraftTree(
            tokens,
            torch.where(real, parents, -1).to(torch.int32),
            torch.where(real, depths, 0).to(torch.int32),
            ancestors,
            torch.where(real[:, slots], slots, -1).to(torch.int32),
        )


def first_tree(roots: Tensor, drafter: Drafter | None, padded: bool) -> DraftTree:
    """The tree of the roots [B] alone, as a run begins with; `padded` gives it the drafter's N and P.

    None drafts nothing.
    """
    tree = root_only(roots, num_lookahead=int(drafter is not None))
    if drafter is None or not padded:
        return tree
    return tree.padded(drafter.config.num_nodes, drafter.config.num_lookahead)
