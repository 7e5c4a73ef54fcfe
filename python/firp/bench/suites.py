"""Suites of prompts that users of this field measure by, read from a user's own copy of their files."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from firp.decoder.rotary import context_limit
from firp.tools.prompt_files import Prompt, check_limit, encode, numbered_lines, parse_line, spread

PARQUET_MAGIC = b"PAR1"
PREVIEW = 60


@dataclass(frozen=True)
class Suite:
    """What a suite's file holds.

    Attributes:
        name: of `firp bench --suite`.
        tasks: task of the suite's own table -> what it is called there, in the table's order.
        categories: category in the file -> its task.
        ids, prompts: names of the fields that may hold the id and what the user says, turn by turn.
        num_turns: turns of every question; None: any number.
        placeholder: what the published file holds where the suite's own script has to fetch the text.
    """

    name: str
    tasks: dict[str, str]
    categories: dict[str, str]
    ids: tuple[str, ...] = ("question_id",)
    prompts: tuple[str, ...] = ("turns",)
    num_turns: int | None = None
    placeholder: str | None = None


def _each(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


MT_BENCH_CATEGORIES = _each("writing roleplay reasoning math coding extraction stem humanities")
SPEED_BENCH_CATEGORIES = _each(
    "coding humanities math multilingual qa rag reasoning roleplay stem summarization writing "
    "low_entropy mixed high_entropy"
)
SPEC_BENCH_TASKS = {
    "mt_bench": "Multi-turn Conversation",
    "translation": "Translation",
    "summarization": "Summarization",
    "qa": "Question Answering",
    "math_reasoning": "Mathematical Reasoning",
    "rag": "Retrieval-aug. Generation",
}
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "spec-bench",
            SPEC_BENCH_TASKS,
            dict.fromkeys(MT_BENCH_CATEGORIES, "mt_bench") | {name: name for name in list(SPEC_BENCH_TASKS)[1:]},
        ),
        # The Hub's copy of MT-Bench names the fields otherwise.
        Suite(
            "mt-bench",
            MT_BENCH_CATEGORIES,
            MT_BENCH_CATEGORIES,
            ids=("question_id", "prompt_id"),
            prompts=("turns", "prompt"),
            num_turns=2,
        ),
        Suite(
            "speed-bench",
            SPEED_BENCH_CATEGORIES,
            SPEED_BENCH_CATEGORIES,
            prompts=("turns", "messages"),
            placeholder="FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE",
        ),
    )
}


@dataclass(frozen=True)
class SuiteFile:
    """A user's copy of a suite.

    Attributes:
        suite: which.
        path: of the file.
        sha256: of its bytes, hexadecimal.
        num_questions: in the file.
        prompts: those to run, `id` and `category` as in the file.
        places: where each of `prompts` stands, such as "line 3".
    """

    suite: Suite
    path: Path
    sha256: str
    num_questions: int
    prompts: list[Prompt]
    places: list[str]

    def check_fits(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_new_tokens: int, raw: bool = False
    ) -> None:
        """Find a conversation that may outgrow the model's context before anything is decoded.

        Every answer is taken to be as long as it may be.

        Raises:
            ValueError: one that may, with its place in the file and the numbers.
        """
        limit = context_limit(config)
        for prompt, place in zip(self.prompts, self.places, strict=True):
            messages: list[dict] = []
            for number, turn in enumerate(prompt.turns, start=1):
                messages.append({"role": "user", "content": turn})
                length = len(encode(tokenizer, messages, raw))
                if length + number * max_new_tokens > limit:
                    most = (limit - length) // number
                    remedy = f"--max-new-tokens {most} would fit in this turn" if most > 0 else "leave the question out"
                    raise ValueError(
                        f"file: {self.path}, {place}: question {prompt.id}, turn {number}: got {length} tokens of "
                        f"prompt and up to {number} x {max_new_tokens} of answers, expected at most {limit} together, "
                        f"the model's context; {remedy}"
                    )
                messages.append({"role": "assistant", "content": ""})


def load_suite(name: str, path: Path, limit: int | None = None) -> SuiteFile:
    """Read a user's copy of a suite: JSON lines, or parquet where the name or the first bytes say so.

    Args:
        name: a key of `SUITES`.
        limit: questions taken, spread evenly over the file; None takes all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suite, another suite's file, a malformed question, an id met twice, or none; file, line
            and field are named.
    """
    if name not in SUITES:
        raise ValueError(f"suite: got {name!r}, expected one of {', '.join(SUITES)}")
    check_limit(limit)
    if not path.is_file():
        raise FileNotFoundError(f"file: got {str(path)!r}, expected an existing file")
    suite = SUITES[name]
    content = path.read_bytes()
    parquet = content.startswith(PARQUET_MAGIC) or path.suffix == ".parquet"
    found = list(_parquet(suite, path) if parquet else _json_lines(suite, path))
    if not found:
        raise ValueError(f"file: {str(path)!r} holds no questions, expected those of {name}")
    first: dict[str, str] = {}
    for prompt, place in found:
        if first.setdefault(prompt.id, place) != place:
            raise ValueError(f"file: {path}, {place}: got the id {prompt.id} of {first[prompt.id]}, expected another")
    chosen = spread(found, limit)
    return SuiteFile(
        suite=suite,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        num_questions=len(found),
        prompts=[prompt for prompt, _ in chosen],
        places=[place for _, place in chosen],
    )


def _json_lines(suite: Suite, path: Path) -> Iterator[tuple[Prompt, str]]:
    for number, line in numbered_lines(path):
        place = f"line {number}"
        try:
            yield _question(suite, parse_line(line)), place
        except ValueError as error:
            raise ValueError(f"file: {path}, {place}: {error}") from error


def _parquet(suite: Suite, path: Path) -> Iterator[tuple[Prompt, str]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"file: {path} is a parquet file, which pyarrow reads: pip install pyarrow, or give JSON lines"
        ) from error
    try:
        records = ParquetFile(path).read().to_pylist()
    except Exception as error:
        raise ValueError(f"file: {path} cannot be read as parquet: {' '.join(str(error).split())[:300]}") from error
    for number, record in enumerate(records, start=1):
        place = f"row {number}"
        try:
            yield _question(suite, record), place
        except ValueError as error:
            raise ValueError(f"file: {path}, {place}: {error}") from error


def _question(suite: Suite, record: dict) -> Prompt:
    """One question, checked."""
    key = _field(record, suite.ids, "an id", suite)
    if type(record[key]) not in (str, int):
        raise ValueError(f"{key}: got {reprlib.repr(record[key])}, expected a string or an integer")
    category = record[_field(record, ("category",), "a category", suite)]
    if not isinstance(category, str) or category not in suite.categories:
        others = [other.name for other in SUITES.values() if isinstance(category, str) and category in other.categories]
        hint = f"; it is one of {' and '.join(others)}" if others else ""
        raise ValueError(
            f"category: got {reprlib.repr(category)}, expected one of {suite.name}: {', '.join(suite.categories)}{hint}"
        )
    return Prompt(str(record[key]), category, _turns(suite, record))


def _turns(suite: Suite, record: dict) -> tuple[str, ...]:
    key = _field(record, suite.prompts, "what the user says", suite)
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key}: got {reprlib.repr(turns)}, expected a list of one or more strings")
    if key == "messages":
        turns = [_said_by_user(number, message) for number, message in enumerate(turns)]
    for number, turn in enumerate(turns):
        if not isinstance(turn, str) or not turn.strip():
            raise ValueError(f"{key}[{number}]: got {reprlib.repr(turn)}, expected a string that is not empty")
        if suite.placeholder is not None and turn.lstrip().startswith(suite.placeholder):
            raise ValueError(
                f"{key}[{number}]: got the placeholder {turn[:PREVIEW]!r}, expected the prompt: prepare the file with "
                f"the script of {suite.name} first"
            )
    if suite.num_turns is not None and len(turns) != suite.num_turns:
        raise ValueError(f"{key}: got {len(turns)} turns, expected {suite.num_turns}")
    return tuple(turns)


def _said_by_user(number: int, message: object) -> object:
    """The content of a message, of the user's alone: the model's answers are what is measured."""
    if not isinstance(message, dict) or "content" not in message:
        raise ValueError(f"messages[{number}]: got {reprlib.repr(message)}, expected an object with role and content")
    if message.get("role") != "user":
        raise ValueError(f"messages[{number}].role: got {reprlib.repr(message.get('role'))}, expected 'user'")
    return message["content"]


def _field(record: dict, names: tuple[str, ...], what: str, suite: Suite) -> str:
    """The name of these that a record has."""
    for name in names:
        if name in record:
            return name
    has = ", ".join(str(name)[:PREVIEW] for name in list(record)[:12]) or "no fields"
    raise ValueError(f"{' or '.join(names)}: got none, expected {what} of {suite.name}; the question has {has}")
