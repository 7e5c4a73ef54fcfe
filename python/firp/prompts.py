"""Prompt files: JSONL in this project's shape or that of MT-bench and Spec-Bench, and their encoding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase


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


def _parse(record: object, line_number: int) -> Prompt:
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, expected an object")
    if "prompt" in record:
        turns = [record["prompt"]]
    elif "turns" in record:
        turns = record["turns"]
    else:
        raise ValueError("has neither 'prompt' nor 'turns'")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("expected one or more non-empty strings in 'prompt' or 'turns'")
    name = record.get("id", record.get("question_id", line_number))
    return Prompt(str(name), str(record.get("category", "all")), tuple(turns))


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts, `limit` of them spread evenly over the file (so that every category is met), or all.

    Each line is `{"prompt": ...}` with optional `id` and `category`, or `{"question_id", "category", "turns": [...]}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no text, a malformed line (its number is named), no prompts, a bad limit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompts: file {str(path)!r} does not exist")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {str(path)!r} is not UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_parse(json.loads(line), number))
        except ValueError as error:
            raise ValueError(f"prompts: {path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"prompts: {str(path)!r} holds no prompts")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict], raw: bool = False) -> list[int]:
    """Token ids of a conversation that the model shall go on with.

    Args:
        messages: `{"role", "content"}` turn by turn, ending with the user's.
        raw: the contents as they are, joined by newlines, without the chat template.

    Raises:
        ValueError: an empty prompt.
    """
    if raw or not tokenizer.chat_template:
        ids = tokenizer("\n".join(message["content"] for message in messages)).input_ids
    else:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError("prompt: got no tokens, expected at least one")
    return ids
