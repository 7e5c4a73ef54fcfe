"""Prompt files work as they are written, or are refused by one error with file and line."""

import pytest
from firp.tools.prompt_files import Prompt, encode, load_prompts

FIRST = b'{"prompt": "one"}\n'

# case -> (the file, its turns)
SUPPORTED = {
    "LF": (b'{"prompt": "one"}\n{"turns": ["two", "three"]}\n', [("one",), ("two", "three")]),
    "CRLF": (b'{"prompt": "one"}\r\n{"prompt": "two"}\r\n', [("one",), ("two",)]),
    "no line end": (b'{"prompt": "one"}', [("one",)]),
    "empty lines": (b'\n\r\n  \t\n{"prompt": "one"}\n\n', [("one",)]),
    "a byte order mark": (b'\xef\xbb\xbf{"prompt": "one"}\n', [("one",)]),
    "a byte order mark on its own": (b'\xef\xbb\xbf\n{"prompt": "one"}\n', [("one",)]),
    "raw separators of lines and paragraphs": (
        '{"prompt": "a\u2028b\u2029c\x85d"}\n'.encode(),
        [("a\u2028b\u2029c\x85d",)],
    ),
    "escaped controls": (b'{"prompt": "a\\u0000b\\r\\nc"}\n', [("a\0b\r\nc",)]),
    "surrogates in a pair": (b'{"prompt": "\\ud83d\\ude00"}\n', [("\U0001f600",)]),
    "a long line": (b'{"prompt": "' + b"x" * (1 << 23) + b'"}\n' + FIRST, [("x" * (1 << 23),), ("one",)]),
    "unknown fields": (b'{"prompt": "one", "reference": [1, {"a": null}]}\n', [("one",)]),
}

# case -> (what stands in line 2, what the error says of it)
REFUSED = {
    "not JSON": (b"prompt", "not JSON: Expecting value at character 1"),
    "half an object": (b'{"prompt": "tw', "not JSON: Unterminated string"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data"),
    "a list": (b'["a"]', "got list, expected an object"),
    "a string": (b'"a"', "got str, expected an object"),
    "null": (b"null", "got NoneType, expected an object"),
    "neither field": (b'{"text": "a"}', "has neither 'prompt' nor 'turns'"),
    "an empty prompt": (b'{"prompt": " "}', "expected one or more non-empty strings"),
    "a prompt of a number": (b'{"prompt": 3}', "expected one or more non-empty strings"),
    "no turns": (b'{"turns": []}', "expected one or more non-empty strings"),
    "turns of a string": (b'{"turns": "ab"}', "expected one or more non-empty strings"),
    "a turn of null": (b'{"turns": ["a", null]}', "expected one or more non-empty strings"),
    "an id of a list": (b'{"prompt": "a", "id": [1]}', "id: got [1], expected a string or an integer"),
    "an id of null": (
        b'{"prompt": "a", "question_id": null}',
        "question_id: got None, expected a string or an integer",
    ),
    "a category of null": (b'{"prompt": "a", "category": null}', "category: got None, expected a string"),
    "the prompt twice": (b'{"prompt": "a", "prompt": "b"}', "prompt: got it twice"),
    "a raw NUL": (b'{"prompt": "a\0b"}', "not JSON: Invalid control character"),
    "NULs": (b"\0" * 50, "not JSON"),
    "a lone surrogate": (b'{"prompt": "a\\ud800b"}', "got a lone surrogate '\\ud800'"),
    "a lone surrogate in an id": (b'{"prompt": "a", "id": "\\udfff"}', "got a lone surrogate '\\udfff'"),
    "a lone surrogate as bytes": (b'{"prompt": "a\xed\xa0\x80b"}', "not UTF-8 text: invalid continuation byte"),
    "Latin 1": ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8 text"),
    "a byte order mark in the middle": (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON: Unexpected UTF-8 BOM"),
    "nested brackets": (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    "a number of 5000 digits": (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "limit"),
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_a_file_as_people_write_them_is_read(tmp_path, case):
    content, turns = SUPPORTED[case]
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert [prompt.turns for prompt in load_prompts(tmp_path / "prompts.jsonl")] == turns


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_line_is_named(tmp_path, case):
    line, message = REFUSED[case]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(FIRST + line + b"\n" + FIRST)
    with pytest.raises(ValueError) as caught:
        load_prompts(path)
    said = str(caught.value)
    assert said.startswith(f"prompts: {path}, line 2: ") and message in said and len(said) < 400


def test_a_line_of_100_mb_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(FIRST + b'{"prompt": "' + b"x" * (100 << 20) + b'"}')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: got more than 16777216 bytes, expected a prompt"):
        load_prompts(path)


def test_utf_16_is_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(FIRST.decode().encode("utf-16"))
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 1: not UTF-8 text"):
        load_prompts(tmp_path / "prompts.jsonl")


def test_names_and_categories(tmp_path):
    lines = ['{"prompt": "a"}', '{"prompt": "b", "id": "x", "category": "y"}', '{"turns": ["c"], "question_id": 81}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    expected = [Prompt("1", "all", ("a",)), Prompt("x", "y", ("b",)), Prompt("81", "all", ("c",))]
    assert load_prompts(tmp_path / "prompts.jsonl") == expected


def test_a_prompt_that_was_no_text_is_refused():
    """An argument of the command line that is no UTF-8 holds lone surrogates."""
    messages = [{"role": "user", "content": b"caf\xe9".decode(errors="surrogateescape")}]
    for raw in (False, True):
        with pytest.raises(ValueError, match=r"^prompt: got a lone surrogate '\\udce9', expected whole characters"):
            encode(None, messages, raw)
