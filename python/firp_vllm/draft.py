"""What vLLM's registry knows of a FIRP checkpoint: a name, and a refusal where vLLM would load it as a model."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn


class FirpDraft(nn.Module):
    """A FIRP checkpoint holds no model: its rows pass the target's own layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise ValueError(
            "speculative_config: a FIRP predictor is no model of its own; it drafts within vLLM's runner V1 "
            "(VLLM_USE_V2_MODEL_RUNNER=0), beside the model that it was trained for"
        )

    def embed_input_ids(self, input_ids: Tensor) -> NoReturn:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor) -> NoReturn:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> NoReturn:
        raise NotImplementedError
