"""An acceptance profile: how far draft trees of any size would have held the model's own tokens.

`firp.drafting.recording` makes one at held-out positions. From it follow, without the model and on any machine, the
tokens that a step delivers with each tree: tau.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firp.drafting.trees import MAX_NODES, MAX_RANKS, TreeConfig

FILE_NAME = "acceptance.npz"
# Sizes N of dynamic trees that a profile knows.
NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ABSENT = 255


def ranges(num_offsets: int) -> list[tuple[int, int]]:
    """(levels up u, k) of the trees that k or fewer offsets can draft: they are k - u deep."""
    return [(up, k) for k in range(1, num_offsets + 1) for up in range(k)]


def columns(num_offsets: int) -> dict[tuple[int, int, int], int]:
    """(levels up, k, depth) -> column of `places`."""
    keys = [(up, k, depth) for up, k in ranges(num_offsets) for depth in range(1, k - up + 1)]
    return {key: column for column, key in enumerate(keys)}


@dataclass(frozen=True)
class AcceptanceProfile:
    """What a predictor drafted at every position of S answers of the model.

    Attributes:
        num_offsets: k of the predictor.
        fingerprint: of the predictor (`firp.drafting.predictor.FirpPredictor.fingerprint`).
        lengths: [S] int32 tokens of each answer; n is their sum.
        category: [S] int32, an index into `categories`.
        categories: names.
        places: [n, len(NODES), C] uint8. In the dynamic tree of N nodes that is drafted from the position with k
            offsets, `levels_up` levels above the root: the place of the model's own token at a depth among nodes that
            get pseudo rows first, or `ABSENT` from the tree. Column: `columns`.
        ranks: [n, C] uint8, the rank of that token among the candidates after its own parent, `ABSENT` past the last.
    """

    num_offsets: int
    fingerprint: str
    lengths: np.ndarray
    category: np.ndarray
    categories: tuple[str, ...]
    places: np.ndarray
    ranks: np.ndarray

    def knows(self, tree: TreeConfig, num_offsets: int) -> bool:
        """Whether `replay` can tell of this tree."""
        if not 1 <= num_offsets <= self.num_offsets:
            return False
        if tree.kind == "dynamic":
            return tree.num_nodes in (1, *NODES)
        ranks = [rank for path in tree.rank_paths(num_offsets) for rank in path]
        return tree.num_nodes < ABSENT and max(ranks, default=0) < MAX_RANKS

    def replay(self, tree: TreeConfig, num_offsets: int) -> np.ndarray:
        """Steps that each answer takes with a tree and the first k offsets, [S].

        Raises:
            ValueError: a tree or an offset that the profile does not know.
        """
        if not self.knows(tree, num_offsets):
            raise ValueError(
                f"tree: got {tree} with {num_offsets} offsets, expected 1..{self.num_offsets} offsets, and "
                f"{', '.join(map(str, NODES))} nodes or ranks below {MAX_RANKS}"
            )
        if tree.num_nodes == 1:
            return self.lengths.copy()
        reached = self.reached(tree, num_offsets)
        starts = np.cumsum(self.lengths) - self.lengths
        steps = np.zeros(len(self.lengths), np.int64)
        going = np.arange(len(self.lengths))
        root = np.zeros(len(going), np.int64)
        # The first tree is the root alone, as if nothing had been left of a range of offsets.
        source, up = np.zeros(len(going), np.int64), np.full(len(going), num_offsets)
        while len(going):
            places = reached[starts[going] + source, up]  # [S, k + 1]
            accepted = (places[:, 1:] != ABSENT).cumprod(1).sum(1)
            drafts = (places < tree.num_lookahead) & (np.arange(num_offsets + 1) <= accepted[:, None])
            nearest = num_offsets - drafts[:, ::-1].argmax(1)
            source, up = root + nearest, accepted - nearest
            root = root + accepted + 1
            steps[going] += 1
            left = root < self.lengths[going]
            going, root, source, up = going[left], root[left], source[left], up[left]
        return steps

    def reached(self, tree: TreeConfig, num_offsets: int) -> np.ndarray:
        """[n, k + 1, k + 1] uint8 of (position, levels up, depth): places, 0 for the root, ABSENT past the tree."""
        known = columns(self.num_offsets)
        reached = np.full((len(self.places), num_offsets + 1, num_offsets + 1), ABSENT, np.uint8)
        reached[:, :, 0] = 0
        for up in range(num_offsets):
            own = [known[up, num_offsets, depth] for depth in range(1, num_offsets - up + 1)]
            if tree.kind == "dynamic":
                found = self.places[:, NODES.index(tree.num_nodes)][:, own]
            else:
                found = _static_places(tree.rank_paths(num_offsets), self.ranks[:, own])
            reached[:, up, 1 : found.shape[1] + 1] = found
        return reached

    def tau(self, tree: TreeConfig, num_offsets: int) -> float:
        """Tokens that a step delivers: tokens of all answers / steps."""
        return float(self.lengths.sum() / self.replay(tree, num_offsets).sum())

    def batch_tau(self, tree: TreeConfig, num_offsets: int, batch_size: int) -> float:
        """Tokens a step delivers to each answer of a batch until its slowest is done."""
        return slowest_tau(self.replay(tree, num_offsets) / self.lengths, batch_size)


def slowest_tau(paces: np.ndarray, batch_size: int) -> float:
    """Tokens a step delivers to each answer of a batch until its slowest is done.

    Expected over all batches of S answers, each as long as the others.

    Args:
        paces: [S] steps that a token of each answer takes.
    """
    at_most = np.arange(len(paces) + 1) / len(paces)
    return float(1 / (np.sort(paces) * np.diff(at_most**batch_size)).sum())


def _static_places(paths: list[tuple[int, ...]], ranks: np.ndarray) -> np.ndarray:
    """Node of a static tree at each depth of a path of ranks [n, depths], `ABSENT` where the tree has none."""
    children = np.full((MAX_NODES + 1, ABSENT + 1), MAX_NODES)
    numbers = {(): 0} | {path: number for number, path in enumerate(paths, start=1)}
    for path, number in numbers.items():
        if path and path[-1] < ABSENT:
            children[numbers[path[:-1]], path[-1]] = number
    node, found = np.zeros(len(ranks), np.int64), np.empty_like(ranks)
    for depth in range(ranks.shape[1]):
        node = children[node, ranks[:, depth]]
        found[:, depth] = np.minimum(node, ABSENT)
    return found


def save_profile(path: Path, profile: AcceptanceProfile) -> None:
    """Write a profile as a compressed `.npz` file."""
    named = vars(profile) | {"categories": np.array(profile.categories), "nodes": np.array(NODES)}
    with open(path, "wb") as file:
        np.savez_compressed(file, **named)


def load_profile(path: Path) -> AcceptanceProfile:
    """Read a profile strictly.

    Raises:
        ValueError: a file that `save_profile` did not write; file and field are named.
    """
    with _named(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return _checked({name: archive[name] for name in archive.files})


def profile_fingerprint(path: Path) -> str:
    """Whose profile it is, without reading the rest.

    Raises:
        ValueError: as `load_profile`.
    """
    with _named(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return str(archive["fingerprint"])


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        raise ValueError(f"{path.name}: {path}: {error}; remove it, or record one with `firp tune`") from error


def _checked(named: dict[str, np.ndarray]) -> AcceptanceProfile:
    expected = {"num_offsets", "fingerprint", "lengths", "category", "categories", "places", "ranks", "nodes"}
    if named.keys() != expected:
        raise ValueError(f"got the fields {sorted(named)}, expected {sorted(expected)}")
    k, lengths, categories = named["num_offsets"], named["lengths"], named["categories"]
    if k.shape or k.dtype.kind != "i" or not 1 <= k < MAX_NODES:
        raise ValueError(f"num_offsets: got {str(k)[:40]}, expected an integer of 1..{MAX_NODES - 1}")
    if named["nodes"].tolist() != list(NODES):
        raise ValueError(f"nodes: got {str(named['nodes'])[:80]}, expected {NODES}")
    if lengths.ndim != 1 or lengths.dtype.kind != "i" or not len(lengths) or lengths.min() < 1:
        raise ValueError(f"lengths: got {str(lengths)[:80]}, expected integers of at least 1")
    if categories.ndim != 1 or categories.dtype.kind != "U" or named["fingerprint"].dtype.kind != "U":
        raise ValueError("categories, fingerprint: got something else, expected text")
    category = named["category"]
    if category.shape != lengths.shape or category.dtype.kind != "i":
        raise ValueError(f"category: got shape {category.shape}, expected {lengths.shape} integers")
    if category.min() < 0 or category.max() >= len(categories):
        raise ValueError(f"category: got {category.min()}..{category.max()}, expected 0..{len(categories) - 1}")
    count, width = int(lengths.sum()), len(columns(int(k)))
    for name, shape in (("places", (count, len(NODES), width)), ("ranks", (count, width))):
        if named[name].shape != shape or named[name].dtype != np.uint8:
            raise ValueError(f"{name}: got {named[name].dtype} of shape {named[name].shape}, expected uint8 of {shape}")
    return AcceptanceProfile(
        int(k), str(named["fingerprint"]), lengths, category, tuple(map(str, categories)), named["places"],
        named["ranks"],
    )  # fmt: skip
