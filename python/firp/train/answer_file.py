"""Answers of servers, kept as they come: a line each, each once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firp.tools.files import parse_object, write_atomically
from firp.train.run_files import append_line
from firp.train.text_parts import token_dtype

KINDS = {"index": int, "id": str, "prompt": list, "answer": list, "exact": bool, "recounted": bool}


@dataclass(frozen=True)
class Item:
    """One prompt: its place among the prompts, its id, its text and its tokens."""

    index: int
    id: str
    text: str
    tokens: list[int]

    @property
    def greedy(self) -> bool:
        """Whether it is answered greedily: every second prompt is."""
        return self.index % 2 == 0


class AnswerFile:
    """A file of answers to `items`; those of an earlier run are read, a last line that a kill cut off is dropped.

    Args:
        path: JSON Lines with the fields of KINDS.
        vocab_size: token ids are below it.

    Attributes:
        answers: records by the place of their prompt.

    Raises:
        ValueError: a line that is no answer to one of the prompts, or a second one; its number is named.
    """

    def __init__(self, path: Path, items: list[Item], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.items = {item.index: item for item in items}
        self.answers: dict[int, dict] = {}
        if not path.is_file():
            return
        *lines, rest = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = parse_object(line)
                self._check(record)
            except ValueError as error:
                raise ValueError(
                    f"output: {path}, line {number}: no answer of this run: {error}; remove that line to ask again"
                ) from error
            self.answers[record["index"]] = record
        if rest:
            write_atomically(path, lambda staged: staged.write_bytes(b"".join(line + b"\n" for line in lines)))

    def _check(self, record: dict) -> None:
        for name, kind in KINDS.items():
            if type(record.get(name)) is not kind:
                raise ValueError(f"{name}: got {type(record.get(name)).__name__}, expected {kind.__name__}")
        item = self.items.get(record["index"])
        if item is None or (record["id"], record["prompt"]) != (item.id, item.tokens):
            raise ValueError(f"index: got {record['index']} with another prompt than is there now")
        if record["index"] in self.answers:
            raise ValueError(f"index: got {record['index']} a second time")
        self._check_answer(record["answer"])

    def _check_answer(self, tokens: list) -> None:
        bad = next((token for token in tokens if type(token) is not int or not 0 <= token < self.vocab_size), None)
        if not tokens or bad is not None:
            raise ValueError(f"answer: got {bad if tokens else 'nothing'}, expected tokens in 0..{self.vocab_size - 1}")

    def missing(self) -> Iterator[Item]:
        """Prompts that have no answer yet."""
        return (item for item in list(self.items.values()) if item.index not in self.answers)

    def add(self, item: Item, tokens: list[int], exact: bool, recounted: bool) -> None:
        """Keep an answer.

        Raises:
            ValueError: no tokens, or tokens of another model.
            OSError: what the disk refuses.
        """
        self._check_answer(tokens)
        record = dict(zip(KINDS, (item.index, item.id, item.tokens, tokens, exact, recounted), strict=True))
        append_line(self.path, json.dumps(record))
        self.answers[item.index] = record

    def arrays(self) -> dict[str, np.ndarray]:
        """What is there, in the order of the prompts."""
        records = [self.answers[index] for index in sorted(self.answers)]
        dtype = token_dtype(self.vocab_size)
        sequences = [np.array(record["prompt"] + record["answer"], dtype) for record in records]
        return {
            "tokens": np.concatenate(sequences),
            "lengths": np.array([len(sequence) for sequence in sequences], np.int64),
            "prompt_lengths": np.array([len(record["prompt"]) for record in records], np.int32),
            "greedy": np.array([self.items[record["index"]].greedy for record in records]),
            "exact": np.array([record["exact"] for record in records]),
            "ids": np.array([record["id"] for record in records]),
        }
