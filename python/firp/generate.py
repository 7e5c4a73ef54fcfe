"""Drop-in `generate()`: Hugging Face prepares inputs, processors and criteria, the FIRP engine decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable

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

from firp.choice import Chooser, Greedy, Sequential, Vectorised
from firp.engine import Engine
from firp.loop import run
from firp.metrics import StepEvent
from firp.options import REFUSED, check_options
from firp.output import FirpOutput, Output
from firp.predictor import FirpPredictor
from firp.processors import VECTORISED, is_vectorised, with_padding, without_padding
from firp.trees import TreeConfig
from firp.typical import Typical, TypicalAcceptance

MODEL_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "token_type_ids"}
# Arguments of `model.generate` that Hugging Face drops before a custom method could see them.
NOT_PASSED_ON = {
    "assistant_model": "FIRP is the drafter here",
    "assistant_tokenizer": "FIRP is the drafter here",
    "custom_generate": "firp.generate sets it; pass custom_generate=firp.decode to model.generate instead",
    "synced_gpus": "every process would have to step alike",
}


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    predictor: FirpPredictor | None = None,
    tree: TreeConfig | None = None,
    engine: Engine | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    acceptance: TypicalAcceptance | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    **options,
) -> Tensor | FirpOutput:
    """`model.generate(...)`, decoded by FIRP: the same tokens, in fewer forwards.

    Args:
        model: a causal decoder of a supported kind, or a peft model over one; left exactly as it was, also after an
            exception.
        inputs: [B, T] int64 prompts (or `input_ids=`), padded on either side where `attention_mask` says so.
        predictor: trained for this model; None decodes plainly, one token a forward, in the same engine.
        tree: size and kind of the draft tree; None takes the predictor's own, smaller for a batch.
        engine: an `Engine` to reuse (with its own predictor and tree) instead of making one.
        seed: of sampling; None draws one from torch's global generator. Draws depend only on (seed, index of the
            sequence, absolute position).
        streamer: receives tokens as they are accepted; one sequence only.
        acceptance: `TypicalAcceptance` keeps more drafts and is LOSSY; None is exact.
        on_step: called after every decode step, as a server may want to watch.
        **options: everything `model.generate` takes. `generation_config`, `max_new_tokens`, `do_sample`,
            `stopping_criteria`, ...; what is not served raises ValueError naming the option.

    Returns:
        [B, T + new] int64, or a `FirpOutput` (with `stats` and `time`) for `return_dict_in_generate=True`.

    Raises:
        ValueError: an option that is not served, an empty prompt, more tokens than the model's context,
            a predictor for another model (`PredictorMismatch`).
        FloatingPointError: the model's own scores are NaN, or its processors leave no token to draw.
    """
    model = _without_peft(model)
    for name, instead in NOT_PASSED_ON.items():
        given = options.get(name)
        if given:
            raise ValueError(f"{name}: got {given if given is True else type(given).__name__}, expected None: {instead}")
    _check_refused(model, options)
    ids = options.get("input_ids") if inputs is None else inputs
    if ids is not None:
        _check_mask(ids, options.get("attention_mask"))
    _use_stop_strings(model, options)
    method = functools.partial(
        decode, predictor=predictor, tree=tree, engine=engine, seed=seed, streamer=streamer, acceptance=acceptance,
        on_step=on_step,
    )  # fmt: skip
    return model.generate(inputs, custom_generate=method, **options)


def _without_peft(model):
    """The decoder inside a peft model, whose layers hold the adapters; others as they are."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"model: got a peft model of type {model.active_peft_config.peft_type.value}, expected adapters inside the "
            "layers (such as LORA): learned prompts are no tokens that FIRP could decode over"
        )
    return model.get_base_model()


def _check_refused(model: PreTrainedModel, options: dict) -> None:
    """Refuse options before Hugging Face prepares anything for them; `decode` checks the whole configuration."""
    for fields in (options, vars(options.get("generation_config") or model.generation_config), vars(model.generation_config)):
        check_options({name: fields[name] for name in REFUSED if fields.get(name) is not None})


