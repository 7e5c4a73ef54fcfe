"""Training text that people have: conversations and pairs of prompt and response, from JSONL or a data set folder."""

from __future__ import annotations

import codecs
import reprlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from firp.tools.files import parse_object
from firp.tools.prompt_files import MAX_LINE_BYTES
from firp.train.data import TextDataset
from firp.train.text_parts import token_dtype

Sequence = tuple[list[int], list[bool]]


def read_conversations(path: Path, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> TextDataset:
    """The text of a JSONL file or of a local folder of the library `datasets`, as the model would have met it.

    A record has `messages`, a list of {"role", "content"}, or else `prompt` and `response`, which are a conversation of
    two turns; other fields are left alone. The tokenizer's chat template makes the text. A tokenizer without one takes
    prompt and response as they are, with its end token. The assistant's turns are answers, up to their stop token.

    A template that writes earlier turns otherwise than the last one (some drop an earlier turn's reasoning) makes a
    sequence of each of the assistant's turns.

    Args:
        path: a file of UTF-8 lines of at most 16 MiB, or a folder.
        stops: token ids that end an answer.

    Raises:
        ValueError: a record that is no conversation (its line is named), or a folder without the library `datasets`.
    """
    # Flat: a list of Python integers takes ten times the memory of its tokens.
    tokens, answers = array(np.dtype(token_dtype(len(tokenizer))).char), array("B")
    lengths, prompt_lengths = array("q"), array("i")
    records = _rows_of_folder(path) if path.is_dir() else _lines(path)
    for place, record in records:
        try:
            for sequence, mask in _sequences(_messages(record), tokenizer, stops):
                tokens.extend(sequence)
                answers.extend(mask)
                lengths.append(len(sequence))
                prompt_lengths.append(mask.index(True))
        except ValueError as error:
            raise ValueError(f"data: {path}, {place}: {error}") from error
    if not lengths:
        raise ValueError(f"data: {str(path)!r} holds no conversations")
    return TextDataset(
        np.asarray(tokens),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.asarray(prompt_lengths),
        np.asarray(answers).view(bool),
    )


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"data: {path}, line {number}: got more than {MAX_LINE_BYTES} bytes")
            if line.strip():
                try:
                    record = parse_object(line.rstrip(b"\r\n"))
                except ValueError as error:
                    raise ValueError(f"data: {path}, line {number}: {error}") from error
                yield f"line {number}", record


def _rows_of_folder(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data: {path} is a folder, which the library `datasets` reads: pip install datasets, or give a JSONL file"
        ) from error
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:
        raise ValueError(f"data: `datasets` cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    if isinstance(found, dict):
        if "train" not in found and len(found) != 1:
            raise ValueError(f"data: {path} has the splits {', '.join(found)}, expected one, or one named train")
        found = found["train"] if "train" in found else next(iter(found.values()))
    for number, record in enumerate(found):
        yield f"row {number}", record


def _messages(record: dict) -> list[dict]:
    """The turns of a record, checked."""
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"messages: got {reprlib.repr(messages)}, expected a list of objects")
    elif "prompt" in record and "response" in record:
        messages = [
            {"role": role, "content": record[name]} for role, name in (("user", "prompt"), ("assistant", "response"))
        ]
    else:
        raise ValueError("has neither 'messages' nor 'prompt' and 'response'")
    for number, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"messages[{number}].{name}: got {reprlib.repr(message.get(name))}, expected a string")
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise ValueError("messages: got no turn of the assistant's after another turn, expected one to learn from")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _sequences(messages: list[dict], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Iterable[Sequence]:
    if not tokenizer.chat_template:
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise ValueError("messages: the model has no chat template, expected prompt and response")
        prompt = tokenizer(messages[0]["content"]).input_ids
        answer = tokenizer(messages[1]["content"], add_special_tokens=False).input_ids
        answer += [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
        if not prompt or not answer:
            raise ValueError("prompt, response: got no tokens, expected at least one")
        return [(prompt + answer, [False] * len(prompt) + [True] * len(answer))]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
    whole = _rendered(tokenizer, messages[: turns[-1] + 1])
    spans = [(_rendered(tokenizer, messages[:i], True), _rendered(tokenizer, messages[: i + 1])) for i in turns]
    for before, after in spans:
        if not after.startswith(before):
            raise ValueError("messages: the chat template's answers do not begin where it asks for one")
    if all(whole.startswith(after) for _, after in spans):
        return [_marked(tokenizer, whole, [(len(before), len(after)) for before, after in spans], stops)]
    return [_marked(tokenizer, after, [(len(before), len(after))], stops) for before, after in spans]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], ask: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    except Exception as error:  # a template may refuse roles and their order, by errors of its own
        raise ValueError(f"messages: the chat template refuses them: {' '.join(str(error).split())}") from error


def _marked(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], stops: set[int]) -> Sequence:
    """Tokens of a text, and whether each is of an answer: within a span of characters, up to its first stop token."""
    if not tokenizer.is_fast:
        raise ValueError("tokenizer: got a slow one, expected a fast one, which tells where its tokens begin")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, starts = encoded.input_ids, [start for start, _ in encoded.offset_mapping]
    mask = [False] * len(tokens)
    for first, end in spans:
        for i, (token, start) in enumerate(zip(tokens, starts, strict=True)):
            if first <= start < end:
                mask[i] = True
                if token in stops:
                    break
    if True not in mask or mask[0]:
        raise ValueError("messages: got no tokens of a prompt or of an answer, expected both")
    return tokens, mask
