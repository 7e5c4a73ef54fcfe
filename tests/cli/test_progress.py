"""Progress bars are for terminals; nothing of `transformers` is changed for others, or afterwards."""

import io
import os
import subprocess
import sys
import threading

import firp
import pytest
from firp.tools.progress import MAKERS, bars_on_terminals_only
from started import start_firp
from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging


class Terminal(io.StringIO):
    def isatty(self):
        return True


def makers():
    return [getattr(place, name) for place, name in MAKERS]


@pytest.fixture(autouse=True)
def unchanged():
    before, shown = makers(), logging.is_progress_bar_enabled()
    yield
    assert makers() == before and logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize("stream, shown", [(io.StringIO, False), (Terminal, True)])
def test_loading_shows_bars_on_a_terminal_only(folder, monkeypatch, stream, shown):
    monkeypatch.setattr("sys.stderr", stream())
    firp.load_model(str(folder / "model"))
    assert ("Loading weights" in sys.stderr.getvalue()) == shown


@pytest.mark.parametrize(
    "make", [lambda: logging.tqdm(range(3), desc="saving"), lambda: gguf.tqdm(range(3), desc="converting")]
)
@pytest.mark.parametrize("stream, shown", [(io.StringIO, False), (Terminal, True)])
def test_saving_and_converting_do_as_well(monkeypatch, make, stream, shown):
    monkeypatch.setattr("sys.stderr", stream())
    with bars_on_terminals_only():
        assert list(make()) == [0, 1, 2]
    assert bool(sys.stderr.getvalue()) == shown


def test_other_threads_keep_their_bars(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with bars_on_terminals_only():
        other = threading.Thread(target=lambda: list(logging.tqdm(range(3), desc="of another thread")))
        other.start()
        other.join()
        list(logging.tqdm(range(3), desc="own"))
    assert "of another thread" in sys.stderr.getvalue() and "own" not in sys.stderr.getvalue()


def test_contexts_that_overlap_restore_what_was_before(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    entered, leave = threading.Event(), threading.Event()

    def other():
        with bars_on_terminals_only():
            entered.set()
            leave.wait()
            list(logging.tqdm(range(3)))

    before, thread = makers(), threading.Thread(target=other)
    with bars_on_terminals_only(), bars_on_terminals_only():
        thread.start()
        entered.wait()
    assert makers() != before
    list(logging.tqdm(range(3), desc="own, afterwards"))
    leave.set()
    thread.join()
    assert makers() == before and "own, afterwards" in sys.stderr.getvalue()


def test_an_error_restores_what_was_before(tmp_path):
    with pytest.raises((OSError, ValueError)):
        firp.load_model(str(tmp_path))


def test_a_callers_own_switch_is_respected(folder, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    logging.disable_progress_bar()
    try:
        firp.load_model(str(folder / "model"))
        assert not logging.is_progress_bar_enabled() and "Loading weights" not in sys.stderr.getvalue()
    finally:
        logging.enable_progress_bar()


def test_a_command_away_from_a_terminal_shows_none(folder, tmp_path):
    named = ("--model", folder / "model", "--predictor", folder / "predictor")
    process = start_firp(tmp_path, "generate", "w1", *named, "--max-new-tokens", 4)
    process.join()
    said = (tmp_path / "stderr").read_text()
    assert process.exitcode == 0 and "Loading weights:" not in said and "%|" not in said
    assert (tmp_path / "stdout").read_text()


def test_a_full_stdout_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "firp", "doctor"], stdout=full, stderr=subprocess.PIPE, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].endswith("No space left on device")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_more_threads_than_cores_work_and_are_mentioned(cli, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1000)
    code, out, _ = cli("doctor")
    assert code == 0 and "more threads than cores, which wait for each other: set OMP_NUM_THREADS=" in out
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert "more threads than cores" not in cli("doctor")[1]


def test_memory_that_runs_out_is_one_line(cli, folder, monkeypatch):
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ):
        monkeypatch.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained",
            lambda *_, error=error, **__: (_ for _ in ()).throw(error),
        )
        code, _, err = cli("generate", "w1", "--model", folder / "model", "--predictor", folder / "predictor")
        assert code == 2 and err.splitlines()[-1].startswith("error: out of memory: ")
