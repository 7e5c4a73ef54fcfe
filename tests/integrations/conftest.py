"""A tiny model with a tokenizer in a folder that contains `custom_generate/`."""

import shutil
from pathlib import Path

import firp
import pytest
from firp.integrations.export import export
from transformers import AutoTokenizer

from benchmarks.gpu import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with model/ (which contains custom_generate/), predictor/, exported/ and prompts.jsonl."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_model.write(root)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(root / "model")
    export("custom-generate", root / "exported", firp.load_predictor(root / "predictor"), root / "predictor")
    shutil.copytree(root / "exported/custom_generate", root / "model/custom_generate")
    return root
