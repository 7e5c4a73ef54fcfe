"""`firp distill --server` from the command line: a kill loses nothing, options of the other way are refused."""

import json
import os
import signal
import threading

import numpy as np
from api_server import Api, write_chat_model
from started import start_firp


def test_a_run_that_is_killed_goes_on(tmp_path, cli):
    """The server kills the client as it is to answer the seventh prompt."""
    with Api() as api:
        check(api, write_chat_model(tmp_path / "tiny"), tmp_path, cli)


def check(api, chat_model, tmp_path, cli):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "text.npz"
    prompts.write_text("".join(f'{{"prompt": "w{i} w{i}"}}\n' for i in range(20)))
    common = ("--prompts", prompts, "--output", output, "--model", chat_model, "--server", api.url, "--concurrency", 3)
    answers = tmp_path / "text.npz.parts" / "answers.jsonl"
    started = threading.Event()

    def kill(handler):
        started.wait(60)
        while not answers.is_file() or answers.read_bytes().count(b"\n") < 3:
            pass
        os.kill(process.pid, signal.SIGKILL)
        return "gone"

    api.script["w7 w7"] = [kill]
    process = start_firp(tmp_path, "distill", *common)
    started.set()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not output.exists()
    kept_ids = {json.loads(line)["index"] for line in answers.read_bytes().split(b"\n")[:-1]}
    before = len(api.requests)
    api.script.clear()
    code, out, err = cli("distill", *common)
    assert code == 0, err
    # A request of the killed process may be read late: it is of a prompt without an answer, too.
    asked = {body["messages"][0]["content"] for body in api.requests[before:]}
    assert asked == {f"w{i} w{i}" for i in range(20) if i not in kept_ids}
    assert np.load(output)["ids"].tolist() == [str(i) for i in range(1, 21)]
    assert "20 answers" in out and "20 answers are text that was tokenized here" in out
    code, _, err = cli("distill", *common, "--batch-size", 4)
    assert code == 2 and "batch_size: got it with --server" in err
    code, _, err = cli("distill", "--prompts", prompts, "--output", output, "--timeout", 4)
    assert code == 2 and "timeout: got it with no --server" in err
