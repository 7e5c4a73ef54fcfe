"""The model `firp` of lm-evaluation-harness: its Hugging Face model, whose generations FIRP decodes.

Likelihoods are the harness's own, by the model's forward. Importing this module registers the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from firp.drafting.predictor import SHIPPED, default_predictor, load_predictor
from firp.engine.engine import Engine
from firp.generation.generate import decode
from firp.tools.converted import WHEEL_MODELS, converted


class StopText(StoppingCriteria):
    """Ends each sequence at its own stop text. The harness's criterion asks whether all rows of a batch have met it.

    Args:
        criterion: of the harness; its text, tokenizer and look-back are taken.
    """

    def __init__(self, criterion: MultiTokenEOSCriteria) -> None:
        self.criterion = criterion

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        of = self.criterion
        last = input_ids[:, of.initial_decoder_input_length :][:, -of.sequence_id_len :]
        met = [of.sequence in text for text in of.tokenizer.batch_decode(last)]
        return torch.tensor(met, device=input_ids.device)


def decode_for_harness(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: Any = None,
    engine: Engine | None = None,
    **model_inputs: Any,
) -> Any:
    """`firp.decode`, with the harness's stop texts asked of each sequence."""
    criteria = StoppingCriteriaList(
        StopText(each) if type(each) is MultiTokenEOSCriteria else each for each in stopping_criteria or []
    )
    return decode(model, input_ids, logits_processor, criteria, generation_config, engine=engine, **model_inputs)


@register_model("firp")
class FirpLM(HFLM):
    """`lm_eval --model firp --model_args pretrained=MODEL,predictor=PREDICTOR`.

    Args:
        pretrained: a folder, a hub id, or smollm2-135m.
        predictor: a folder or hub id; None takes the one shipped for the model.
        **others: as the harness's model `hf` takes them.

    Raises:
        ValueError: a model or a predictor that FIRP does not support, or a model spread over devices.
    """

    def __init__(self, pretrained: str | PreTrainedModel, predictor: str | None = None, **others: Any) -> None:
        with ExitStack() as stack:
            source = pretrained
            if pretrained in WHEEL_MODELS:
                source = str(stack.enter_context(converted(str(pretrained))))
            super().__init__(source, **others)
        self.model.__dict__.pop("generate", None)  # of an exported folder, which would decode in its own way
        shipped = {folder.name for folder in SHIPPED.iterdir()}
        name = str(pretrained) if predictor is None else predictor
        drafter = default_predictor(name) if predictor is None or predictor in shipped else load_predictor(predictor)
        self._engine = Engine(self.model, drafter, compile=False)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        return super()._model_generate(
            context, max_length, stop, custom_generate=decode_for_harness, engine=self._engine, **options
        )
