"""The acceptance profile of a trained predictor: what its drafts are worth on held-out prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.profile import save_profile
from firp.drafting.recording import make_profile
from firp.drafting.transition import token_tables
from firp.engine.engine import Engine
from firp.generation.batch import greedy_answers
from firp.tools.files import write_atomically
from firp.train.data import TextDataset

PROMPTS, TOKENS, AT_ONCE = 32, 96, 8


def write_profile(
    path: Path, view: DecoderView, predictor: FirpPredictor, dataset: TextDataset, held_out: np.ndarray
) -> None:
    """Record what the predictor drafts at the positions of the model's greedy answers to held-out prompts."""
    prompts: list[torch.Tensor] = []
    room = view.config.max_position_embeddings - TOKENS - predictor.num_offsets
    for index in held_out:
        prompt = dataset.sequence(index)[: dataset.prompt_lengths[index]]
        if len(prompt) <= room and len(prompts) < PROMPTS:
            prompts.append(prompt)
    if not prompts:
        return
    answers = greedy_answers(Engine(view.model), prompts, TOKENS, AT_ONCE)
    found = [(prompt, answer, "held out") for prompt, answer in zip(prompts, answers, strict=True)]
    profile = make_profile(view, predictor, found, token_tables(view, predictor.transition))
    write_atomically(path, lambda staged: save_profile(staged, profile))
