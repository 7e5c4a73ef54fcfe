"""`tuned.json` beside a predictor: the trees that `firp tune` found fastest, per machine and batch size."""

from __future__ import annotations

import json
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import MAX_NODES, TreeConfig
from firp.tools.files import read_object, write_atomically
from firp.tools.hardware import device_name

T = TypeVar("T")

FILE_NAME = "tuned.json"
HEADS = ("one-pass", "two-pass")


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
        """The tree of the smallest tuned batch that is no smaller; beyond them all, the largest's, shrunk to
        its share."""
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


def _mended(path: Path, error: object) -> ValueError:
    return ValueError(f"{FILE_NAME}: {path}: {error}; remove it and run `firp tune` again")


def _read(folder: Path) -> dict:
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        raise _mended(path, error) from error


def load_tuned(folder: Path, name: str) -> Tuned | None:
    """What `firp tune` wrote in `folder` for the machine `name`; None where it was not tuned.

    The figures beside the choices (tau, milliseconds) are for people: they are not read.

    Raises:
        ValueError: a file that `firp tune` did not write; file and field are named.
    """
    document = _read(folder)
    if name not in document:
        return None
    try:
        entry = _object(document, name)
        trees = {_batch_size(size): _tree(_object(entry["trees"], size)) for size in _object(entry, "trees")}
        if not trees:
            raise ValueError("trees: got none, expected at least one")
        return Tuned(_integer(entry, "num_offsets"), TunedTree.made_of(trees), _head(entry))
    except ValueError as error:
        raise _mended(folder / FILE_NAME, f"entry {name!r}: {error}") from error


def _field(fields: dict, name: str, kind: type[T], expected: str) -> T:
    """Value of a field; a boolean is no integer."""
    value = fields.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name}: got {reprlib.repr(value)}, expected {expected}")
    return value


def _object(fields: dict, name: str) -> dict:
    return _field(fields, name, dict, "an object")


def _integer(fields: dict, name: str) -> int:
    value = _field(fields, name, int, "an integer")
    if not 1 <= value <= MAX_NODES:
        raise ValueError(f"{name}: got {reprlib.repr(value)}, expected 1..{MAX_NODES}")
    return value


def _head(fields: dict) -> str | None:
    head = fields.get("head", "nothing")
    if head not in (None, *HEADS):
        raise ValueError(f"head: got {reprlib.repr(head)}, expected one of {', '.join(HEADS)}, or null")
    return head


def _batch_size(key: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", key):
        raise ValueError(f"trees: got batch size {reprlib.repr(key)}, expected a number of 1 to 6 digits")
    return int(key)


def _tree(fields: dict) -> TreeConfig:
    return TreeConfig(
        _integer(fields, "num_nodes"),
        _integer(fields, "num_lookahead"),
        _field(fields, "tree_kind", str, "a string"),
    )


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
    folder = predictor.folder
    tuned = None if folder is None else load_tuned(folder, machine(device, dtype))
    if folder is None or tuned is None:
        return predictor, predictor.tree, None
    if tuned.num_offsets > predictor.num_offsets:
        raise ValueError(
            f"{FILE_NAME}: {folder / FILE_NAME} was tuned for {tuned.num_offsets} offsets, the predictor has "
            f"{predictor.num_offsets}; run `firp tune` again"
        )
    return predictor.first_offsets(tuned.num_offsets), tuned.tree, tuned.head
