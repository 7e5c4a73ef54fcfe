"""Files of a training run: checkpoint, log and predictor, each whole at any moment, and read strictly."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import torch

from firp.drafting.predictor import FirpPredictor
from firp.tools.files import explained, staging, write_atomically

FIELDS = {"config": dict, "step": int, "seconds": float, "predictor": dict, "optimizer": dict}


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state`, of FIELDS; a kill or a full disk leaves the checkpoint before.

    Raises:
        OSError: what the disk refuses.
    """

    def write(staged: Path) -> None:
        with open(staged, "wb") as file:  # given a path, torch.save does not tell why a write fails
            torch.save(state, file)

    write_atomically(path, write)


def read_checkpoint(path: Path, config: dict, device: torch.device) -> dict:
    """What `write_checkpoint` wrote for a run of the same settings.

    Raises:
        ValueError: a file that is damaged or no checkpoint, or one of other settings (the field is named).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        if damaged is not None:
            raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.keys() != FIELDS.keys():
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"got {str(found)[:200]}, expected the fields {', '.join(FIELDS)}")
        for name, kind in FIELDS.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{name}: got {type(state[name]).__name__}, expected {kind.__name__}")
        steps = state["config"].get("steps")
        if isinstance(steps, int) and not 0 <= state["step"] <= steps:
            raise ValueError(f"step: got {state['step']}, expected 0..{steps} (steps)")
    except Exception as error:
        raise ValueError(f"output: cannot read the checkpoint {path}: {error}; remove it to begin again") from error
    for name, value in config.items():
        if state["config"].get(name) != value:
            raise ValueError(
                f"{name}: got {value!r}, but {path} was trained with {state['config'].get(name)!r}; "
                "choose another output folder or the same settings"
            )
    return state


def restore(path: Path, state: dict, predictor: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give predictor and optimizer the tensors of a checkpoint.

    Raises:
        ValueError: tensors of other names or shapes.
    """
    try:
        predictor.load_state_dict(state["predictor"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape:
                    raise ValueError(f"{name}: got shape {list(moments[name].shape)}, expected {list(parameter.shape)}")
    except Exception as error:
        raise ValueError(
            f"output: the checkpoint {path} is not of this run: {error}; remove it to begin again"
        ) from error


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


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of a log, if there is one, that tell of later steps, and a last line that was cut off.

    Raises:
        ValueError: a line that is not of a training log; its number is named.
    """
    if not path.is_file():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"output: {path}, line {number}: no line of a training log: {error!r}; remove the file"
            ) from error
    write_atomically(path, lambda staging: staging.write_bytes(b"".join(kept)))
