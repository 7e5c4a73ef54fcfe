"""Progress bars of Hugging Face's loading, converting and saving: on a terminal only."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging

# Where transformers 5 makes its bars. Its own switch is for the whole process, and does not reach the second.
MAKERS = ((type(logging.tqdm), "__call__"), (gguf, "tqdm"))

_lock = threading.Lock()
_quiet_threads: list[int] = []
_originals: list[Callable] = []


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Within it, this thread's bars of `transformers` are shown only if stderr is a terminal.

    Bars of other threads and a caller's own settings are left alone; afterwards all is as it was.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    with _lock:
        if not _quiet_threads:
            _originals[:] = [getattr(place, name) for place, name in MAKERS]
            for (place, name), original in zip(MAKERS, _originals, strict=True):
                setattr(place, name, _quiet(original))
        _quiet_threads.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _quiet_threads.remove(threading.get_ident())
            if not _quiet_threads:
                for (place, name), original in zip(MAKERS, _originals, strict=True):
                    setattr(place, name, original)


def _quiet(make: Callable) -> Callable:
    @functools.wraps(make)
    def bar(*args: object, **options: object) -> object:
        if threading.get_ident() in _quiet_threads:
            options["disable"] = True
        return make(*args, **options)

    return bar
