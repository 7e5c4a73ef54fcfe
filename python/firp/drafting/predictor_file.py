"""A predictor's two files, `config.json` and `model.safetensors`, read strictly: what is not as expected is refused."""

from __future__ import annotations

import inspect
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firp.tools.files import read_object

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by their names in safetensors
LARGEST = torch.finfo(torch.float16).max


class OptionalFields(TypedDict, total=False):
    """Fields of a configuration that a caller of `FirpPredictor.for_model` may give."""

    num_nodes: int
    num_lookahead: int
    tree_kind: str
    transition_rank: int
    context_width: int


def find_files(source: str | os.PathLike, **hub: object) -> tuple[Path, Path]:
    """Paths of a predictor's configuration and weights.

    Args:
        source: a folder or a hub id.
        hub: options of `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: a folder that is not there, or without one of the files.
        ValueError: a file instead of its folder, or a hub repository that cannot be had.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"predictor: got {type(source).__name__}, expected a folder or a hub id")
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        paths = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"predictor: {folder} has no {path.name} that can be read")
        return paths
    if os.path.exists(folder):
        raise ValueError(f"predictor: got the file {str(source)!r}, expected the folder of {CONFIG} and {WEIGHTS}")
    if str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"predictor: got {str(source)!r}, expected an existing folder or a hub id")
    try:
        return Path(hf_hub_download(str(source), CONFIG, **hub)), Path(hf_hub_download(str(source), WEIGHTS, **hub))
    except Exception as error:
        raise ValueError(f"predictor: cannot load {str(source)!r} from the hub: {error}") from error


def read_fields(path: Path, predictor: type) -> dict[str, Any]:
    """The arguments of the class `predictor`, all of them integers or strings, that a configuration file holds.

    Raises:
        ValueError: no JSON object, or a field that is missing, unknown or of the wrong type; file and field are named.
    """
    try:
        fields = read_object(path)
        parameters = dict(inspect.signature(predictor.__init__).parameters)  # type: ignore[misc]
        del parameters["self"]
        for name, value in fields.items():
            if name not in parameters:
                raise ValueError(f"{reprlib.repr(name)}: got an unknown field, expected only {', '.join(parameters)}")
            _check_field(name, value, parameters[name].annotation)
        for name, parameter in parameters.items():
            if name not in fields and parameter.default is parameter.empty:
                raise ValueError(f"{name}: got none, expected one (required)")
    except ValueError as error:
        raise ValueError(f"predictor: {path}: {error}") from error
    return fields


def _check_field(name: str, value: object, annotation: str) -> None:
    if annotation == "str" and not isinstance(value, str):
        raise ValueError(f"{name}: got {reprlib.repr(value)}, expected a string")
    if annotation == "int" and (type(value) is not int or abs(value) >= 1 << 63):
        raise ValueError(f"{name}: got {reprlib.repr(value)}, expected an integer")


def read_tensors(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors of exactly these names and shapes, in float32 whichever floating-point dtype the file has.

    Names, dtypes and shapes are compared in the file's header, before anything of their size is allocated.

    Raises:
        ValueError: no safetensors file, a name missing or unknown, another shape, no floating-point dtype, or a value
            that float16 does not hold (NaN and infinity among them); file and tensor are named.
    """
    try:
        # Opened twice, as safetensors calls a file that may not be read one that is not there.
        with open(path, "rb"), safe_open(path, "pt") as file:
            _check_header({name: file.get_slice(name) for name in file.keys()}, shapes)  # noqa: SIM118 (no mapping)
            # Copied: the tensors are a mapping of the file, which may be overwritten while they are in use.
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in shapes}
        for name, tensor in tensors.items():
            if not bool((tensor.abs() <= LARGEST).all()):
                least, most = tensor.aminmax()
                raise ValueError(
                    f"{name}: got values from {least:g} to {most:g}, expected finite ones within ±{LARGEST:g}"
                )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"predictor: {path}: cannot be read as safetensors: {error}") from error
    except ValueError as error:
        raise ValueError(f"predictor: {path}: {error}") from error
    return tensors


def _check_header(slices: Mapping, shapes: Mapping[str, torch.Size]) -> None:
    missing, unknown = sorted(shapes.keys() - slices), sorted(slices.keys() - shapes)
    if missing or unknown:
        wrapped = any(name.endswith(f".{end}") for name in unknown for end in missing)
        raise ValueError(
            f"tensors: got {_listed(sorted(slices))}, expected {_listed(sorted(shapes))} (missing: {_listed(missing)};"
            f" unknown: {_listed(unknown)})" + "; save the predictor itself, not a wrapper around it" * wrapped
        )
    for name, shape in shapes.items():
        dtype, found = slices[name].get_dtype(), list(slices[name].get_shape())
        if dtype not in DTYPES:
            raise ValueError(f"{name}: got dtype {dtype}, expected one of {', '.join(DTYPES.values())}")
        if found != list(shape):
            raise ValueError(f"{name}: got shape {found}, expected {list(shape)} by {CONFIG}")


def _listed(names: list[str]) -> str:
    """Names in a sentence: the first few of many, each cut where it is long."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(name[:80] for name in names[:8]) or "none") + more
