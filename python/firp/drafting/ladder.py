"""Which of a few trees the next step drafts, by how well drafts have done in this run so far.

A profile tells what drafts deliver on average; a text may be easier or harder. The ladder estimates the share of the
expected drafts that this run accepts, and takes the rung that is fastest at that share. It looks at tokens and at the
measured figures, never at a clock: given its rungs, a run repeats exactly.
"""

from __future__ import annotations

from firp.drafting.choices import Rung, best_rung

# Each step keeps this share of what is known from the steps before.
MEMORY = 0.9
# What the profile expects counts as so many steps at the start, and as so many where plain decoding tries drafts again.
TRUST, TRUST_AGAIN = 3.0, 2.0
# Another rung has to be this much faster.
HYSTERESIS = 1.03
# Drafts are not tried again where only this share of what the profile expects would pay.
PLAUSIBLE = 1.5
# Plain steps before drafts are tried again; each try that fails doubles them.
WAIT, LONGEST_WAIT = 32, 256


class Ladder:
    """The state of one run.

    Args:
        rungs: plain decoding first.
        num_offsets: k, the most drafts that a step accepts.

    Attributes:
        rung: what the next step drafts.
        share: accepted drafts over those that the profile expects, by recent steps.
        steps: rung -> steps that verified its tree.
    """

    def __init__(self, rungs: tuple[Rung, ...], num_offsets: int) -> None:
        self.num_offsets = num_offsets
        self.steps: dict[Rung, int] = {}
        self._accepted = self._expected = 0.0
        self._wait, self._plain_steps = WAIT, 0
        self.use(rungs)

    def use(self, rungs: tuple[Rung, ...]) -> None:
        """Go on with the rungs of another batch size."""
        self.rungs = rungs
        started = bool(self.steps)
        self.rung = self._fastest(rungs[0]) if started else best_rung(rungs)
        if not started:
            self._trust(1.0, TRUST)

    def _trust(self, share: float, steps: float) -> None:
        most = max(rung.tau for rung in self.rungs) - 1
        self._expected = steps * most
        self._accepted = share * self._expected

    @property
    def share(self) -> float:
        return self._accepted / self._expected if self._expected else 0.0

    def speed(self, rung: Rung) -> float:
        """Tokens per second of one sequence at the share that this run accepts."""
        return min(1 + self.share * (rung.tau - 1), 1 + self.num_offsets) / rung.seconds

    def observe(self, rung: Rung, tokens: float) -> None:
        """Take note of a step that verified a tree of `rung` and delivered `tokens` to a sequence on average."""
        self.steps[rung] = self.steps.get(rung, 0) + 1
        plain = self.rungs[0]
        if rung.tree.num_nodes > 1:
            self._accepted = MEMORY * self._accepted + max(tokens - 1, 0.0)
            self._expected = MEMORY * self._expected + rung.tau - 1
            self._plain_steps = 0
            before, self.rung = self.rung, self._fastest(self.rung)
            if self.rung is plain and before is not plain:
                self._wait = min(2 * self._wait, LONGEST_WAIT)
            elif self.speed(self.rung) > HYSTERESIS**2 * self.speed(plain):
                self._wait = WAIT
            return
        self._plain_steps += 1
        if self.rung is plain and len(self.rungs) > 1 and self._plain_steps >= self._wait:
            self._try_again()

    def _fastest(self, current: Rung) -> Rung:
        best = max(self.rungs, key=self.speed)
        return best if current not in self.rungs or self.speed(best) > HYSTERESIS * self.speed(current) else current

    def _try_again(self) -> None:
        """Draft with the tree that pays at the least share, trusted just so far that a few failures end the trial."""
        plain = self.rungs[0]
        pays, first = min(
            (((plain.speed * r.seconds - 1) / max(r.tau - 1, 1e-9), r) for r in self.rungs[1:]),
            key=lambda pair: pair[0],
        )
        self._plain_steps = 0
        if pays <= PLAUSIBLE:
            self._trust(max(pays, 0.0) * HYSTERESIS, TRUST_AGAIN)
            self.rung = first
