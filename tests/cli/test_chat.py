"""`firp chat` with piped input."""

import io
import itertools

import pytest

GREEDY = ("--dtype", "float32", "--max-new-tokens", 6)


@pytest.fixture
def chat(cli, folder, monkeypatch):
    def run(lines: str, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code, out, err = cli(
            "chat",
            "--model",
            folder / "model",
            "--predictor",
            folder / "predictor",
            "--device",
            "cpu",
            *GREEDY,
            *arguments,
        )
        assert code == 0, err
        return [line for line in out.splitlines() if line]

    return run


def answers(lines):
    return [before for before, line in itertools.pairwise(lines) if "tokens/s" in line]


def test_an_answer_and_its_figures(chat):
    lines = chat("w1 w2\n/exit\nw9\n")
    assert any(line.startswith("/reset forgets the conversation, /exit ends it") for line in lines)
    assert len(answers(lines)) == 1 and answers(lines)[0].startswith("w")
    tokens, tau, speed = lines[-1].split(", ")
    assert tokens.endswith(" tokens") and tau.startswith("tau ") and float(speed.removesuffix(" tokens/s")) > 0


def test_the_end_of_input_ends_it(chat):
    assert len(answers(chat("w1\n\nw2\n"))) == 2


def test_turns_are_remembered_until_reset(chat):
    remembered, forgotten = answers(chat("w1 w2\nw3 w4\n")), answers(chat("w1 w2\n/reset\nw3 w4\n"))
    alone = answers(chat("w3 w4\n"))
    assert remembered[0] == forgotten[0] and remembered[1] != alone[0] == forgotten[1]


def test_plain_decoding_gives_the_same_answers(chat):
    drafted, plain = chat("w1 w2\nw3\n"), chat("w1 w2\nw3\n", "--plain")
    assert answers(drafted) == answers(plain) and "tau 1.00" in plain[-1]


def test_sampling_gives_the_same_answers_for_a_seed(chat):
    options = ("--temperature", 1.0, "--seed", 4)
    assert answers(chat("w1\n", *options)) == answers(chat("w1\n", "--plain", *options))


def test_an_unknown_command_is_named(chat):
    assert any(line.startswith("unknown command /help; /reset forgets") for line in chat("/help\n"))


def test_a_full_context_is_said(chat):
    lines = chat("w1 " * 300 + "\nw1\n")
    assert any("fill the model's context; /reset starts again" in line for line in lines) and len(answers(lines)) == 1


def test_a_system_message_counts(chat):
    assert answers(chat("w1\n", "--system", "w7 w8")) != answers(chat("w1\n"))


def test_bad_options_are_one_line(cli, folder):
    common = ("--model", folder / "model", "--predictor", folder / "predictor")
    for option, value in (("--temperature", -1), ("--max-new-tokens", 0), ("--tree-kind", "bush")):
        code, _, err = cli("chat", *common, option, value)
        assert code == 2 and err.startswith(f"error: {option[2:].replace('-', '_')}"), err
