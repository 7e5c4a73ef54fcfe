"""Files of a training run: checkpoint, log and predictor, each whole at any moment."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import torch

from firp.files import explained, staging, write_atomically
from firp.predictor import FirpPredictor


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state`; a kill or a full disk leaves the checkpoint before.

    Raises:
        OSError: what the disk refuses.
    """

    def write(staged: Path) -> None:
        with open(staged, "wb") as file:  # given a path, torch.save does not tell why a write fails
            torch.save(state, file)

    write_atomically(path, write)


def read_checkpoint(path: Path, config: dict, device: torch.device) -> dict:
    """What `write_checkpoint` wrote for a run of the same configuration.

    Raises:
        ValueError: a file that cannot be read, or of another configuration (the field is named).
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        theirs = {name: state["config"].get(name) for name in config}
    except Exception as error:
        raise ValueError(
            f"output: cannot read the checkpoint {path} ({type(error).__name__}: {' '.join(str(error).split())}); "
            "remove it to begin anew, or choose another output folder"
        ) from error
    for name, value in config.items():
        if theirs[name] != value:
            raise ValueError(
                f"{name}: got {value!r}, but {path} was trained with {theirs[name]!r}; "
                "choose another output folder or the same settings"
            )
    return state


def write_predictor(output: Path, predictor: FirpPredictor) -> None:
    """Put the predictor's files into `output`, each whole; its configuration, without which none loads, comes last.

    A model card that is there already stays.

    Raises:
        OSError: what the disk refuses.
    """
    config = output / "config.json"
    with explained(output), staging(config) as folder:
        predictor.save_pretrained(folder)
        shutil.copymode(folder / config.name, folder / "model.safetensors")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == config.name):
            if path.name != "README.md" or not (output / path.name).exists():
                os.replace(path, output / path.name)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log.

    Raises:
        OSError: what the disk refuses.
    """
    with explained(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def drop_lines_past(log: Path, step: int) -> None:
    """Keep the lines up to `step`; later ones, and one that was cut off, are of a run that was killed."""
    kept = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if _step_of(line) <= step]
    write_atomically(log, lambda path: path.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
