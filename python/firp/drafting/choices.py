"""Which trees pay on a machine: measured figures, kept in the user's cache folder for each predictor.

One file for a predictor, `trees/<fingerprint>.json`; in it an entry for each machine (`firp.tools.hardware`). What was
measured elsewhere never matches. `Engine` writes an entry at first use, `firp tune` a more exhaustive one.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from firp.drafting.lookup import MOST_BRANCH
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import FILE_NAME, profile_fingerprint
from firp.drafting.trees import MAX_NODES, TreeConfig
from firp.tools.files import cache_dir, locked, read_object, read_once, write_atomically

T = TypeVar("T")

HEADS = ("one-pass", "two-pass")
# JSON may hold integers that no float does.
LARGEST = sys.float_info.max
# A tree has to be this much faster than plain decoding.
PAYS = 1.03


@dataclass(frozen=True)
class Rung:
    """A tree with its figures on one machine.

    Attributes:
        tree: of one node decodes plainly.
        seconds: of one step. tau: tokens that a step delivers to a sequence.
        branch_seconds: what a branch of 1, 2, ... nodes adds to it; empty where that was not timed.
    """

    tree: TreeConfig
    seconds: float
    tau: float
    branch_seconds: tuple[float, ...] = ()

    @property
    def speed(self) -> float:
        """Tokens per second of one sequence."""
        return self.tau / self.seconds


@dataclass(frozen=True)
class Choice:
    """What was measured on one machine.

    Attributes:
        num_offsets: k of the predictor's offsets that every tree drafts with.
        head: mode of `Engine`; None is its own rule.
        batches: batch size -> rungs, plain decoding first, then by time of a step.
        made_by: "first use" or "firp tune".
    """

    num_offsets: int
    head: str | None
    batches: dict[int, tuple[Rung, ...]]
    made_by: str

    def rungs(self, batch_size: int) -> tuple[Rung, ...] | None:
        """Those of the smallest measured batch that is no smaller; None beyond them all."""
        measured = [size for size in self.batches if size >= batch_size]
        return self.batches[min(measured)] if measured else None

    def holds(self, batch_size: int) -> bool:
        """Whether a run of B sequences may begin with what is here; what was timed at first use is for its own size."""
        return batch_size in self.batches or (self.made_by == "firp tune" and self.rungs(batch_size) is not None)

    def with_batches(self, other: Choice) -> Choice:
        """These batch sizes, and those of another choice of the same k that are not among them."""
        return replace(self, batches=dict(sorted({**other.batches, **self.batches}.items())))

    def as_document(self) -> dict:
        batches = {
            str(size): [
                {
                    "num_nodes": rung.tree.num_nodes, "num_lookahead": rung.tree.num_lookahead,
                    "tree_kind": rung.tree.kind, "step_ms": 1e3 * rung.seconds, "tau": rung.tau,
                    "branch_ms": [1e3 * seconds for seconds in rung.branch_seconds],
                }
                for rung in rungs
            ]
            for size, rungs in sorted(self.batches.items())
        }  # fmt: skip
        return {"num_offsets": self.num_offsets, "head": self.head, "made_by": self.made_by, "batches": batches}


def best_rung(rungs: tuple[Rung, ...]) -> Rung:
    """The fastest; plain decoding where no tree is faster by `PAYS`."""
    best = max(rungs, key=lambda rung: rung.speed)
    return best if best.speed >= PAYS * rungs[0].speed else rungs[0]


def choice_file(predictor: FirpPredictor) -> Path:
    """Where the choices for a predictor are kept.

    Raises:
        FileNotFoundError: as `cache_dir`.
    """
    return cache_dir() / "trees" / f"{predictor.fingerprint()}.json"


def profile_file(predictor: FirpPredictor) -> Path:
    """Where `firp tune` keeps an acceptance profile of a user's own prompts.

    Raises:
        FileNotFoundError: as `cache_dir`.
    """
    return cache_dir() / "profiles" / f"{predictor.fingerprint()}.npz"


def find_profile(predictor: FirpPredictor) -> Path | None:
    """The file of a user's own profile, or of the one beside the predictor; None where there is neither.

    The profile of other weights, which were trained on or cast since, is named on stderr and not used.
    """
    paths = [predictor.folder / FILE_NAME] if predictor.folder is not None else []
    with suppress(FileNotFoundError):  # nowhere to keep one
        paths.insert(0, profile_file(predictor))
    for path in paths:
        if os.path.lexists(path):
            found, own = read_once(path, profile_fingerprint), predictor.fingerprint()
            if found == own:
                return path
            print(f"firp: {path} is the profile of a predictor {found[:8]}, expected {own[:8]}", file=sys.stderr)
    return None


def load_choice(path: Path, machine: str) -> Choice | None:
    """What was measured on `machine`; None where nothing was.

    Raises:
        ValueError: a file that this package did not write; file and field are named.
    """
    return load_choices(path, machine, whole=True).get(machine)


def load_choices(path: Path, machine: str, whole: bool = False) -> dict[str, Choice]:
    """What was measured on `machine`, and in every setting of it that is told after its name, unless `whole`.

    Raises:
        ValueError: as `load_choice`.
    """
    try:
        document = read_once(path, _read)
        names = [name for name in document if name == machine or (not whole and name.startswith(f"{machine}, "))]
        return {name: _choice(_object(document, name)) for name in names}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_choice(path: Path, machine: str, choice: Choice, **notes: object) -> None:
    """Put the entry of one machine into the file, atomically; entries of other machines stay, damaged files do not.

    Args:
        notes: figures for people, which are not read.

    Raises:
        OSError: the disk refuses the file.
    """
    with _updated(path) as document:
        document[machine] = choice.as_document() | notes


def add_batches(path: Path, machine: str, found: Choice) -> None:
    """Add batch sizes to the entry of one machine, beside those that any process kept since; of another k nothing.

    Raises:
        OSError: the disk refuses the file.
    """
    with _updated(path) as document:
        entry = document.get(machine, {})
        try:
            kept = _choice(entry) if machine in document else found
        except (ValueError, AttributeError):
            entry, kept = {}, found
        if kept.num_offsets == found.num_offsets:
            document[machine] = entry | kept.with_batches(found).as_document()


@contextmanager
def _updated(path: Path) -> Iterator[dict]:
    """The file's document, empty for a damaged one, written back at the end; no other process writes meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent, f"waiting for another process that writes to {path.parent}"):
        try:
            document = _read(path)
        except ValueError:
            document = {}
        yield document
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda staging: staging.write_text(text))


