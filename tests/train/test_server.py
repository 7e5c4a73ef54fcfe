"""`firp distill --server`: for any fault of a server no answer is lost or there twice, and failures are listed."""

import json
import threading

import numpy as np
import pytest
from api_server import Api, completion, cut_off, dropped
from firp.tools.prompt_files import encode
from firp.train.data import load_dataset
from firp.train.distill import DistillConfig, distill
from firp.train.server import KEY_VARIABLE, Server
from firp.train.server_distill import FAILURES_IN_A_ROW, ServerConfig, distill_from_servers
from firp.train.server_pool import ATTEMPTS
from transformers import AutoTokenizer

EOS = 3
FINE = None


@pytest.fixture
def run(tmp_path, chat_model, api):
    """Distills `count` prompts, each a word of its own twice; returns what came of it. Nothing sleeps."""
    waits = []

    def go(count=20, urls=None, concurrency=4, served_model=None, **changes):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(f'{{"prompt": "w{i} w{i}", "id": "p{i}"}}\n' for i in range(count)))
        config = DistillConfig(**{"model": str(chat_model), "prompts": str(prompts), **changes})
        servers = ServerConfig(tuple(urls or [api.url]), concurrency, served_model, timeout_s=60.0)
        return distill_from_servers(config, servers, tmp_path / "text.npz", progress=False, wait=waits.append)

    go.waits, go.output = waits, tmp_path / "text.npz"
    return go


def ids_of(output):
    with np.load(output) as arrays:
        return arrays["ids"].tolist()


def failures(output):
    return [json.loads(line) for line in output.with_name("text.failures.jsonl").read_text().splitlines()]


