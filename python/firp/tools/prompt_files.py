"""Prompt files: JSONL in this project's shape or that of MT-bench and Spec-Bench, and their encoding."""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from firp.tools.files import parse_object

T = TypeVar("T")
MAX_LINE_BYTES = 1 << 24
# What `firp bench` and `firp tune` measure by default.
OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file.

    Attributes:
        id: its `id` or `question_id`, else the line number.
        category: "all" where the file names none.
        turns: what the user says, turn by turn.
    """

    id: str
    category: str
    turns: tuple[str, ...]


def _parse(line: bytes, line_number: int) -> Prompt:
    record = parse_line(line)
    if "prompt" in record:
        turns = [record["prompt"]]
    elif "turns" in record:
        turns = record["turns"]
    else:
        raise ValueError("has neither 'prompt' nor 'turns'")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("expected one or more non-empty strings in 'prompt' or 'turns'")
    key = "id" if "id" in record else "question_id"
    name, category = record.get(key, line_number), record.get("category", "all")
    if type(name) not in (str, int):
        raise ValueError(f"{key}: got {reprlib.repr(name)}, expected a string or an integer")
    if not isinstance(category, str):
        raise ValueError(f"category: got {reprlib.repr(category)}, expected a string")
    return Prompt(str(name), category, tuple(turns))


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts, `limit` of them spread evenly over the file (so that every category is met), or all.

    Each line is `{"prompt": ...}` with optional `id` and `category`, or `{"question_id", "category", "turns": [...]}`.
    The file is UTF-8, with or without a byte order mark; lines end in LF or CRLF and have at most 16 MiB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line (its number is named), no prompts, a bad limit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompts: got {str(path)!r}, expected an existing file")
    check_limit(limit)
    prompts = []
    for number, line in numbered_lines(Path(path)):
        try:
            prompts.append(_parse(line, number))
        except ValueError as error:
            raise ValueError(f"prompts: {path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"prompts: {str(path)!r} holds no prompts")
    return spread(prompts, limit)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank, with their numbers from 1; a longer one than a prompt's is cut."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def parse_line(line: bytes) -> dict:
    """The JSON object of one line; ValueError for anything else."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"got more than {MAX_LINE_BYTES} bytes, expected a prompt")
    return parse_object(line.rstrip(b"\r\n"))


def check_limit(limit: int | None) -> None:
    """Raise ValueError for a number of prompts below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")


def spread(items: list[T], limit: int | None) -> list[T]:
    """`limit` items at even distances; all where there are no more, or where it is None."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict], raw: bool = False) -> list[int]:
    """Token ids of a conversation that the model shall go on with.

    Args:
        messages: `{"role", "content"}` turn by turn, ending with the user's.
        raw: the contents as they are, joined by newlines, without the chat template.

    Raises:
        ValueError: an empty prompt, or one with lone surrogates (an argument that was no UTF-8).
    """
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt: got a lone surrogate {error.object[error.start]!a}, expected whole characters"
            ) from error
    if raw or not tokenizer.chat_template:
        ids = tokenizer("\n".join(message["content"] for message in messages)).input_ids
    else:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError("prompt: got no tokens, expected at least one")
    return ids
