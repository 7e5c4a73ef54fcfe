"""`firp export`: a predictor as a folder that another tool loads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig

from firp.drafting.predictor import FirpPredictor
from firp.drafting.predictor_file import CONFIG, WEIGHTS
from firp.drafting.profile import FILE_NAME as PROFILE
from firp.integrations import custom_generate
from firp.integrations.custom_generate import SUBFOLDER
from firp.integrations.vllm_checkpoint import write_vllm_checkpoint
from firp.tools.files import write_atomically
from firp_kernels.version import __version__

CARD = "README.md"
GENERATE, REQUIREMENTS = f"{SUBFOLDER}/generate.py", f"{SUBFOLDER}/requirements.txt"
# What belongs to a predictor in its folder, where `firp train` leaves a checkpoint and a log as well.
PREDICTOR_FILES = (CONFIG, WEIGHTS, PROFILE, CARD)

SOURCE = f'''"""`generate` by FIRP decoding, with the predictor beside this file. Written by firp {__version__}."""

from {custom_generate.__name__} import generate

__all__ = ["generate"]
'''

CARD_TEXT = """\
---
library_name: transformers
{base_model}tags:
- custom_generate
- speculative-decoding
- firp
---

# FIRP speculative decoding for {name}

`model.generate` in fewer forwards, with the model's own output: every token is the model's own choice, greedy or
sampled. The method is FIRP (arXiv [2410.20488](https://arxiv.org/abs/2410.20488)). The code is the package
`firp_kernels`, which has to be installed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The lighthouse keeper opened the bottle and", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=48, custom_generate="THIS FOLDER", trust_remote_code=True)
```

Or copy `custom_generate/` into the model's own folder. A model loaded from there with `trust_remote_code=True` decodes
with FIRP at every `generate`, also in a pipeline and in `transformers serve`.

The predictor in `custom_generate/` was trained for {architecture}, {num_layers} layers of width {hidden_size} and
{vocab_size} tokens: {num_offsets} linear maps after layer {insertion_layer}. A model of another shape is refused.
"""


def write_custom_generate(
    folder: Path, predictor: FirpPredictor, source: Path, config: PreTrainedConfig | None
) -> None:
    """Write a folder for `model.generate(custom_generate=FOLDER)`, which a model's own folder may contain too.

    Args:
        folder: made here.
        source: folder of the predictor; its files are copied as they are.
        config: not needed.
    """
    (folder / SUBFOLDER).mkdir(parents=True)
    (folder / GENERATE).write_text(SOURCE)
    (folder / REQUIREMENTS).write_text(f"firp_kernels>={__version__}\n")
    for name in PREDICTOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / SUBFOLDER / name)
    # What stands in the card's code is an id or the name of a folder, and no other text.
    name = predictor.base_model if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", predictor.base_model) else "the base model"
    on_hub = "/" in name
    (folder / CARD).write_text(
        CARD_TEXT.format_map(vars(predictor) | {"name": name, "base_model": f"base_model: {name}\n" if on_hub else ""}),
        encoding="utf-8",
    )


def _write_vllm(folder: Path, predictor: FirpPredictor, source: Path, config: PreTrainedConfig | None) -> None:
    if config is None:
        raise ValueError("model: got none, expected the base model: vLLM's configuration is made from its own")
    write_vllm_checkpoint(folder, predictor, config)


# By the name of `firp export --to`.
FORMATS: dict[str, Callable[[Path, FirpPredictor, Path, PreTrainedConfig | None], None]] = {
    "custom-generate": write_custom_generate,
    "vllm": _write_vllm,
}


def check_format(name: str) -> None:
    """Raise ValueError for a format that nothing is written in."""
    if name not in FORMATS:
        raise ValueError(f"to: got {name!r}, expected {' or '.join(FORMATS)}")


def check_output(output: Path) -> None:
    """Raise OSError where a folder cannot be written, or where something is already."""
    if output.is_symlink() and not output.exists():
        raise FileExistsError(f"output: {output} is a link to nowhere, expected a folder that is not there yet")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output: {output} is not empty, expected a folder that is not there yet")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: {output} is a file, expected a folder that is not there yet")


def export(
    to: str, output: Path, predictor: FirpPredictor, source: Path, config: PreTrainedConfig | None = None
) -> None:
    """Write a predictor as another tool loads it: the whole folder, or nothing.

    Args:
        to: a key of `FORMATS`.
        output: a folder that is not there yet, or empty.
        source: folder of the predictor's files.
        config: of the base model, which "vllm" needs.

    Raises:
        ValueError: an unknown format, or no `config` where one is needed.
        OSError: a folder with something in it, or what the disk refuses.
    """
    check_format(to)
    check_output(output)
    write_atomically(output, lambda staged: FORMATS[to](staged, predictor, source, config))
