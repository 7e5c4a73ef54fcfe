"""Atomic file writes, one-sentence disk errors, and strict JSON reading."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

MAX_OBJECT_BYTES = 1 << 24
FREE_SPACE = "free some space or choose another place"
OTHER_PLACE = "choose a place that can be written"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: OTHER_PLACE,
    errno.EPERM: OTHER_PLACE,
    errno.EROFS: OTHER_PLACE,
    errno.EISDIR: "name a file in it",
}


def cache_dir() -> Path:
    """Folder for what is made once and kept: $FIRP_CACHE, or `firp` under $XDG_CACHE_HOME (default ~/.cache).

    Raises:
        FileNotFoundError: neither is set, and the user has no home folder.
    """
    own, shared = os.environ.get("FIRP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else Path(shared or Path.home() / ".cache") / "firp"
    except RuntimeError as error:
        raise FileNotFoundError("the home folder is unknown; choose a place that can be written") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then move the result to `path`: a kill leaves the old one or the new one.

    Args:
        path: a file, or a folder that is not there yet; folders above it are made.

    Raises:
        OSError: what the disk refuses, in one sentence; what was at `path` is unchanged.
    """
    with explained(path), staging(path) as folder:
        write(folder / path.name)
        os.replace(folder / path.name, path)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write in, removed at the end; those that killed processes left for `path` go first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    with ExitStack() as stack:
        held = False
        while not held:
            folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
            with suppress(FileNotFoundError):  # another process took it for stale before it was locked
                stack.enter_context(_held(folder, wait=True))
                held = folder.is_dir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Remove what killed processes left beside `path`: staging folders that no process holds."""
    with suppress(OSError):
        for folder in [Path(entry.path) for entry in os.scandir(path.parent) if entry.name.startswith(_prefix(path))]:
            with suppress(OSError), _held(folder) as held:
                if held:
                    shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing the file `path` would end in, before the work that it is to hold."""
    with explained(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with staging(path) as folder:
            (folder / path.name).touch()


@contextmanager
def locked(folder: Path, waiting: str | None = None) -> Iterator[None]:
    """Keep other processes that ask for the same folder out; a process that ends, however it ends, lets go.

    Args:
        waiting: said on stderr where another process holds it, which is then waited for; None does not wait.

    Raises:
        BlockingIOError: another process holds it.
    """
    with _held(folder) as held:
        if held is not False:
            yield
            return
    if waiting is None:
        raise BlockingIOError(f"{folder}: another process is at work in it; wait for it or choose another folder")
    print(f"firp: {waiting}", file=sys.stderr)
    with _held(folder, wait=True):
        yield


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the disk, or a serializer on it, raises while `path` is written into one sentence.

    Raises:
        OSError: of the subclass and errno of the cause; the sentence names `path`, the reason and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            cause = error.__context__  # what torch.save was handling as it raised a RuntimeError
        number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        code = int(number[1]) if number else getattr(cause, "errno", None)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = os.strerror(int(number[1])) if number else getattr(cause, "strerror", None) or lines[0]
        blocker = next((above for above in path.parents if above.exists()), None)
        if code in (errno.EEXIST, errno.ENOTDIR) and blocker is not None and not blocker.is_dir():
            reason = f"{blocker} is a file, expected a folder"
        remedy = REMEDIES.get(code, "choose another place") if code else "choose another place"
        sentence = f"cannot write {path}: {reason}; what was there before is unchanged; {remedy}"
        explanation = type(cause)(sentence) if isinstance(cause, OSError) else OSError(sentence)
        explanation.errno = code
        raise explanation from error


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}.firp-"


@contextmanager
def _held(folder: Path, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder: True, False where another process has it, None where the system or its disk knows no locks."""
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held: bool | None = True
        except OSError as error:
            held = False if isinstance(error, BlockingIOError) else None
        yield held
    finally:
        os.close(descriptor)


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


def read_once(path: Path, read: Callable[[Path], T]) -> T:
    """`read(path)`, or what it returned before, while the file stays as it was written. Not to be changed."""
    try:
        facts = path.stat()
    except OSError:  # `read` says what is wrong, or that nothing is there
        return read(path)
    return _read_at(path, read, (facts.st_mtime_ns, facts.st_ino, facts.st_size))


@functools.lru_cache(maxsize=32)
def _read_at(path: Path, read: Callable[[Path], T], version: tuple[int, ...]) -> T:
    return read(path)


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
