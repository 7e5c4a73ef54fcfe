"""Files that are there whole or not at all, and JSON that is read strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

MAX_OBJECT_BYTES = 1 << 24


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then move the result to `path`: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def parse_object(text: bytes) -> dict:
    """The JSON object that `text` holds: UTF-8, each name once, finite numbers, no lone surrogates.

    Raises:
        ValueError: anything else, however deeply nested.
    """
    try:
        document = json.loads(text.decode(), object_pairs_hook=_distinct)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()  # NaN, infinity and lone surrogates end here
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start + 1}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"got a lone surrogate {error.object[error.start]!a}, expected whole characters") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"got {type(document).__name__}, expected an object")
    return document


def read_object(path: Path) -> dict:
    """The JSON object in a file, as `parse_object` reads it.

    Raises:
        ValueError: another file, or one that cannot be read; the caller names it.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_OBJECT_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if len(text) > MAX_OBJECT_BYTES:
        raise ValueError(f"got more than {MAX_OBJECT_BYTES} bytes, expected a JSON object")
    return parse_object(text)


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]}: got it twice, expected each name once")
    return fields
