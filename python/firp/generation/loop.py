"""The decode loop: launch steps, read their records, deliver tokens, remove finished sequences.

Where nothing needs the host between two steps, step n + 1 is launched before the record of step n is read, so that a
GPU never waits. A sequence ends on the device; the one step more that it sees there changes nothing.
"""

from __future__ import annotations

import warnings
from collections import deque

import torch

from firp.drafting.choices import Rung
from firp.drafting.ladder import Ladder
from firp.drafting.lookup import Lookup, host_adds_branches
from firp.engine.chooser import Chooser
from firp.engine.engine import Engine
from firp.engine.graphs import drafted_size
from firp.engine.state import DecodeState, DecodeStats, StepRecord
from firp.generation.output import Output
from firp.generation.records import HostRecord, PendingRecord


def run(engine: Engine, state: DecodeState, choose: Chooser, out: Output, late: bool | None = None) -> DecodeStats:
    """Decode `state` to its end; every token goes to `out`, and what the run used goes back to the engine.

    Args:
        late: read each record one step late; None does so on a GPU. A run that needs the host at every step reads at
            once, and warns.

    Raises:
        FloatingPointError: the model's own scores are NaN.
    """
    reason = waits_for_host(choose, out)
    late = engine.view.device.type == "cuda" if late is None else late
    if late and reason:
        warnings.warn(f"firp waits for the host at every step of this run: {reason}", stacklevel=2)
    state.keeps_scores = _keeps_scores(out)
    if choose.seed is not None:
        state.seed.fill_(choose.seed)
    try:
        return _Loop(engine, state, choose, out, late and not reason).decode()
    finally:
        engine.release(state)


def waits_for_host(choose: Chooser, out: Output) -> str | None:
    """What a run needs the host for before its next step, or None."""
    if not choose.on_device:
        return "its logits processors look at the tokens so far"
    if out.criteria:
        return "its stopping criteria look at every token"
    if _keeps_scores(out):
        return "the scores of its tokens are kept"
    return None


def _keeps_scores(out: Output) -> bool:
    return out.scores is not None or out.logits is not None