def _read(path: Path) -> dict:
    return read_object(path) if os.path.lexists(path) else {}


def _choice(entry: dict) -> Choice:
    batches = {_batch_size(size): _rungs(size, entries) for size, entries in _object(entry, "batches").items()}
    if not batches:
        raise ValueError("batches: got none, expected at least one")
    made_by = _field(entry, "made_by", str, "a string")
    return Choice(_integer(entry, "num_offsets"), _head(entry), dict(sorted(batches.items())), made_by)


def _rungs(size: str, entries: object) -> tuple[Rung, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"batches: {size}: got {reprlib.repr(entries)}, expected a list of objects")
    rungs = tuple(
        Rung(_tree(entry), 1e-3 * _positive(entry, "step_ms"), _positive(entry, "tau"), _branch(entry))
        for entry in entries
    )
    if not rungs or [rung.tree.num_nodes == 1 for rung in rungs] != [True] + [False] * (len(rungs) - 1):
        raise ValueError(f"batches: {size}: expected plain decoding (num_nodes 1) first, and once")
    return rungs


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


def _positive(fields: dict, name: str) -> float:
    value = fields.get(name)
    if type(value) not in (int, float) or not 0 < value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name}: got {reprlib.repr(value)}, expected a positive number")
    return float(value)  # type: ignore[arg-type]


def _branch(fields: dict) -> tuple[float, ...]:
    entries = _field(fields, "branch_ms", list, "a list of numbers")
    if len(entries) > MOST_BRANCH or not all(
        type(entry) in (int, float) and 0 <= entry <= LARGEST for entry in entries
    ):
        raise ValueError(f"branch_ms: got {reprlib.repr(entries)}, expected up to {MOST_BRANCH} numbers of at least 0")
    return tuple(1e-3 * entry for entry in entries)


def _head(fields: dict) -> str | None:
    head = fields.get("head", "nothing")
    if head not in (None, *HEADS):
        raise ValueError(f"head: got {reprlib.repr(head)}, expected one of {', '.join(HEADS)}, or null")
    return head


def _batch_size(key: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", key):
        raise ValueError(f"batches: got batch size {reprlib.repr(key)}, expected a number of 1 to 6 digits")
    return int(key)


def _tree(fields: dict) -> TreeConfig:
    return TreeConfig(
        _integer(fields, "num_nodes"),
        _integer(fields, "num_lookahead"),
        _field(fields, "tree_kind", str, "a string"),
    )