def test_nothing_is_lost_or_doubled_by_a_server_that_misbehaves(run, api, chat_model):
    others_answered = threading.Event()

    def slow(handler):
        others_answered.wait(60)

    def last(handler):
        others_answered.set()

    api.script |= {
        "w0 w0": [slow],
        "w1 w1": [(429, {"Retry-After": "7"}), 500, FINE],
        "w2 w2": [dropped, dropped, FINE],
        "w3 w3": [cut_off, FINE],
        "w4 w4": [b'{"choices": [{"mess', b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', FINE],
        "w5 w5": [completion("w9", finish=None), completion("w9", finish="abort"), FINE],
        "w6 w6": [completion(["w9"]), completion("w9", usage={"prompt_tokens": "4"}), FINE],
        "w7 w7": [500],
        "w8 w8": [400],
        "w9 w9": [completion("w1", usage={"prompt_tokens": 3})],
        "w10 w10": [completion("w1", token_ids=[4, 99])],
        "w11 w11": [completion("", token_ids=[])],
        "w12 w12": [completion("w1", token_ids=[True])],
        "w19 w19": [last],
    }
    report = run(concurrency=5)
    expected = [i for i in range(20) if i not in (7, 8, 9, 10, 11, 12)]
    assert ids_of(run.output) == [f"p{i}" for i in expected]
    dataset, tokenizer = load_dataset(run.output), AutoTokenizer.from_pretrained(chat_model)
    for place, i in enumerate(expected):
        prompt = encode(tokenizer, [{"role": "user", "content": f"w{i} w{i}"}])
        assert dataset.prompt_lengths[place] == len(prompt)
        assert dataset.sequence(place).tolist() == [*prompt, 4 + i, 4 + i, EOS]
    assert (report.answers, report.failures, report.exact, report.recounted) == (14, 6, 0, 0)
    listed = {line["index"]: line for line in failures(run.output)}
    assert sorted(listed) == [7, 8, 9, 10, 11, 12] and all(line["id"] == f"p{i}" for i, line in listed.items())
    assert [listed[i]["attempts"] for i in sorted(listed)] == [ATTEMPTS, 1, 1, 1, 1, ATTEMPTS]
    said = ["HTTP 500", "HTTP 400", "(3) than the chat template", "got 99, expected tokens in 0..31", "got nothing",
    "token_ids: expected a list"]  # fmt: skip
    assert all(message in listed[i]["error"] for i, message in zip(sorted(listed), said, strict=True))
    assert api.most_in_flight <= 5 and all(
        count == 1 for p, count in api.answered.items() if int(p[1:].split()[0]) > 12
    )
    assert max(run.waits) > 6.0


def test_a_second_run_asks_for_failures_alone(run, api):
    api.script["w3 w3"] = [400]
    run(6)
    assert run.output.with_name("text.npz.parts").is_dir()
    before = len(api.requests)
    api.script.clear()
    report = run(6)
    assert [body["messages"][0]["content"] for body in api.requests[before:]] == ["w3 w3"]
    assert ids_of(run.output) == [f"p{i}" for i in range(6)] and report.failures == 0
    assert not run.output.with_name("text.failures.jsonl").exists()
    assert not run.output.with_name("text.npz.parts").exists()


def test_every_prompt_has_a_seed_of_its_own_whatever_the_concurrency(run, api):
    run(8, concurrency=1, seed=5)
    first = {body["messages"][0]["content"]: body for body in api.requests}
    api.requests.clear()
    run(8, concurrency=8, seed=5)
    assert {body["messages"][0]["content"]: body for body in api.requests} == first
    assert len({body["seed"] for body in first.values()}) == 8
    assert sorted(body["temperature"] for body in first.values()) == [0.0] * 4 + [0.7] * 4
    assert all(body["model"] == "tiny" and body["max_tokens"] == 192 for body in first.values())


def test_token_ids_of_the_server_are_kept_as_they_are(run, api, chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)

    def reply(body):
        prompt = encode(tokenizer, body["messages"])
        other = prompt[:-1] + [9]
        ids = {"token_ids": [7, 7, EOS]} if body["return_token_ids"] else {}
        return completion("text", prompt_token_ids=other if "w2" in body["messages"][0]["content"] else prompt, **ids)

    api.reply = reply
    report = run(4)
    dataset = load_dataset(run.output)
    assert [dataset.sequence(i)[-3:].tolist() for i in range(3)] == [[7, 7, EOS]] * 3 and report.exact == 3
    assert [line["id"] for line in failures(run.output)] == ["p2"]


def test_a_server_of_openais_fields_alone_is_asked_without_others(run, api):
    api.strict = True
    api.reply = lambda body: completion("w1 w2", finish="length", usage={"prompt_tokens": 5, "completion_tokens": 3})
    report = run(6)
    assert report.answers == 6 and report.exact == 0 and report.recounted == 6
    assert not {"return_token_ids", "top_k"} & set().union(*api.requests)
    assert load_dataset(run.output).sequence(0)[-2:].tolist() == [5, 6]  # cut at the limit: no end token


def test_a_server_that_is_gone_is_left_for_the_others(run, api):
    with Api() as other:
        gone = other.url
    report = run(12, urls=[gone, api.url], served_model="tiny")
    assert report.answers == 12 and report.failures == 0


def test_a_run_ends_when_no_server_answers_and_goes_on_later(run, api):
    for i in range(2, 60):
        api.script[f"w{i} w{i}"] = [503]
    with pytest.raises(ConnectionError, match=rf"^server: the last {FAILURES_IN_A_ROW} prompts got no answer, .*503"):
        run(60, concurrency=1)
    api.script.clear()
    assert run(60).answers == 60 and api.attempts["w0 w0"] == 1


@pytest.mark.parametrize("status, said", [(401, KEY_VARIABLE), (404, "a model it serves"), (307, "expected the URL")])
def test_a_server_that_takes_nothing_ends_the_run_at_once(run, api, status, said):
    api.script["w0 w0"] = [(status, {"Location": "http://127.0.0.1:1/v1"})]
    with pytest.raises(ValueError, match=rf"^server: .*HTTP {status}.*{said}"):
        run(3, concurrency=1)
    assert len(api.requests) == 1


def test_reasoning_that_is_taken_out_of_the_text_is_refused(run, api):
    document = completion("w1")
    document["choices"][0]["message"]["reasoning_content"] = "w2"
    api.reply = lambda body: document
    with pytest.raises(ValueError, match="takes reasoning or tool calls out of the text"):
        run(2)


def test_the_key_is_sent_and_neither_logged_nor_stored(run, api, monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    api.script["w1 w1"] = [b'{"key": "sk-secret"']
    api.script["w2 w2"] = [lambda handler: handler.send(400, b"Incorrect API key sk-secret") or "gone"]
    run(4)
    assert all(headers["Authorization"] == "Bearer sk-secret" for headers in api.headers)
    assert "[key]" in json.dumps(failures(run.output))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]
    for status in (401, 302):
        api.script["w1 w1"] = [lambda handler, s=status: handler.send(s, b"sk-secret", {"Location": "/"}) or "gone"]
        with pytest.raises(ValueError) as caught:
            run(4)
        assert "[key]" in str(caught.value) and "sk-secret" not in str(caught.value)


def test_answers_of_other_settings_or_prompts_are_not_gone_on_with(run, api, chat_model):
    api.script["w1 w1"] = [400]
    run(3)
    with pytest.raises(ValueError, match=r"^temperature: got 0.5, but .* was begun with 0.7"):
        run(3, temperature=0.5)
    with pytest.raises(ValueError, match=r"^served_model: got 'other', but .* was begun with 'tiny'"):
        run(3, served_model="other")
    answers = run.output.with_name("text.npz.parts") / "answers.jsonl"
    whole = answers.read_text()
    with pytest.raises(ValueError, match=r"^batch_size: got 16, but .* was begun with None"):
        distill(DistillConfig(str(chat_model), str(run.output.with_name("prompts.jsonl"))), run.output)
    first = json.loads(whole.splitlines()[0])
    for change, said in (
        ({"id": "p9"}, "with another prompt"), ({"prompt": [4]}, "with another prompt"),
        ({"index": 9}, "another prompt"),
        ({"answer": []}, "answer: got nothing"), ({"answer": [32]}, "answer: got 32"), ({"exact": 1}, "exact: got int"),
    ):  # fmt: skip
        answers.write_text(json.dumps(first | change) + "\n" + whole)
        with pytest.raises(ValueError, match=f"answers.jsonl, line 1: no answer of this run: .*{said}"):
            run(3)
    answers.write_text(whole + json.dumps(first) + "\n")
    with pytest.raises(ValueError, match=f"line 3: no answer of this run: index: got {first['index']} a second time"):
        run(3)
    answers.write_text(whole + '{"index": 1, "id"')
    api.script.clear()
    assert run(3).answers == 3


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "http://", "http://[::1/v1", "http://a:b/v1"])
def test_another_kind_of_url_is_refused(url):
    with pytest.raises(ValueError, match=r"^server: got"):
        Server(url)


@pytest.mark.parametrize("url", ["http://me:secret@a/v1", "https://a/v1?key=secret"])
def test_credentials_in_a_url_are_refused_untold(url):
    with pytest.raises(ValueError, match=r"^server: got a URL of a with credentials or a query") as caught:
        Server(url)
    assert "secret" not in str(caught.value)


def test_the_served_model_is_the_only_one_or_named(run, api):
    api.names = ["one", "two"]
    with pytest.raises(ValueError, match=r"^served_model: got none, and .* lists one, two"):
        run(2)
    run(2, served_model="two")
    assert {body["model"] for body in api.requests} == {"two"}
