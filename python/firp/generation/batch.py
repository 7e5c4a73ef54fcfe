"""Answers to a batch of prompts: padded on the left, decoded, cut after the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firp.engine.engine import Engine
from firp.generation.generate import generate


def stop_ids(model: PreTrainedModel) -> set[int]:
    """Token ids that end an answer, from the model's generation configuration: none, one or several."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def left_padded(rows: list[list[int]], pad_token: int = 0) -> dict[str, Tensor]:
    """Token rows as `input_ids` and `attention_mask` [B, T]."""
    longest = max(map(len, rows))
    ids = [[pad_token] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def cut_after_stop(rows: list[list[int]], stops: set[int]) -> list[list[int]]:
    """Each row of new tokens up to its first stop token, that token included."""
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def answer(engine: Engine, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """New tokens of each prompt, the stop token included.

    Args:
        engine: decodes with its own model, predictor and tree.
        prompts: B rows of token ids.
        **options: of `firp.generate`.
    """
    batch = {name: tensor.to(engine.model.device) for name, tensor in left_padded(prompts).items()}
    out = generate(engine.model, **batch, engine=engine, **options)
    sequences = out if isinstance(out, Tensor) else out.sequences
    return cut_after_stop(sequences[:, batch["input_ids"].shape[1] :].tolist(), stop_ids(engine.model))


def greedy_answers(engine: Engine, prompts: list[Tensor], max_new_tokens: int, batch_size: int) -> list[list[int]]:
    """New tokens of each prompt [T], the stop token included, decoded `batch_size` prompts at a time."""
    rows = [prompt.tolist() for prompt in prompts]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [
        tokens for batch in batches for tokens in answer(engine, batch, max_new_tokens=max_new_tokens, do_sample=False)
    ]
