"""`transformers serve` and `transformers chat` as commands, over HTTP: needs the extra `serving`."""

import http.client
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import import_utils

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "transformers.cli.transformers"]

serve_available = getattr(import_utils, "is_serve_available", None)
pytestmark = pytest.mark.skipif(
    serve_available is None or not serve_available(), reason="the extra is missing: pip install 'firp_kernels[serving]'"
)


@pytest.fixture(scope="module")
def server(tiny):
    """Host and port of a server for the tiny model's folder."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PYTHONUNBUFFERED": "1"}
    arguments = ["--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        [*COMMAND, "serve", str(tiny / "model"), *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    told = []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"running on http://([\d.]+):(\d+)", line):
            break
    else:
        pytest.fail("".join(told))
    # A full pipe would stop the server.
    with ThreadPoolExecutor(1) as drain:
        drain.submit(lambda: told.extend(process.stderr))
        yield found[1], int(found[2])
        process.terminate()
        process.wait()


def connect(server, prompt, max_tokens, stream):
    connection = http.client.HTTPConnection(*server, timeout=120)
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "stream": stream}
    body["temperature"] = 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def streamed(server, prompt, max_tokens=20):
    """Text and error of a streamed answer."""
    connection, response = connect(server, prompt, max_tokens, True)
    text, error = "", None
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            error = event.get("error", error)
            text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
    connection.close()
    return text, error


@pytest.fixture(scope="module")
def answer(tiny):
    """What Hugging Face alone says."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")

    def say(prompt):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = model.generate(ids, max_new_tokens=20, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return say


def test_two_streams_at_once_and_an_answer_in_one_piece(server, answer):
    prompts = ["w1 w2 w3", "w9 w8"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: streamed(server, prompt), prompts))
    assert found == [(answer(prompt), None) for prompt in prompts]
    connection, response = connect(server, prompts[0], 20, False)
    assert json.loads(response.read())["choices"][0]["message"]["content"] == answer(prompts[0])
    connection.close()


def test_a_client_that_leaves_in_mid_stream(server, answer):
    connection, response = connect(server, "w1 w2 w3", 200, True)
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    assert streamed(server, "w9 w8") == (answer("w9 w8"), None)


def test_a_prompt_past_the_context(server, answer):
    text, error = streamed(server, "w5 " * 300)
    assert text == "" and error.startswith("input_ids: got a prompt of 300 tokens, expected at most 255")
    connection, response = connect(server, "w5 " * 300, 20, False)
    assert response.status == 500
    connection.close()
    assert streamed(server, "w9 w8") == (answer("w9 w8"), None)


def test_a_chat_in_the_terminal(server, answer, tiny, tmp_path):
    """The answer, then a question whether to go on past the limit of tokens, then the end."""
    url = f"http://{server[0]}:{server[1]}"
    done = subprocess.run(
        [*COMMAND, "chat", str(tiny / "model"), url, "max_new_tokens=20", "do_sample=False"],
        input="w1 w2 w3\nN\n!exit\n", capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " ".join(answer("w1 w2 w3").split()) in " ".join(done.stdout.split())
