"""The folder beside an output in which `firp distill` keeps finished answers until all are there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from firp.tools.files import check_writable, explained, locked, read_object, staging, write_atomically


@contextmanager
def opened_parts(output: Path, settings: dict) -> Iterator[Path]:
    """The folder `OUTPUT.parts`, held by this process alone; what it holds was begun with the same settings.

    Raises:
        ValueError: a bad output name, parts that are damaged or of other settings (the field is named).
        OSError: the disk refuses a file, or another process is at work on the same output.
    """
    if output.suffix != ".npz":
        raise ValueError(f"output: got {str(output)!r}, expected a name ending in .npz")
    check_writable(output)
    parts = output.with_name(output.name + ".parts")
    with explained(parts):
        parts.mkdir(parents=True, exist_ok=True)
    with locked(parts):
        _check_resumable(parts, settings)
        yield parts


def remove_parts(parts: Path) -> None:
    """Remove the folder; a kill in the middle must not leave parts that a later run takes for its own."""
    with staging(parts) as done:
        os.replace(parts, done / parts.name)


def _check_resumable(parts: Path, settings: dict) -> None:
    """Remember the settings beside the parts; raise ValueError if those there were made with others."""
    record = parts / "config.json"
    if not record.is_file():
        if any(path.suffix in (".npz", ".jsonl") for path in parts.iterdir()):
            raise ValueError(f"output: {parts} holds text without {record.name}; remove it to begin again")
        write_atomically(record, lambda path: path.write_text(json.dumps(settings)))
        return
    try:
        begun = read_object(record)
    except ValueError as error:
        raise ValueError(f"output: {record}: {error}; remove {parts} to begin again") from error
    for name in settings | begun:
        if name not in begun or begun[name] != settings.get(name):
            raise ValueError(
                f"{name}: got {settings.get(name)!r}, but {parts} was begun with {begun.get(name)!r}; "
                "choose another output or the same settings"
            )


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a whole .npz file, or none."""

    def write(staging: Path) -> None:
        with open(staging, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def token_dtype(vocab_size: int) -> type:
    """The smallest of the dtypes that token ids are kept in."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def join_parts(parts: list[dict[str, np.ndarray]], output: Path) -> None:
    """Write what `firp train` reads: arrays of all parts in order, `lengths` as `offsets`."""
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["offsets"] = np.concatenate([[0], arrays.pop("lengths").cumsum()])
    save_arrays(output, **arrays)