def _use_stop_strings(model: PreTrainedModel, options: dict) -> None:
    """Turn stop strings into a criterion: Hugging Face does not pass the tokenizer on to custom methods."""
    tokenizer = options.pop("tokenizer", None)
    for holder in (options, vars(options.get("generation_config") or GenerationConfig()), vars(model.generation_config)):
        stop_strings = holder.get("stop_strings")
        if stop_strings is not None:
            break
    else:
        return
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected the model's tokenizer, which stop_strings needs")
    options["stop_strings"] = None
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
    acceptance: TypicalAcceptance | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    **model_inputs,
) -> Tensor | FirpOutput:
    """The decoding loop, for `model.generate(..., custom_generate=firp.decode, predictor=predictor)`.

    Arguments as `generate` documents them; the rest is what Hugging Face hands to a decoding method. Hugging Face does
    not pass `streamer`, `tokenizer` and `assistant_model` on to custom methods; `firp.generate` serves them.
    """
    config = generation_config or model.generation_config
    check_options(vars(config))
    _check_inputs(input_ids, model_inputs)
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"streamer: got a batch of {input_ids.shape[0]} sequences, expected 1")
    engine = _engine_for(model, engine, predictor, tree)
    prompts, padding = _strip_padding(input_ids, model_inputs.get("attention_mask"))
    max_new_tokens = config.max_length - input_ids.shape[1]
    engine.check_lengths([len(prompt) for prompt in prompts], max_new_tokens)
    stop_tokens = [] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist()
    pad_token = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    if not config.do_sample:
        seed = None
    elif seed is None:
        seed = int(torch.randint(2**62, ()))
    out = Output(
        _padding_in_front(input_ids, model_inputs.get("attention_mask")),
        prompts,
        max_new_tokens,
        stop_tokens,
        StoppingCriteriaList(
            c for c in stopping_criteria or () if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        ),
        streamer,
        keep_scores=bool(config.return_dict_in_generate and config.output_scores),
        keep_logits=bool(config.return_dict_in_generate and config.output_logits),
        on_step=on_step,
    )
    choose = _chooser(engine, logits_processor or LogitsProcessorList(), seed, acceptance, out, padding, pad_token)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with out.time.measure("prefill"):
        state = engine.start(
            prompts,
            max_new_tokens,
            stop_tokens,
            plain=isinstance(choose, Sequential) and len(prompts) > 1,
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
        sequences=sequences, scores=out.stacked(out.scores), logits=out.stacked(out.logits), stats=stats, time=out.time
    )


def _chooser(
    engine: Engine,
    processors: LogitsProcessorList,
    seed: int | None,
    acceptance: TypicalAcceptance | None,
    out: Output,
    padding: list[int],
    pad_token: int,
) -> Chooser:
    """Who turns scores into tokens for this call."""
    if acceptance is not None:
        _check_acceptance(acceptance, engine, processors, seed)
        return Typical(acceptance, engine.ops, without_padding(processors), seed, out.history, padding)
    if not is_vectorised(processors):
        processors = with_padding(processors, padding)
        return Sequential(engine.ops, processors, seed, out.deliver, lambda: out.padded_history(pad_token))
    if processors or seed is not None:
        return Vectorised(engine.ops, without_padding(processors), seed, out.history, padding)
    return Greedy(engine.ops)


def _check_acceptance(acceptance, engine: Engine, processors: LogitsProcessorList, seed: int | None) -> None:
    if not isinstance(acceptance, TypicalAcceptance):
        raise ValueError(f"acceptance: got {acceptance!r}, expected firp.TypicalAcceptance(epsilon, delta) or None")
    if seed is None:
        raise ValueError("acceptance: got TypicalAcceptance with do_sample=False, expected do_sample=True: greedy decoding is exact")
    if engine.predictor is None:
        raise ValueError("acceptance: got TypicalAcceptance without a predictor, expected one: there are no drafts to accept")
    for processor in processors:
        if type(processor) not in VECTORISED:
            raise ValueError(
                f"acceptance: got TypicalAcceptance with {type(processor).__name__}, expected processors without state: "
                "others see emitted tokens only, not drafts"
            )


def _check_inputs(input_ids: Tensor, model_inputs: dict) -> None:
    for name, value in model_inputs.items():
        if name not in MODEL_INPUTS and value is not None:
            raise ValueError(f"{name}: a model input that FIRP does not serve, expected only input_ids and attention_mask")
    if input_ids.shape[-1] == 0:
        raise ValueError("input_ids: got an empty prompt, expected at least one token")
    cache = model_inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values: got a cache of {cache.get_seq_length()} tokens, expected none: FIRP decodes over a "
            "static cache of its own; pass the whole prompt"
        )
    mask = model_inputs.get("attention_mask")
    _check_mask(input_ids, mask)
    positions = model_inputs.get("position_ids")
    keep = torch.ones_like(input_ids) if mask is None else mask
    if positions is not None and bool(((positions != keep.cumsum(-1) - 1) & keep.bool()).any()):
        raise ValueError("position_ids: got positions of their own, expected none: every prompt starts at position 0")


def _check_mask(input_ids: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}, expected {tuple(input_ids.shape)} (input_ids)")


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
    keep = attention_mask.bool()
    if bool((keep[:, 1:] != keep[:, :-1]).sum(1).gt(1).any()):
        raise ValueError("attention_mask: got a hole inside a prompt, expected padding on one side only")
    prompts = [row[mask] for row, mask in zip(input_ids, keep, strict=True)]
    return prompts, (~keep).sum(1).tolist()


def _padding_in_front(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The padded prompts [B, T] with all padding on the left, as processors expect it."""
    if attention_mask is None:
        return input_ids
    order = attention_mask.bool().long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order)
