"""Suites' files: the forms in which they are published are read, and all else is named with file, line and field."""

import hashlib
import json
import sys
from types import ModuleType

import pytest
from firp.bench.suites import load_suite
from firp.tools.prompt_files import Prompt
from suite_records import FILES, SPEED, write


@pytest.mark.parametrize("name", FILES)
def test_each_form_is_read(tmp_path, name):
    path = write(tmp_path / "question.jsonl", FILES[name])
    file = load_suite(name, path)
    assert [prompt.turns for prompt in file.prompts] == [tuple(record["turns"]) for record in FILES[name]]
    assert [prompt.id for prompt in file.prompts] == [str(record["question_id"]) for record in FILES[name]]
    assert file.places == [f"line {i + 1}" for i in range(len(FILES[name]))] and file.num_questions == len(FILES[name])
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_suite(name, path, 1).places == ["line 1"] and load_suite(name, path, 1).num_questions > 1


def test_the_other_names_of_fields_are_read(tmp_path):
    hub = write(tmp_path / "hub.jsonl", [{"prompt_id": 5, "category": "math", "prompt": ["a", "b"], "reference": []}])
    assert load_suite("mt-bench", hub).prompts == [Prompt("5", "math", ("a", "b"))]
    said = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    prepared = write(tmp_path / "qualitative.jsonl", [{"question_id": "x", "category": "qa", "messages": said}])
    assert load_suite("speed-bench", prepared).prompts == [Prompt("x", "qa", ("a", "b"))]


def test_parquet_is_read_and_a_damaged_one_named(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'firp_kernels[data]'")
    from pyarrow.parquet import write_table

    for name in ("test.parquet", "category=x"):  # the second is no parquet name, and looks like a partition
        write_table(arrow.Table.from_pylist(SPEED), tmp_path / name)
        file = load_suite("speed-bench", tmp_path / name)
        assert [prompt.turns for prompt in file.prompts] == [tuple(record["turns"]) for record in SPEED]
        assert file.places == ["row 1", "row 2"]
    broken = [SPEED[0], {**SPEED[1], "turns": ["w1", None]}]
    write_table(arrow.Table.from_pylist(broken), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"null.parquet, row 2: turns\[1\]: got None, expected a string"):
        load_suite("speed-bench", tmp_path / "null.parquet")
    for name, content in (("cut", b"PAR1" + bytes(20)), ("pointer.parquet", b"version https://git-lfs")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^file: .*{name} cannot be read as parquet: .*magic bytes"):
            load_suite("speed-bench", tmp_path / name)


def test_parquet_without_its_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"^file: .*x.parquet is a parquet file, which pyarrow reads: pip install"):
        load_suite("speed-bench", tmp_path / "x.parquet")


PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
GOOD = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
# case -> (suite, line 2, what the error says of it)
REFUSED = {
    "not JSON": ("mt-bench", "{", "not JSON: Expecting property name"),
    "an array": ("mt-bench", [GOOD], "got list, expected an object"),
    "no id": ("mt-bench", {"category": "math", "turns": ["a"]}, "question_id or prompt_id: got none, expected an id of mt-bench; the question has category, turns"),
    "an id of a list": ("spec-bench", {**GOOD, "question_id": [1]}, "question_id: got [1], expected a string or an integer"),
    "a true id": ("spec-bench", {**GOOD, "question_id": True}, "question_id: got True, expected a string or an integer"),
    "no category": ("spec-bench", {"question_id": 1, "turns": ["a"]}, "category: got none, expected a category of spec-bench"),
    "another suite's": ("mt-bench", {**GOOD, "category": "translation"}, "category: got 'translation', expected one of mt-bench: writing, "),
    "whose": ("spec-bench", {**GOOD, "category": "mixed"}, "; it is one of speed-bench"),
    "nobody's": ("speed-bench", {**GOOD, "category": 7}, "category: got 7, expected one of speed-bench: coding, "),
    "no turns": ("spec-bench", {"question_id": 1, "category": "qa", "prompt": "a"}, "turns: got none, expected what the user says of spec-bench"),
    "turns of a string": ("spec-bench", {**GOOD, "turns": "ab"}, "turns: got 'ab', expected a list of one or more strings"),
    "empty turns": ("spec-bench", {**GOOD, "turns": []}, "turns: got [], expected a list of one or more strings"),
    "a turn of a number": ("spec-bench", {**GOOD, "turns": ["a", 3]}, "turns[1]: got 3, expected a string that is not empty"),
    "an empty turn": ("spec-bench", {**GOOD, "turns": ["  "]}, "turns[0]: got '  ', expected a string that is not empty"),
    "one turn": ("mt-bench", {**GOOD, "turns": ["a"]}, "turns: got 1 turns, expected 2"),
    "a placeholder": ("speed-bench", {**GOOD, "turns": [PLACEHOLDER]}, "turns[0]: got the placeholder 'FULL BENCHMARK DATA"),
    "a template": ("speed-bench", {**GOOD, "turns": ["a", PLACEHOLDER + "\n\nx {y}"]}, "turns[1]: got the placeholder"),
    "a system message": ("speed-bench", {"question_id": 1, "category": "math", "messages": [{"role": "system", "content": "a"}]}, "messages[0].role: got 'system', expected 'user'"),
    "a message of text": ("speed-bench", {"question_id": 1, "category": "math", "messages": ["a"]}, "messages[0]: got 'a', expected an object with role and content"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_question_is_named(tmp_path, case):
    suite, line, message = REFUSED[case]
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError) as caught:
        load_suite(suite, path)
    assert str(caught.value).startswith(f"file: {path}, line 2: ") and message in str(caught.value)


@pytest.mark.parametrize("again", [7, "7"])
def test_an_id_that_is_met_twice_is_named(tmp_path, again):
    records = [{**FILES["spec-bench"][0], "question_id": number} for number in (7, 8, again)]
    path = write(tmp_path / "question.jsonl", records)
    with pytest.raises(ValueError, match=r"^file: .*question.jsonl, line 3: got the id 7 of line 1, expected another"):
        load_suite("spec-bench", path)
