"""Drop-in `generate()`: Hugging Face prepares inputs, processors and criteria, the FIRP engine decodes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from firp.choice import Greedy, Sequential, Vectorised
from firp.engine import Engine
from firp.loop import run
from firp.options import check_options
from firp.output import FirpOutput, Output
from firp.predictor import FirpPredictor
from firp.processors import is_vectorised, without_padding
from firp.trees import TreeConfig

MODEL_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "token_type_ids"}


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    predictor: FirpPredictor | None = None,
    tree: TreeConfig | None = None,
    engine: Engine | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    **options,
) -> Tensor | FirpOutput:
    """`model.generate(...)`, decoded by FIRP: the same tokens, in fewer forwards.

    Args:
        model: a causal decoder of a supported kind; left exactly as it was, also after an exception.
        inputs: [B, T] int64 prompts (or `input_ids=`), padded on either side where `attention_mask` says so.
        predictor: trained for this model; None decodes plainly, one token a forward, in the same engine.
        tree: size and kind of the draft tree; None takes the predictor's own, smaller for a batch.
        engine: an `Engine` to reuse (with its own predictor and tree) instead of making one.
        seed: of sampling; None draws one from torch's global generator. Draws depend only on (seed, index of the
            sequence, absolute position).
        streamer: receives tokens as they are accepted; one sequence only.
        **options: everything `model.generate` takes. `generation_config`, `max_new_tokens`, `do_sample`,
            `stopping_criteria`, ...; what is not served raises ValueError naming the option.

    Returns:
        [B, T + new] int64, or a `FirpOutput` (with `stats`) for `return_dict_in_generate=True`.

    Raises:
        ValueError: an option that is not served, an empty prompt, more tokens than the model's context,
            a predictor for another model (`PredictorMismatch`).
        FloatingPointError: the model's own scores are NaN.
    """
    if options.get("assistant_model") is not None:
        raise ValueError("assistant_model: got a model, expected None: FIRP is the drafter here")
    if options.get("custom_generate") is not None:
        raise ValueError("custom_generate: firp.generate sets it; pass custom_generate=firp.decode to model.generate instead")
    _use_stop_strings(model, options)
    method = functools.partial(
        decode, predictor=predictor, tree=tree, engine=engine, seed=seed, streamer=streamer
    )
    return model.generate(inputs, custom_generate=method, streamer=streamer, **options)


def _use_stop_strings(model: PreTrainedModel, options: dict) -> None:
    """Turn stop strings into a criterion: Hugging Face does not pass the tokenizer on to custom methods."""
    config: GenerationConfig | None = options.get("generation_config")
    tokenizer = options.pop("tokenizer", None)
    stop_strings = options.pop("stop_strings", None)
    if stop_strings is None and config is not None and config.stop_strings is not None:
        stop_strings = config.stop_strings
        options["generation_config"] = GenerationConfig(**{**config.to_dict(), "stop_strings": None})
    if stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected the model's tokenizer, which stop_strings needs")
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, stop_strings))
    options["stopping_criteria"] = criteria


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    predictor: FirpPredictor | None = None,
    tree: TreeConfig | None = None,
    engine: Engine | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_inputs,
) -> Tensor | FirpOutput:
    """The decoding loop, for `model.generate(..., custom_generate=firp.decode, predictor=predictor)`.

    Arguments as `generate` documents them; the rest is what Hugging Face hands to a decoding method. Hugging Face does
    not pass `streamer`, `tokenizer` and `assistant_model` on to custom methods; `firp.generate` serves them.
    """
    config = generation_config or model.generation_config
    _check_call(config, synced_gpus, model_inputs)
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"streamer: got a batch of {input_ids.shape[0]} sequences, expected 1")
    engine = _engine_for(model, engine, predictor, tree)
    prompts, padding = _strip_padding(input_ids, model_inputs.get("attention_mask"))
    processors = logits_processor or LogitsProcessorList()
    max_new_tokens = config.max_length - input_ids.shape[1]
    stop_tokens = [] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist()
    engine.check_lengths([len(prompt) for prompt in prompts], max_new_tokens)
    if config.do_sample and seed is None:
        seed = int(torch.randint(2**62, ()))
    seed = seed if config.do_sample else None
    pad_token = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)

    out = Output(
        input_ids,
        prompts,
        max_new_tokens,
        stop_tokens,
        StoppingCriteriaList(
            c for c in stopping_criteria or () if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        ),
        streamer,
        keep_scores=bool(config.return_dict_in_generate and config.output_scores),
        keep_logits=bool(config.return_dict_in_generate and config.output_logits),
    )
    one_by_one = not is_vectorised(processors)
    if one_by_one:
        choose = Sequential(engine.ops, processors, seed, out.deliver, lambda: out.padded_history(pad_token))
    elif processors or seed is not None:
        choose = Vectorised(engine.ops, without_padding(processors), seed, out.history, padding)
    else:
        choose = Greedy(engine.ops)
    state = engine.start(
        prompts,
        max_new_tokens,
        stop_tokens,
        plain=one_by_one and len(prompts) > 1,
        chunk_tokens=config.prefill_chunk_size,
    )
    stats = run(engine, state, choose, out)
    if streamer is not None:
        streamer.end()
    longest = max(map(len, out.emitted))
    rows = [emitted + [pad_token] * (longest - len(emitted)) for emitted in out.emitted]
    sequences = torch.cat([input_ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device)], 1)
    if not config.return_dict_in_generate:
        return sequences
    return FirpOutput(
        sequences=sequences, scores=out.stacked(out.scores), logits=out.stacked(out.logits), stats=stats
    )


def _check_call(config: GenerationConfig, synced_gpus: bool, model_inputs: dict) -> None:
    check_options(config)
    if synced_gpus:
        raise ValueError("synced_gpus: got True, expected False: every process would have to step alike")
    cache = model_inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values: got a cache of {cache.get_seq_length()} tokens, expected none: FIRP decodes over a "
            "static cache of its own; pass the whole prompt"
        )
    for name, value in model_inputs.items():
        if name not in MODEL_INPUTS and value is not None:
            raise ValueError(f"{name}: a model input that FIRP does not serve, expected only input_ids and attention_mask")


def _engine_for(model, engine: Engine | None, predictor: FirpPredictor | None, tree: TreeConfig | None) -> Engine:
    if engine is None:
        return Engine(model, predictor, tree, compile=False)
    if predictor is not None or tree is not None:
        raise ValueError("engine: given with predictor or tree, expected one or the other: the engine has its own")
    if engine.model is not model:
        raise ValueError("engine: was made for another model object")
    return engine


def _strip_padding(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Prompts without padding, and how many padding tokens each held."""
    if attention_mask is None:
        return list(input_ids), [0] * input_ids.shape[0]
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)} (input_ids)")
    keep = attention_mask.bool()
    if bool((keep[:, 1:] != keep[:, :-1]).sum(1).gt(1).any()):
        raise ValueError("attention_mask: got a hole inside a prompt, expected padding on one side only")
    prompts = [row[mask] for row, mask in zip(input_ids, keep, strict=True)]
    return prompts, (~keep).sum(1).tolist()
