"""A figure's JSON: parts that are computed one at a time and kept as they come."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from firp.tools.files import check_writable, read_object, write_atomically
from firp.train.data import TextDataset


def digest(data: bytes) -> str:
    """A name for what figures were made from, such as a file of prompts."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_text(dataset: TextDataset) -> str:
    """A name for training text: its tokens, and where sequences and answers begin."""
    return digest(b"".join(array.tobytes() for array in (dataset.tokens, dataset.offsets, dataset.prompt_lengths)))


def make_folder(field: str, path: Path) -> None:
    """Make a folder that an option names, where it is not there.

    Raises:
        ValueError: a file is in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{field}: got {str(path)!r}, expected a folder, not a file or what is below one") from error


def check(found: dict, fields: Sequence[str] = ()) -> None:
    """Whether an object that was read is a figure's JSON.

    Args:
        fields: that the figures of every part have.

    Raises:
        ValueError: it is not (what is missing is named).
    """
    for name in ("settings", "parts"):
        if not isinstance(found.get(name), dict):
            raise ValueError(f"got no {name}, expected those of a figure")
    for name, part in found["parts"].items():
        if not isinstance(part, dict) or not isinstance(part.get("figures"), dict) or not part["figures"]:
            raise ValueError(f"part {name!r}: got no figures")
        for field in fields:
            if field not in part["figures"]:
                raise ValueError(f"part {name!r}: got figures without {field!r}")


def same_settings(path: Path, kept: dict, given: dict, remedy: str = "choose another file or remove it") -> None:
    """Whether work that a file holds, done with the settings `kept`, may be gone on with.

    Args:
        remedy: what to do where it may not.

    Raises:
        ValueError: not with those given (the first that differs is named).
    """
    for name in {**given, **kept}:
        if kept.get(name) != given.get(name):
            raise ValueError(f"{name}: got {given.get(name)!r}, but {path} is of {kept.get(name)!r}; {remedy}")


def keep_settings(path: Path, settings: dict, runs: Sequence[Path]) -> None:
    """Keep what runs were begun with, for the calls that go on with them.

    Args:
        runs: folders that are there once a run was begun.

    Raises:
        ValueError: they were begun with other settings (the field is named), or nobody knows with which.
    """
    if path.is_file():
        try:
            kept = read_object(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; remove its folder to begin again") from error
        same_settings(path, kept, json.loads(json.dumps(settings)), "choose another output folder")
        return
    if any(run.exists() for run in runs):
        raise ValueError(f"output: got {path.parent} with a run of unknown settings, expected another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda staged: staged.write_text(json.dumps(settings, indent=1) + "\n"))


class Document:
    """`path` holds `settings`, and for each part what it was made from, where, in which time, and its figures.

    A part is kept as long as what it was made from stays the same; else it is computed again.

    Args:
        path: the JSON file; one that is damaged, or of other settings, is refused.
        settings: of all parts.
        environment: of this machine.
        fields: that the figures of every part have.

    Raises:
        OSError: a file that could not be written.
        ValueError: a file that is no such document, or one of other settings (the field is named).
    """

    def __init__(self, path: Path, settings: dict, environment: dict, fields: Sequence[str] = ()) -> None:
        self.path, self.environment = path, environment
        self.settings = json.loads(json.dumps(settings))
        self.parts: dict[str, dict] = {}
        make_folder("json", path.parent)
        check_writable(path)
        if path.is_file():
            try:
                found = read_object(path)
                check(found, fields)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; choose another file, or remove it to begin again") from error
            same_settings(path, found["settings"], self.settings)
            self.parts = found["parts"]

    def part(self, name: str, made_from: dict, compute: Callable[[], dict]) -> dict:
        """Figures of a part, computed where they are not there."""
        made_from = json.loads(json.dumps(made_from))
        kept = self.parts.get(name)
        if kept is None or kept.get("made_from") != made_from:
            started = time.monotonic()
            figures = json.loads(json.dumps(compute()))
            seconds = round(time.monotonic() - started, 1)
            self.parts[name] = {
                "made_from": made_from, "seconds": seconds, "environment": self.environment, "figures": figures,
            }  # fmt: skip
            self.save()
        return self.parts[name]["figures"]

    def save(self) -> None:
        text = json.dumps({"settings": self.settings, "parts": self.parts}, indent=1) + "\n"
        write_atomically(self.path, lambda staged: staged.write_text(text))

    @property
    def figures(self) -> dict[str, dict]:
        """Figures of the parts that are there, by name."""
        return {name: part["figures"] for name, part in self.parts.items()}
