"""`tuned.json` beside a predictor: the trees that `firp tune` found fastest, per machine and batch size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from firp.files import write_atomically
from firp.hardware import device_name
from firp.predictor import FirpPredictor
from firp.trees import TreeConfig

FILE_NAME = "tuned.json"


@dataclass(frozen=True)
class TunedTree(TreeConfig):
    """Trees of one machine; as a `TreeConfig` it is the one of the smallest batch, which has the most rows.

    Attributes:
        trees: (batch size, tree) by increasing batch size.
    """

    trees: tuple[tuple[int, TreeConfig], ...] = ()

    @classmethod
    def made_of(cls, trees: dict[int, TreeConfig]) -> TunedTree:
        ordered = tuple(sorted(trees.items()))
        first = ordered[0][1]
        return cls(first.num_nodes, first.num_lookahead, first.kind, first.paths, ordered)

    def for_batch(self, batch_size: int) -> TreeConfig:
        """The tree of the smallest tuned batch that is no smaller; beyond them all, the largest's, shrunk to its share."""
        for measured, tree in self.trees:
            if measured >= batch_size:
                return tree
        largest, tree = self.trees[-1]
        return tree.for_batch(-(-batch_size // largest))


@dataclass(frozen=True)
class Tuned:
    """What was chosen on one machine: k of the predictor's offsets, the trees, and the head mode of `Engine`."""

    num_offsets: int
    tree: TunedTree
    head: str | None


def machine(device: torch.device | str, dtype: torch.dtype) -> str:
    """What step times depend on, in words: "NVIDIA H200, bfloat16"; a CPU also counts its threads."""
    threads = f", {torch.get_num_threads()} threads" if torch.device(device).type == "cpu" else ""
    return f"{device_name(device)}{threads}, {str(dtype).removeprefix('torch.')}"


def _read(folder: Path) -> dict:
    path = folder / FILE_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{FILE_NAME}: {path} is not JSON: {error}; remove it and run `firp tune` again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{FILE_NAME}: {path} holds {type(document).__name__}, expected an object; remove it and run `firp tune` again")
    return document


def load_tuned(folder: Path, name: str) -> Tuned | None:
    """What `firp tune` wrote in `folder` for the machine `name`; None where it was not tuned.

    Raises:
        ValueError: a file that `firp tune` did not write.
    """
    entry = _read(folder).get(name)
    if entry is None:
        return None
    try:
        trees = {
            int(batch_size): TreeConfig(tree["num_nodes"], tree["num_lookahead"], tree["tree_kind"])
            for batch_size, tree in entry["trees"].items()
        }
        if entry["num_offsets"] < 1:
            raise ValueError(f"num_offsets: got {entry['num_offsets']}, expected at least 1")
        return Tuned(int(entry["num_offsets"]), TunedTree.made_of(trees), entry["head"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{FILE_NAME}: entry {name!r} of {folder / FILE_NAME} cannot be read ({type(error).__name__}: {error}); "
            "remove it and run `firp tune` again"
        ) from error


def save_tuned(folder: Path, name: str, entry: dict) -> Path:
    """Put the entry of one machine into the file, atomically; other machines' entries stay."""
    path = folder / FILE_NAME
    document = _read(folder) | {name: entry}
    write_atomically(path, lambda staging: staging.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n"))
    return path


def own_tree(
    predictor: FirpPredictor, device: torch.device | str, dtype: torch.dtype
) -> tuple[FirpPredictor, TreeConfig, str | None]:
    """The predictor with as many offsets, the tree and the head mode that were tuned for this machine.

    Where nothing was tuned: all offsets, the tree in the predictor's configuration, None.

    Raises:
        ValueError: a damaged file, or one tuned for more offsets than the predictor has.
    """
    tuned = None if predictor.folder is None else load_tuned(predictor.folder, machine(device, dtype))
    if tuned is None:
        return predictor, TreeConfig.of(predictor), None
    if tuned.num_offsets > predictor.num_offsets:
        raise ValueError(
            f"{FILE_NAME}: {predictor.folder / FILE_NAME} was tuned for {tuned.num_offsets} offsets, the predictor has "
            f"{predictor.num_offsets}; run `firp tune` again"
        )
    return predictor.first_offsets(tuned.num_offsets), tuned.tree, tuned.head
