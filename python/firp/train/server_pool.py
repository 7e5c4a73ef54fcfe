"""Many prompts to several servers: bounded concurrency, and attempts again after a back-off."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from firp.train.server import Refused, Server, ServerAnswer, Unavailable

ATTEMPTS = 8
LONGEST_WAIT_S = 60.0
# A server may ask for longer, up to this.
LONGEST_RETRY_AFTER_S = 600.0

Key = TypeVar("Key")


@dataclass(frozen=True)
class Outcome(Generic[Key]):
    """What came of a request: `answer`, or None and the `error` of the last of `attempts`."""

    key: Key
    answer: ServerAnswer | None
    attempts: int
    error: str = ""


class ServerPool:
    """Servers of the same model.

    A request goes to the server with the fewest requests in flight. One that refused a connection, was too busy or
    broke off is left alone for 1, 2, 4, ... seconds, by the attempts of that request, or for as long as it asked.

    Args:
        servers: at least one.
        wait: sleeps that many seconds; by default until the run ends at most.
        clock: seconds, as `wait` counts them.
    """

    def __init__(
        self,
        servers: list[Server],
        wait: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.servers, self.clock = servers, clock
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._lock = threading.Lock()
        self._in_flight = [0] * len(servers)
        self._rests_until = [0.0] * len(servers)

    def _take(self) -> tuple[int, float]:
        """The place of the server to ask next, and the seconds until it may be asked."""
        with self._lock:
            now = self.clock()
            rests = [max(until - now, 0.0) for until in self._rests_until]
            place = min(range(len(self.servers)), key=lambda i: (rests[i], self._in_flight[i]))
            self._in_flight[place] += 1
            return place, rests[place]

    def _give_back(self, place: int, rest: float = 0.0) -> None:
        with self._lock:
            self._in_flight[place] -= 1
            self._rests_until[place] = max(self._rests_until[place], self.clock() + rest)

    def ask(self, key: Key, request: dict) -> Outcome[Key]:
        """The outcome of one request.

        Raises:
            WrongServer: no request of this kind can be answered.
        """
        said = ""
        for attempt in range(1, ATTEMPTS + 1):
            place, seconds = self._take()
            rest = 0.0
            try:
                if seconds:
                    self._wait(seconds * random.uniform(1.0, 1.25))  # not all at once
                if self._stopped.is_set():
                    break
                return Outcome(key, self.servers[place].complete(request), attempt)
            except Refused as error:
                return Outcome(key, None, attempt, str(error))
            except Unavailable as error:
                said = str(error)
                rest = min(2.0 ** (attempt - 1), LONGEST_WAIT_S)
                if error.after is not None:
                    rest = max(rest, min(error.after, LONGEST_RETRY_AFTER_S))
            finally:
                self._give_back(place, rest)
        return Outcome(key, None, attempt, said)

    def ask_all(self, requests: Iterable[tuple[Key, dict]], concurrency: int) -> Generator[Outcome[Key], None, None]:
        """Outcomes as they come, with at most `concurrency` requests in flight.

        A caller that stops early leaves the answers that are under way to their servers.

        Raises:
            WrongServer: as `ask`.
        """
        first = list(itertools.islice(requests := iter(requests), concurrency))
        pending = itertools.chain(first, requests)
        results: queue.Queue[Outcome[Key] | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                while not self._stopped.is_set():
                    with self._lock:
                        item = next(pending, None)
                    if item is None:
                        break
                    results.put(self.ask(*item))
                results.put(None)
            except BaseException as error:
                results.put(error)

        try:
            for _ in first:  # a request that hangs does not keep the process from ending
                threading.Thread(target=work, daemon=True).start()
            working = len(first)
            while working:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    working -= 1
                else:
                    yield result
        finally:
            self._stopped.set()
