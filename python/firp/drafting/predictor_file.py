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
INTEGERS = {"I64": "int64", "I32": "int32"}
LARGEST = torch.finfo(torch.float16).max


class OptionalFields(TypedDict, total=False):
    """Fields of a configuration that a caller of `FirpPredictor.for_model` may give."""

    num_nodes: int
    num_lookahead: int
    tree_kind: str
    transition_rank: int
    update_width: int
    draft_vocabulary: int


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


def read_tensors(path: Path, expected: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Tensors of exactly the names, kinds and shapes of `expected`: numbers in float32 whichever floating-point dtype
    the file has, token ids in int64.

    Names, dtypes and shapes are compared in the file's header, before anything of their size is allocated.

    Raises:
        ValueError: no safetensors file, a name missing or unknown, another shape or kind, a number that float16 does
            not hold (NaN and infinity among them), token ids that do not ascend within the vocabulary; file and tensor
            are named.
    """
    try:
        # Opened twice, as safetensors calls a file that may not be read one that is not there.
        with open(path, "rb"), safe_open(path, "pt") as file:
            _check_header({name: file.get_slice(name) for name in file.keys()}, expected)  # noqa: SIM118 (no mapping)
            # Copied: the tensors are a mapping of the file, which may be overwritten while they are in use.
            kinds = {name: torch.float32 if like.is_floating_point() else like.dtype for name, like in expected.items()}
            tensors = {name: file.get_tensor(name).to(kind, copy=True) for name, kind in kinds.items()}
        for name, tensor in tensors.items():
            _check_numbers(name, tensor) if tensor.is_floating_point() else _check_tokens(name, tensor, vocab_size)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"predictor: {path}: cannot be read as safetensors: {error}") from error
    except ValueError as error:
        raise ValueError(f"predictor: {path}: {error}") from error
    return tensors


def _check_numbers(name: str, tensor: Tensor) -> None:
    if not bool((tensor.abs() <= LARGEST).all()):
        least, most = tensor.aminmax()
        raise ValueError(f"{name}: got values from {least:g} to {most:g}, expected finite ones within ±{LARGEST:g}")


def _check_tokens(name: str, tensor: Tensor, vocab_size: int) -> None:
    if not 0 <= int(tensor[0]) <= int(tensor[-1]) < vocab_size or not bool((tensor[1:] > tensor[:-1]).all()):
        raise ValueError(
            f"{name}: got {reprlib.repr(tensor.tolist())}, expected ascending token ids in 0..{vocab_size - 1}"
        )


def _check_header(slices: Mapping, expected: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - slices), sorted(slices.keys() - expected)
    if missing or unknown:
        wrapped = any(name.endswith(f".{end}") for name in unknown for end in missing)
        advice = "; save the predictor itself, not a wrapper around it" * wrapped
        raise ValueError(
            f"tensors: got {_listed(sorted(slices))}, expected {_listed(sorted(expected))} (missing: "
            f"{_listed(missing)}; unknown: {_listed(unknown)}){advice}"
        )
    for name, like in expected.items():
        dtype, found = slices[name].get_dtype(), list(slices[name].get_shape())
        dtypes = DTYPES if like.is_floating_point() else INTEGERS
        if dtype not in dtypes:
            raise ValueError(f"{name}: got dtype {dtype}, expected one of {', '.join(dtypes.values())}")
        if found != list(like.shape):
            raise ValueError(f"{name}: got shape {found}, expected {list(like.shape)} by {CONFIG}")


def _listed(names: list[str]) -> str:
    """Names in a sentence: the first few of many, each cut where it is long."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(name[:80] for name in names[:8]) or "none") + more
