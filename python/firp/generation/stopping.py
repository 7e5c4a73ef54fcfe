"""Where a run ends: length and end-of-sequence tokens on the device, every other criterion once per emitted token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from firp.generation.options import first_given
from firp.tools.ranks import Ranks


@dataclass(frozen=True)
class Stops:
    """What ends a sequence.

    Attributes:
        max_length: tokens of prompt and output together, padding included.
        tokens: ids that end a sequence, emitted themselves.
        criteria: the others.
        together: no criterion is about an end-of-sequence token: in Hugging Face all sequences then go on until the
            last one has ended, and none is padded.
    """

    max_length: int
    tokens: list[int]
    criteria: StoppingCriteriaList
    together: bool

    @classmethod
    def of(cls, criteria: StoppingCriteriaList, config: GenerationConfig) -> Stops:
        """From the criteria that Hugging Face prepared, where a caller's own has taken the place of the
        configuration's.

        Identified by exact type: a subclass may decide otherwise.
        """
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        ends = [c.eos_token_id.flatten().tolist() for c in criteria if type(c) is EosTokenCriteria]
        others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        tokens = sorted({token for end in ends for token in end})
        together = not any(hasattr(c, "eos_token_id") for c in criteria)
        return cls(min(lengths, default=config.max_length), tokens, StoppingCriteriaList(others), together)


def agreed(criteria: StoppingCriteriaList, ranks: Ranks) -> StoppingCriteriaList:
    """Criteria whose answer is rank 0's: a clock, or a score's last bit, may let another rank answer otherwise."""
    if ranks.size == 1 or not criteria:
        return criteria

    def ends(input_ids: Tensor, scores: tuple[Tensor, ...] | None, **others: object) -> Tensor:
        (done,) = ranks.agree((criteria(input_ids, scores, **others),))
        return done

    return StoppingCriteriaList([ends])


def use_stop_strings(model: PreTrainedModel, options: dict) -> None:
    """Turn stop strings into a criterion: Hugging Face does not pass the tokenizer on to custom methods.

    Args:
        options: of `generate`; changed in place.

    Raises:
        ValueError: stop strings without a tokenizer.
    """
    tokenizer = options.pop("tokenizer", None)
    stop_strings = first_given("stop_strings", model, options)
    if stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected the model's tokenizer, which stop_strings needs")
    options["stop_strings"] = None
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, stop_strings))
    options["stopping_criteria"] = criteria
