"""Ctrl-C ends an answer and keeps the conversation; at the prompt, or as a model loads, it ends the command in
a line."""

import io
import os
import signal

import firp
import pytest
import torch
from firp.cli import chat as module
from firp.decoder.rotary import context_limit
from firp.tools.prompt_files import encode


def arguments(folder, *more):
    return (
        "chat",
        "--model",
        folder / "model",
        "--predictor",
        folder / "predictor",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *more,
    )


@pytest.fixture(autouse=True)
def in_the_foreground():
    """A shell's background job ignores Ctrl-C, and so would these tests there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def press(monkeypatch):
    """Press Ctrl-C as the `after`-th token of the answers numbered in `answers` is written."""

    def install(answers, after, times=1):
        made = []

        class Pressing(module.MarkingStreamer):
            def __init__(self, *args):
                super().__init__(*args)
                made.append(self)

            def put(self, value):
                super().put(value)
                if len(made) - 1 in answers and len(self.tokens) >= after and value.ndim == 1:
                    for _ in range(times):
                        os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(module, "MarkingStreamer", Pressing)
        return made

    return install


def lines_of(out):
    return [line for line in out.splitlines() if line]


def talk(cli, folder, monkeypatch, text, *more):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli(*arguments(folder, *more))


@pytest.mark.parametrize("more", [(), ("--plain",), ("--temperature", 1.0, "--seed", 3)])
def test_the_next_answer_is_that_of_a_fresh_engine(cli, folder, monkeypatch, press, more):
    made = press({0, 1}, after=5)
    code, out, _ = talk(cli, folder, monkeypatch, "w1 w2\nw3\nw5 w6\n/exit\nw9\n", "--max-new-tokens", 40, *more)
    assert code == 0 and len(made) == 3 and [line for line in lines_of(out) if line.endswith("tokens, stopped")]
    model, tokenizer = firp.load_model(str(folder / "model"), "float32")
    texts = [tokenizer.decode(streamer.tokens, skip_special_tokens=True) for streamer in made]
    assert 5 <= len(made[0].tokens) < 40 and 5 <= len(made[1].tokens) < 40
    messages = []
    for said, answered in zip(["w1 w2", "w3"], texts, strict=False):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    ids = torch.tensor([encode(tokenizer, [*messages, {"role": "user", "content": "w5 w6"}])])
    drafter = None if "--plain" in more else firp.load_predictor(folder / "predictor")
    sampling = (
        {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} if "--seed" in more else {"do_sample": False}
    )
    room = min(40, context_limit(model.config) - ids.shape[1])
    fresh = firp.generate(
        model, ids, predictor=drafter, max_new_tokens=room, seed=3 if "--seed" in more else 0, **sampling
    )
    assert made[2].tokens == fresh[0, ids.shape[1] :].tolist()


def test_each_partial_answer_is_shown_whole(cli, folder, monkeypatch, press):
    made = press({0}, after=3)
    code, out, _ = talk(cli, folder, monkeypatch, "w1 w2\n", "--max-new-tokens", 40)
    assert code == 0
    figures = lines_of(out)[-1]
    assert figures == f"{len(made[0].tokens)} tokens, stopped"
    assert made[0].printed and made[0].printed in " ".join(lines_of(out))


def test_a_second_press_right_after_ends_the_conversation(cli, folder, monkeypatch, press):
    press({0}, after=3, times=2)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = talk(cli, folder, monkeypatch, "w1 w2\nw3\n", "--max-new-tokens", 40)
    assert code == 130 and err.splitlines()[-1] == "interrupted; finished work is kept"
    assert signal.getsignal(signal.SIGINT) is before


class _Pressed(io.StringIO):
    def readline(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
        return ""


def test_at_the_prompt_it_ends_the_conversation(cli, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", _Pressed())
    code, out, err = cli(*arguments(folder))
    assert code == 130 and err.splitlines()[-1] == "interrupted; finished work is kept" and "Traceback" not in out + err


@pytest.mark.parametrize("command", ["chat", "generate", "bench"])
def test_while_the_model_loads_it_is_one_line(cli, folder, monkeypatch, command):
    def loading(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loading)
    code, _, err = cli(command, *arguments(folder)[1:])
    assert code == 130 and "Traceback" not in err and err.splitlines()[-1] == "interrupted; finished work is kept"


def test_the_help_says_so(cli):
    code, out, _ = cli("chat", "--help")
    assert code == 0 and "Ctrl-C ends an answer" in " ".join(out.split()) and "exit code 130" in " ".join(out.split())


def test_a_closed_stdin_ends_the_conversation(cli, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert cli(*arguments(folder))[0] == 0
