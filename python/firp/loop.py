"""The host's side of decoding: step until every sequence has ended, handing over tokens as they are accepted."""

from __future__ import annotations

from firp.choice import Chooser, Sequential
from firp.engine import Engine
from firp.output import Output
from firp.state import DecodeState, DecodeStats, StepRecord


def run(engine: Engine, state: DecodeState, choose: Chooser, out: Output) -> DecodeStats:
    """Decode `state` to its end; every token goes to `out`."""
    stats = DecodeStats()
    while True:
        before = [len(emitted) for emitted in out.emitted]
        sequences = state.sequence.tolist()
        record = engine.step(state, choose)
        if bool((record.status != 0).any()):
            broken = sequences[int(record.status.argmax())]
            raise FloatingPointError(f"model: its scores after {len(out.history(broken))} tokens of sequence {broken} are NaN")
        if not isinstance(choose, Sequential):
            _deliver(record, sequences, state, out)
        stats.add([len(emitted) - n for emitted, n in zip(out.emitted, before, strict=True)])
        if bool(state.finished.all()):
            return stats
        if not isinstance(choose, Sequential):
            state = engine.compact(state)


def _deliver(record: StepRecord, sequences: list[int], state: DecodeState, out: Output) -> None:
    tokens, counts = record.tokens.tolist(), record.counts.tolist()
    for b, sequence in enumerate(sequences):
        for i in range(counts[b]):
            node = int(record.path[b, i])
            if out.deliver(sequence, tokens[b][i], record.scores[b, node], record.logits[b, node]):
                state.finished[b] = True
                break
