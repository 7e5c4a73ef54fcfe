"""Answers as they are accepted, in the terminal."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from firp.generation.metrics import StepEvent


class MarkingStreamer(BaseStreamer):
    """Prints text as it is accepted, with the tokens that came free in green: all of a step but its first.

    Pass it as `streamer` and its `step_ended` as `on_step`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self.tokenizer = tokenizer
        self.console = console
        self.tokens: list[int] = []
        self.printed = ""
        self._skipped_prompt = False
        self._free = False

    def step_ended(self, _: StepEvent) -> None:
        self._free = False

    def put(self, value: torch.Tensor) -> None:
        if not self._skipped_prompt:
            self._skipped_prompt = True
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("�"):
            self._print(text)
        self._free = True

    def _print(self, text: str) -> None:
        style = "bold green" if self._free else ""
        self.console.print(Text(text[len(self.printed) :], style=style), end="", soft_wrap=True)
        self.printed = text

    def end(self) -> None:
        self._free = False
        self._print(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        self.console.print()
