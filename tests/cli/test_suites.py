"""`firp bench --suite`: the arithmetic of the tables, all turns, what goes together and what a Ctrl-C keeps."""

import hashlib
import json

import firp
import pytest
import torch
from firp.bench.methods import Results, Run, make_methods
from firp.bench.runner import report, run_methods
from firp.bench.suite_report import print_suite, summarize
from firp.bench.suites import SUITES
from firp.tools.prompt_files import Prompt
from rich.console import Console
from suite_records import FILES, MT, SPEC, write


def run(seconds, *deliveries, by_prefill=0):
    return Run([7] * (by_prefill + sum(deliveries)), seconds, list(deliveries))


def answers():
    """Three questions, two of them of one task; plain decoding by Hugging Face, and a method that drafts."""
    prompts = [Prompt("1", "math", ("a", "b")), Prompt("2", "stem", ("a", "b")), Prompt("3", "math", ("a", "b"))]
    drafts = [
        [run(1.0, 1, 3, 2), run(2.0, 1, 1)],
        [run(0.5, 1, 4), run(0.5, 5)],
        [run(1.0, 1), run(1.0, 1, 2)],
    ]
    plain = [
        [run(3.0, *[1] * 5, by_prefill=1), run(1.0, 1, by_prefill=1)],
        [run(2.5, *[1] * 4, by_prefill=1), run(2.5, *[1] * 4, by_prefill=1)],
        [run(1.0, by_prefill=1), run(1.0, 1, 1, by_prefill=1)],
    ]
    slower = [[run(2 * r.seconds, *r.counts) for r in question] for question in drafts]
    return Results(prompts, {"firp": [drafts, slower], "hf": [plain, plain]})


def test_the_arithmetic_of_the_tables_is_that_of_the_suites():
    found = summarize(SUITES["mt-bench"], answers())
    assert list(found) == ["math", "stem", "First turn", "Second turn", "overall"]
    # Question 1: 8 tokens in 3 s; 2: 10 in 1 s; 3: 4 in 2 s. Half of it in the second repeat.
    speed = found["overall"]["firp"]["tokens_per_second"]
    assert speed["repeats"] == pytest.approx([(8 / 3 + 10 + 2) / 3, (8 / 3 + 10 + 2) / 6])
    assert speed["mean"] == pytest.approx((8 / 3 + 12) / 4) and speed["std"] == pytest.approx((8 / 3 + 12) / 6 / 2**0.5)
    # Plain: 8 in 4 s, 10 in 5 s, 4 in 2 s.
    assert found["overall"]["hf"]["tokens_per_second"]["mean"] == 2
    assert found["overall"]["firp"]["speedup_vs_hf"]["repeats"] == pytest.approx([(8 / 3 + 12) / 6, (8 / 3 + 12) / 12])
    assert "speedup_vs_ar" not in found["overall"]["firp"]
    # 22 tokens in 11 steps; in the first turns 12 in 6; in mathematics 12 in 8.
    assert [found[task]["firp"]["acceptance"] for task in found] == pytest.approx([12 / 8, 10 / 3, 2, 2, 2])
    assert found["overall"]["hf"]["acceptance"] == 1
    assert found["math"]["firp"]["questions"] == 2 and found["First turn"]["firp"]["questions"] == 3
    assert found["First turn"]["hf"]["tokens_per_second"]["mean"] == pytest.approx((2 + 2 + 1) / 3)
    once = Results(answers().prompts, {name: runs[:1] for name, runs in answers().runs.items()})
    assert summarize(SUITES["mt-bench"], once)["math"]["firp"]["tokens_per_second"]["std"] is None


def test_speed_bench_counts_every_question_once_and_leaves_ends_out():
    found = summarize(SUITES["speed-bench"], answers_of("coding", "rag", "coding"))
    # Question 1: [3] and nothing left, which counts 1; 2: nothing left, twice; 3: nothing left, twice.
    assert found["coding"]["firp"]["acceptance"] == pytest.approx((2 + 1) / 2)
    assert found["rag"]["firp"]["acceptance"] == 1 and found["overall"]["firp"]["acceptance"] == pytest.approx(4 / 3)
    assert found["overall"]["hf"]["acceptance"] == 1 and list(found) == ["coding", "rag", "overall"]


def answers_of(*categories):
    made = answers()
    made.prompts = [Prompt(p.id, category, p.turns) for p, category in zip(made.prompts, categories, strict=True)]
    return made


def test_the_tables_have_the_suites_layout(capsys):
    def printed(name, results):
        document = {"summary": summarize(SUITES[name], results), "file": "question[b].jsonl", "questions": 3}
        print_suite(document, SUITES[name], Console(width=200))
        return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in capsys.readouterr().out.splitlines()]

    lines = printed("spec-bench", answers_of("math", "rag", "stem"))
    assert ["spec-bench: question[b].jsonl"] in lines
    assert ["mt_bench", "firp", "1.5000", "1.75 ± 0.82", "0.875x ± 0.412"] in lines
    assert ["firp", "0.87x", "3.75x", "2.00", "1.83x"] in lines
    assert ["not among the 3 questions of this run: translation, summarization, qa, math_reasoning"] in lines
    lines = printed("speed-bench", answers_of("coding", "rag", "coding"))
    assert ["firp", "1.50", "1.00", "1.33"] in lines and ["Overall Average", "hf", "1.0000", "2.00 ± 0.00", "1.000x ± 0.000"] in lines  # fmt: skip
    assert any(line[:2] == ["Second turn", "firp"] for line in printed("mt-bench", answers()))


