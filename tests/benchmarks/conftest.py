"""A setup of the paper's figures over a tiny model."""

import json

import numpy as np
import pytest
import torch
from models import tiny_model, tiny_predictor

import benchmarks.paper.setup as setups
from benchmarks.baselines.heads import Heads
from benchmarks.paper.setup import Setup

PROMPTS = [{"id": str(i), "category": "ab"[i % 2], "prompt": "x" * (5 + i)} for i in range(4)]


class Tokenizer:
    chat_template = None

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [4 + (len(text) * i) % 25 for i in range(len(text))]})

    def decode(self, tokens, **_):
        return "y"


@pytest.fixture
def random_text(tmp_path):
    """Writes sequences of 30 random tokens, 4 of them a prompt, as `firp distill` does; the file."""

    def write(sequences):
        tokens = np.random.default_rng(0).integers(4, 31, 30 * sequences).astype(np.uint16)
        offsets, prompts = np.arange(0, len(tokens) + 1, 30), np.full(sequences, 4, np.int32)
        np.savez(tmp_path / "data.npz", tokens=tokens, offsets=offsets, prompt_lengths=prompts)
        return tmp_path / "data.npz"

    return write


@pytest.fixture
def setup(tmp_path, monkeypatch, random_text):
    """A setup over a tiny model, with heads of both kinds that were saved."""
    model = tiny_model(2, vocab=31, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    predictor = tiny_predictor(model, 1, num_offsets=2)
    monkeypatch.setattr(setups.firp, "load_model", lambda *_: (model, Tokenizer()))
    monkeypatch.setattr(setups.firp, "load_predictor", lambda *_: predictor)
    for kind, layer in (("medusa", 4), ("early-exit", 2)):
        Heads(kind, 2, 32, layer).save(tmp_path / "heads" / kind)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    data = random_text(20)
    return lambda **changes: Setup(
        **{"out": tmp_path / "out", "model_name": "tiny", "predictor_name": "p", "heads_folder": tmp_path / "heads",
           "prompts": tmp_path / "prompts.jsonl", "limit": 4, "max_new_tokens": 12, "data": data,
           "ridge_tokens": 200, "repeats": 1, **changes}
    )  # fmt: skip