class _Loop:
    def __init__(self, engine: Engine, state: DecodeState, choose: Chooser, out: Output, late: bool) -> None:
        self.engine, self.state, self.choose, self.out = engine, state, choose, out
        self.delay = int(late)
        rungs = None if state.plain else engine.rungs(state.batch_size)
        self.ladder = None if rungs is None else Ladder(rungs, engine.num_offsets)
        self.stats = DecodeStats()
        self.order = list(range(state.batch_size))
        self.ended: set[int] = set()
        # Beside a record: the rung whose drafts the step verified, None where it had none to verify.
        self.unread: deque[tuple[list[int], Rung | None, StepRecord, PendingRecord]] = deque()
        self.drafted: Rung | None = None
        looks_up = state.history is not None and not late and host_adds_branches(engine.view.device)
        self.lookup = Lookup([out.history(i).tolist() for i in self.order]) if looks_up else None
        # Of the tree that the next step verifies: nodes that are not of a branch, and sequences where it follows one.
        self.own_nodes = 1
        self.after_branch: set[int] = set()

    @torch.no_grad()
    def decode(self) -> DecodeStats:
        while len(self.ended) < len(self.out.emitted):
            with self.out.time.measure("steps"):
                verified = self._next_rung()
                self._make_room()
                record = self.engine.step(self.state, self.choose)
                self.unread.append((self.order, verified, record, PendingRecord(record)))
            if len(self.unread) > self.delay:
                self._look_up(self._hand_over())
                self._compact()
        if self.ladder is not None:
            self.out.rungs = {rung: self.ladder.steps.get(rung, 0) for rung in self.ladder.rungs} | self.ladder.steps
        return self.stats

    def _next_rung(self) -> Rung | None:
        """Set what the next step drafts; returns the rung of the tree that it verifies."""
        if self.ladder is None:
            return None
        verified, rung = self.drafted, self.ladder.rung
        drafts = rung.tree.num_nodes > 1
        self.state.drafter = self.engine.drafter(self.state.batch_size, rung.tree)
        self.drafted = rung if not drafts or self.state.tree.size[1] else None
        sizes = zip(self.state.tree.size, drafted_size(self.state), strict=True)
        if self.engine.captures and any(own > new for own, new in sizes):
            return None  # a graph gives the larger tree up for its root
        return verified

    def _make_room(self) -> None:
        """Let the step see a bucket with room for its rows, for any acceptance of the steps not read yet."""
        committed = max(self.state.lengths[i] + len(self.out.emitted[i]) for i in self.order)
        self.state.use_slots(self.engine.slots(self.state, self.choose, committed, len(self.unread)))

    def _look_up(self, record: StepRecord) -> None:
        """Add to the tree that was just drafted what earlier text lets expect, where it pays."""
        if self.lookup is None or self.ladder is None:
            return
        with self.out.time.measure("steps"):
            ladder, rung = self.ladder, self.drafted or self.ladder.rungs[0]
            going = [sequence for sequence in self.order if sequence not in self.ended]
            prices = [seconds * ladder.speed(rung) for seconds in rung.branch_seconds]
            nodes = self.lookup.pays(going, prices)
            self.own_nodes = self.engine.look_up(self.state, record, nodes)

    def _hand_over(self) -> StepRecord:
        """Read the oldest record and deliver its tokens."""
        order, verified, record, pending = self.unread.popleft()
        with self.out.time.measure("steps"):
            host = pending.read()
        if any(host.status):
            broken = order[host.status.index(1)]
            raise FloatingPointError(
                f"model: its scores after {len(self.out.history(broken))} tokens of sequence {broken} are NaN, "
                "or the processors leave no token"
            )
        with self.out.time.measure("host"):
            if self.choose.one_by_one:
                self.ended |= {i for i, finished in zip(order, host.finished, strict=True) if finished}
            else:
                self._deliver(order, record, host)
            for sequence in self.out.end_together():
                self.ended.add(sequence)
                if sequence in self.order:
                    self.state.finished[self.order.index(sequence)] = True
            counts = self.out.end_step()
            self.stats.add(counts)
            if self.ladder is not None:
                self._observe(self.ladder, verified, counts, order, record)
        return record

    def _observe(
        self, ladder: Ladder, verified: Rung | None, counts: list[int], order: list[int], record: StepRecord
    ) -> None:
        """Tell the ladder what its own drafts delivered, without a branch of the host, and the lookup which tokens are
        new."""
        own = [counts[sequence] for sequence in order]
        # After a branch there are no pseudo rows: that nothing could be drafted there tells nothing of the predictor.
        drafts = verified is not None and verified.tree.num_nodes > 1
        left_out, self.after_branch = self.after_branch if drafts else set(), set()
        if self.lookup is not None:
            paths = record.path.tolist()
            accepted = [sum(0 < node < self.own_nodes for node in path) for path in paths]
            own = [min(count, 1 + nodes) for count, nodes in zip(own, accepted, strict=True)]
            self.after_branch = {i for i, path in zip(order, paths, strict=True) if max(path) >= self.own_nodes}
            for sequence in order:
                if counts[sequence]:
                    self.lookup.observe(sequence, self.out.emitted[sequence][-counts[sequence] :])
        going = [count for sequence, count in zip(order, own, strict=True) if count and sequence not in left_out]
        if verified is not None and going:
            ladder.observe(verified, sum(going) / len(going))

    def _deliver(self, order: list[int], record: StepRecord, host: HostRecord) -> None:
        path = record.path.tolist() if _keeps_scores(self.out) else []
        for slot, sequence in enumerate(order):
            ended = False
            for i in range(host.counts[slot]):
                scores, logits = (
                    None if rows is None else rows[slot, path[slot][i]] for rows in (record.scores, record.logits)
                )
                ended = self.out.deliver(sequence, host.tokens[slot][i], scores, logits)
                if ended:
                    break
            if ended and not host.finished[slot]:
                self.state.finished[slot] = True
            if host.finished[slot] and not ended and sequence not in self.ended:
                raise RuntimeError(
                    f"engine: the cache of {self.state.buffers.capacity} slots is full before sequence {sequence} ended"
                )
            if ended:
                self.ended.add(sequence)

    def _compact(self) -> None:
        """Let ended sequences leave. Processors of any kind see the whole batch at every token: there they stay."""
        going = [slot for slot, sequence in enumerate(self.order) if sequence not in self.ended]
        size = self.engine.compacted_size(len(going))
        if not going or size >= len(self.order) or self.choose.one_by_one:
            return
        gone = [slot for slot, sequence in enumerate(self.order) if sequence in self.ended]
        places = self.engine.compact(self.state, sorted(going + gone[: size - len(going)]))
        self.order = [self.order[slot] for slot in places]
        if self.ladder is not None:
            rungs = self.engine.rungs(len(self.order))
            if rungs is not None and rungs != self.ladder.rungs:
                self.ladder.use(rungs)