@pytest.fixture
def bench(cli, folder):
    def call(*arguments):
        common = ("--model", folder / "model", "--predictor", folder / "predictor", "--device", "cpu", "--repeats", 1)
        return cli("bench", *common, "--dtype", "float32", "--max-new-tokens", 6, "--methods", "ar,firp,hf", *arguments)

    return call


@pytest.mark.parametrize("name", FILES)
def test_a_run_holds_every_row_and_all_methods_agree(bench, tmp_path, name):
    path = write(tmp_path / "question.jsonl", FILES[name])
    code, out, err = bench("--suite", name, "--file", path, "--repeats", 2, "--json", tmp_path / "out.json")
    assert code == 0 and f"{name}: question.jsonl" in out, err
    document = json.loads((tmp_path / "out.json").read_text())
    suite = document["suite"]
    assert suite["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and suite["file"] == "question.jsonl"
    assert len(suite["rows"]) == len(FILES[name]) * 3 * 2 and not document["interrupted"]
    turns = sum(len(record["turns"]) for record in FILES[name])
    assert document["methods"]["firp"]["identical_to_hf"]["identical"] == turns
    for record in FILES[name]:
        rows = [row for row in suite["rows"] if row["question_id"] == str(record["question_id"])]
        kept = {tuple(turn["tokens_sha256"] for turn in row["turns"]) for row in rows}
        assert len(kept) == 1 and len(kept.pop()) == len(record["turns"])
        for row in rows:
            for turn in row["turns"]:
                counts = list(map(int, turn["acceptance_lengths"].split()))
                assert sum(counts) == turn["new_tokens"] and turn["steps"] == len(counts) - (row["method"] == "hf")


def test_the_limit_is_spread_over_the_file(bench, tmp_path):
    path = write(tmp_path / "question.jsonl", SPEC)
    assert bench("--suite", "spec-bench", "--file", path, "--limit", 2, "--json", tmp_path / "out.json")[0] == 0
    suite = json.loads((tmp_path / "out.json").read_text())["suite"]
    assert (suite["questions_in_file"], suite["questions"]) == (4, 2)
    assert {row["place"] for row in suite["rows"]} == {"line 1", "line 3"}


def test_a_later_turn_goes_on_from_the_methods_own_answer(folder):
    model, tokenizer = firp.load_model(str(folder / "model"), "float32")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    seen = {name: [] for name in ("hf", "other")}

    def method(name, answer):
        def decode(ids, max_new_tokens):
            seen[name].append(tokenizer.decode(ids[0]))
            return Run([answer], 1.0, [1])

        return decode

    results = run_methods(
        {name: method(name, answer) for name, answer in (("hf", 20), ("other", 21))},
        [Prompt("1", "math", ("w1", "w2", "w3"))], model, tokenizer, 4, all_turns=True, progress=False,
    )  # fmt: skip
    for name, answer in (("hf", "w16"), ("other", "w17")):
        texts = [text.replace("[UNK] ", "") for text in seen[name][1:]]
        assert texts == ["w1", f"w1 {answer} w2", f"w1 {answer} w2 {answer} w3"]
    assert [tokenizer.decode(ids[0]) for ids in results.inputs[0]] == seen["hf"][1:]


def test_turns_after_a_difference_are_not_counted_as_identical(folder):
    model, tokenizer = firp.load_model(str(folder / "model"), "float32")
    made = make_methods(["hf"], model, None, None)

    def parted(ids, max_new_tokens):
        answer = made["hf"](ids, max_new_tokens)
        return Run([*answer.tokens[:-1], (answer.tokens[-1] + 1) % 32], answer.seconds, answer.counts)

    prompts = [Prompt("1", "math", ("w1", "w2", "w3"))]
    # The method that parts runs first, so that its own later prompts would be at hand before Hugging Face's.
    results = run_methods({"parted": parted, **made}, prompts, model, tokenizer, 4, all_turns=True, progress=False)
    found = report(results, model, {})["methods"]["parted"]["identical_to_hf"]
    assert (found["identical"], found["total"]) == (0, 3)
    ((prompt, position, gap, exact, turn),) = found["differences"]
    assert (prompt, position, turn) == ("1", 3, 0) and gap > 0 and exact == pytest.approx(gap, abs=1e-4)


def test_counts_are_those_of_the_engine(folder):
    model, _ = firp.load_model(str(folder / "model"), "float32")
    predictor = firp.load_predictor(folder / "predictor")
    methods = make_methods(["firp", "prompt-lookup"], model, predictor, firp.TreeConfig(6, 2))
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    ours, theirs = (methods[name](ids, 12) for name in ("firp", "prompt-lookup"))
    out = firp.generate(
        model, ids, engine=firp.Engine(model, predictor, firp.TreeConfig(6, 2)), max_new_tokens=12, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert ours.stats == out.stats and ours.deliveries == ours.counts
    assert theirs.tokens == ours.tokens and sum(theirs.deliveries) == len(theirs.tokens)
    assert theirs.deliveries == [len(theirs.tokens) - sum(theirs.counts), *theirs.counts] and min(theirs.counts) >= 1


BAD = {
    "no file": (("--suite", "mt-bench"), "file: got none, expected --suite and --file together"),
    "no suite": (("--file", "FILE"), "suite: got none, expected --suite and --file together"),
    "prompts too": (("--suite", "mt-bench", "--file", "FILE", "--prompts", "FILE"), "prompts: given with suite, expected one of them"),
    "a shape too": (("--suite", "mt-bench", "--file", "FILE", "--random-weights", "tiny"), "random_weights: given with suite, expected one of them"),
    "an unknown suite": (("--suite", "alpaca", "--file", "FILE"), "suite: got 'alpaca', expected one of spec-bench, mt-bench, speed-bench"),
    "no such file": (("--suite", "mt-bench", "--file", "/nowhere.jsonl"), "file: got '/nowhere.jsonl', expected an existing file"),
    "a folder": (("--suite", "mt-bench", "--file", "FOLDER"), "file: got 'FOLDER', expected an existing file"),
    "an empty file": (("--suite", "mt-bench", "--file", "EMPTY"), "file: 'EMPTY' holds no questions, expected those of mt-bench"),
    "no question": (("--suite", "mt-bench", "--file", "FILE", "--limit", "0"), "limit: got 0, expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_together_is_refused(bench, tmp_path, monkeypatch, case):
    monkeypatch.setattr("firp.cli.options.load_model", lambda *_: pytest.fail("loaded"))
    places = {"FILE": write(tmp_path / "question.jsonl", MT), "FOLDER": tmp_path, "EMPTY": tmp_path / "empty.jsonl"}
    places["EMPTY"].write_text("\n \n")
    arguments, message = BAD[case]
    for name, path in places.items():
        message = message.replace(name, str(path))
    code, _, err = bench(*(places.get(argument, argument) for argument in arguments))
    assert code == 2 and [line for line in err.splitlines() if line.startswith("error:")] == [f"error: {message}"]


def test_a_conversation_past_the_context_is_found_before_any_is_decoded(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("firp.cli.bench.make_methods", lambda *_: pytest.fail("made"))
    path = write(tmp_path / "question.jsonl", [*MT, {**MT[0], "question_id": 9, "turns": ["w1", "w2 " * 50]}])
    code, _, err = bench("--suite", "mt-bench", "--file", path, "--max-new-tokens", 110)
    assert (
        code == 2
        and (
            f"error: file: {path}, line 3: question 9, turn 2: got 51 tokens of prompt and up to 2 x 110 of answers, "
            "expected at most 256 together, the model's context; --max-new-tokens 102 would fit in this turn"
        )
        in err.splitlines()
    )
    write(path, [{**MT[0], "turns": ["w2 " * 300, "w1"]}])
    code, _, err = bench("--suite", "mt-bench", "--file", path)
    assert code == 2 and "turn 1: got 300 tokens" in err and "context; leave the question out" in err


@pytest.mark.parametrize(
    "at, questions, repeats",
    [(0, None, 0), (5, None, 0), (8, 1, 1), (17, 4, 1), (27, 4, 2)],
    ids=["warm-up", "first question", "second question", "second repeat", "third repeat"],
)
def test_ctrl_c_keeps_what_is_finished(bench, tmp_path, monkeypatch, at, questions, repeats):
    """Three methods warm up, then answer four questions, three times."""
    path = write(tmp_path / "question.jsonl", [{**record, "turns": record["turns"][:1]} for record in SPEC])
    calls = []

    def counting(*arguments):
        def wrap(method):
            def decode(*request):
                calls.append(None)
                if len(calls) == at + 1:
                    raise KeyboardInterrupt
                return method(*request)

            return decode

        return {name: wrap(method) for name, method in make_methods(*arguments).items()}

    monkeypatch.setattr("firp.cli.bench.make_methods", counting)
    out = tmp_path / "out.json"
    code, printed, err = bench("--suite", "spec-bench", "--file", path, "--repeats", 3, "--json", out)
    assert code == 130 and err.splitlines()[-1] == "interrupted; finished work is kept" and "Traceback" not in err
    assert out.exists() == (questions is not None)
    if questions is not None:
        document = json.loads(out.read_text())
        assert document["interrupted"] and document["settings"]["num_prompts"] == questions
        assert len(document["suite"]["rows"]) == questions * repeats * 3 and "mt_bench" in printed
        assert len(document["methods"]["firp"]["identical_to_hf"]["differences"]) == 0
