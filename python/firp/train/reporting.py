"""Figures of a training run beside its log file: to TensorBoard or to Weights & Biases."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

REPORT_TO = ("none", "tensorboard", "wandb")


class Reporter:
    """Reports records of the training log; "none" reports nothing.

    Figures per offset are named such as train/kl_1. TensorBoard's files go to `output`. Weights & Biases takes the
    project of WANDB_PROJECT, else "firp", and goes on with its run of the same output folder.

    Raises:
        ValueError: another name, or a library that is not installed.
    """

    def __init__(self, name: str, output: Path, config: dict) -> None:
        if name not in REPORT_TO:
            raise ValueError(f"report_to: got {name!r}, expected one of {', '.join(REPORT_TO)}")
        self.name, self.output, self.config = name, output, config
        self.writer: Any = None
        try:
            if name == "tensorboard":
                import tensorboard  # noqa: F401 (torch's own message does not name it)
            elif name == "wandb":
                import wandb  # noqa: F401
        except ImportError as error:
            raise ValueError(f"report_to: {name} is not installed: pip install {name}, or none") from error

    def start(self, step: int) -> None:
        """Begin, or go on after `step`."""
        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.output / "tensorboard"), purge_step=step + 1 if step else None)
        elif self.name == "wandb":
            import wandb

            run_id = hashlib.blake2b(str(self.output.resolve()).encode(), digest_size=8).hexdigest()
            self.writer = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "firp"), name=self.output.name, dir=str(self.output),
                id=run_id, resume="allow", config=self.config,
            )  # fmt: skip

    def report(self, record: dict) -> None:
        """Report a record of the log."""
        if self.writer is None:
            return
        figures: dict[str, float] = {}
        for name, value in record.items():
            values = {f"{name}_{j}": x for j, x in enumerate(value, 1)} if isinstance(value, list) else {name: value}
            if name not in ("event", "step"):
                figures |= {f"{record['event']}/{key}": x for key, x in values.items()}
        if self.name == "wandb":
            self.writer.log(figures, step=record["step"])
        else:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, record["step"])

    def end(self) -> None:
        """Write out what is left."""
        if self.writer is not None:
            self.writer.finish() if self.name == "wandb" else self.writer.close()
