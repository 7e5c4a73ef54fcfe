"""Functions that take turns, one step each: what a GPU may do with the programs of a launch."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Programs:
    """Runs functions as if at once: each until it calls `pause`, then the next one."""

    def __init__(self, programs: list[Callable[[], None]]) -> None:
        self.turns = [threading.Semaphore(0) for _ in programs]
        self.live = list(range(len(programs)))
        self.running = 0
        self.done = threading.Semaphore(0)
        self.errors: list[BaseException] = []
        for place, program in enumerate(programs):
            threading.Thread(target=self._run, args=(place, program), daemon=True).start()

    def run(self) -> None:
        """Returns when all are done; raises what one of them raised."""
        self.turns[0].release()
        self.done.acquire()
        if self.errors:
            raise self.errors[0]

    def _run(self, place: int, program: Callable[[], None]) -> None:
        self.turns[place].acquire()
        try:
            program()
        except BaseException as error:
            self.errors.append(error)
        following = self._following(place)
        self.live.remove(place)
        if self.live:
            self._go_on(following)
        else:
            self.done.release()

    def pause(self) -> None:
        """Called by the program that runs: let the others run until it is its turn again."""
        place = self.running
        following = self._following(place)
        if following != place:
            self._go_on(following)
            self.turns[place].acquire()

    def _following(self, place: int) -> int:
        return self.live[(self.live.index(place) + 1) % len(self.live)]

    def _go_on(self, place: int) -> None:
        self.running = place
        self.turns[place].release()
