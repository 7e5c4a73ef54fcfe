"""Drop-in `generate()`: Hugging Face prepares inputs, processors and criteria, the FIRP engine decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from firp.decoder.modes import plain_tensors
from firp.decoder.peft_models import check_per_call, without_peft
from firp.drafting.predictor import FirpPredictor
from firp.drafting.trees import TreeConfig
from firp.engine.chooser import Chooser, Greedy
from firp.engine.engine import Engine
from firp.engine.prefill import check_prompts
from firp.generation.inputs import (
    check_arguments,
    check_autocast,
    check_callbacks,
    check_holes,
    check_inputs,
    check_seed,
    check_vocabulary,
)
from firp.generation.loop import run
from firp.generation.metrics import StepEvent
from firp.generation.options import REFUSED, check_options, first_given
from firp.generation.output import FirpOutput, Output
from firp.generation.padding import Prompts, with_padding, without_padding
from firp.generation.stopping import Stops, agreed, use_stop_strings
from firp.sampling.choosers import Sequential, Vectorised
from firp.sampling.processors import VECTORISED, is_vectorised
from firp.sampling.typical import Typical, TypicalAcceptance

if TYPE_CHECKING:
    from peft import PeftModel

# Arguments of `model.generate` that Hugging Face drops before a custom method could see them.
NOT_PASSED_ON = {
    "assistant_model": "FIRP is the drafter here",
    "assistant_tokenizer": "FIRP is the drafter here",
    "custom_generate": "FIRP decodes this call already; pass it to type(model).generate instead",
    "synced_gpus": "every process would have to step alike",
}


def generate(
    model: PreTrainedModel | PeftModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *,
    predictor: FirpPredictor | None = None,
    tree: TreeConfig | None = None,
    engine: Engine | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    acceptance: TypicalAcceptance | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    **options: Any,
) -> Tensor | FirpOutput:
    """`model.generate(...)`, decoded by FIRP: the same tokens, in fewer forwards.

    Args:
        model: a causal decoder of a supported kind, or a peft model over one; left exactly as it was, also after an
            exception.
        inputs: [B, T] integer prompts (or `input_ids=`); what `attention_mask` masks is left out, wherever it stands.
        generation_config, logits_processor, stopping_criteria: as `model.generate` takes them.
        predictor: trained for this model; None decodes plainly, one token a forward, in the same engine.
        tree: size and kind of the draft tree; None takes what pays on this machine (see `Engine`).
        engine: an `Engine` to reuse (with its own predictor and tree) instead of making one.
        seed: of sampling; None draws one from torch's global generator. Draws depend only on (seed, index of the
            sequence, absolute position).
        streamer: receives tokens as they are accepted; one sequence only.
        acceptance: `TypicalAcceptance` keeps more drafts and is LOSSY; None is exact.
        on_step: called after every decode step, as a server may want to watch.
        **options: everything else `model.generate` takes: `max_new_tokens`, `do_sample`, ...; what is not supported
            raises ValueError naming the option.

    Returns:
        [B, T + new] int64, or a `FirpOutput` (with `stats` and `time`) for `return_dict_in_generate=True`.

    Raises:
        ValueError: an option that is not supported, an argument of another kind, an empty prompt, a token outside the
            vocabulary, more tokens than the model's context, a predictor for another model (`PredictorMismatch`).
        FloatingPointError: the model's own scores are NaN, or its processors leave no token to draw.
    """
    check_per_call(options)
    model = without_peft(model)
    for name, instead in NOT_PASSED_ON.items():
        given = options.get(name)
        if given:
            raise ValueError(
                f"{name}: got {given if given is True else type(given).__name__}, expected None: {instead}"
            )
    given = {
        "generation_config": generation_config, "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
    }  # fmt: skip
    options |= {name: value for name, value in given.items() if value is not None}
    check_arguments(model, options.get("input_ids") if inputs is None else inputs, options)
    _check_refused(model, options)
    use_stop_strings(model, options)
    method = functools.partial(
        decode, predictor=predictor, tree=tree, engine=engine, seed=seed, streamer=streamer, acceptance=acceptance,
        on_step=on_step,
    )  # fmt: skip
    # A folder of `firp export` puts its own `generate` on the object.
    prepare = functools.partial(type(model).generate, model) if "generate" in vars(model) else model.generate
    return prepare(inputs, custom_generate=method, **options)


def _check_refused(model: PreTrainedModel, options: dict) -> None:
    """Refuse options before Hugging Face prepares anything for them; `decode` checks the whole configuration."""
    check_options({name: first_given(name, model, options) for name in REFUSED})


@plain_tensors
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
    **model_inputs: Any,
) -> Tensor | FirpOutput:
    """The decoding loop, for `model.generate(..., custom_generate=firp.decode, predictor=predictor)`.

    Arguments as `generate` documents them; the rest is what Hugging Face hands to a decoding method. Hugging Face does
    not pass `streamer`, `tokenizer` and `assistant_model` on to a custom method that is a function; `firp.generate` and
    the folder that `firp export` writes take the first two and refuse the third.
    """
    config = generation_config or model.generation_config
    check_options(vars(config))
    check_inputs(input_ids, model_inputs)
    check_callbacks(streamer, on_step, input_ids.shape[0])
    made_now = engine is None
    engine = _engine_for(model, engine, predictor, tree)
    check_autocast(engine.view.device)
    prompts = Prompts.of(input_ids, model_inputs.get("attention_mask"))
    check_vocabulary(prompts, model)
    ranks = engine.view.ranks
    stops = Stops.of(stopping_criteria or StoppingCriteriaList(), config)
    max_new_tokens = max(1, stops.max_length - input_ids.shape[1])
    check_prompts(engine.view.config, [len(prompt) for prompt in prompts.tokens], max_new_tokens)
    check_holes(prompts, engine.view.windows, input_ids.shape[1] + max_new_tokens)
    if config._pad_token_tensor is None and not stops.together and len(prompts.tokens) > 1:
        raise ValueError(
            "pad_token_id: got None, expected a token id: sequences of a batch that end early are filled with it"
        )
    pad_token = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    seed = check_seed(seed)
    ranks.check_same({
        "do_sample, seed": (config.do_sample, seed), "acceptance": acceptance,
        "output_scores, output_logits": (config.return_dict_in_generate, config.output_scores, config.output_logits),
        "logits_processor": [type(processor).__qualname__ for processor in logits_processor or []],
        "stopping_criteria": [type(criterion).__qualname__ for criterion in stops.criteria],
    })  # fmt: skip
    if not config.do_sample:
        seed = None
    elif seed is None:
        seed = ranks.first(lambda: int(torch.randint(2**62, ())))
    out = Output(
        prompts.padded,
        prompts.unpadded,
        max_new_tokens,
        stops.tokens,
        agreed(stops.criteria, ranks),
        model.get_input_embeddings().weight.shape[0],
        stops.together and len(prompts.tokens) > 1,
        streamer,
        keep_scores=bool(config.return_dict_in_generate and config.output_scores),
        keep_logits=bool(config.return_dict_in_generate and config.output_logits),
        on_step=on_step,
    )
    processors = logits_processor or LogitsProcessorList()
    choose = _chooser(engine, processors, seed, acceptance, out, prompts, pad_token)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with out.time.measure("prefill"):
        state = engine.start(
            prompts.tokens,
            max_new_tokens,
            stops.tokens,
            plain=choose.one_by_one and len(prompts.tokens) > 1,
            chunk_tokens=config.prefill_chunk_size,
            checked=made_now,
        )
    stats = run(engine, state, choose, out)
    if streamer is not None:
        streamer.end()
    longest = max(map(len, out.emitted))
    rows = [emitted + [pad_token] * (longest - len(emitted)) for emitted in out.emitted]
    sequences = torch.cat([prompts.ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device)], 1)
    if not config.return_dict_in_generate:
        return sequences
    return FirpOutput(
        sequences=sequences, scores=out.stacked(out.scores), logits=out.stacked(out.logits), stats=stats, time=out.time,
        rungs=out.rungs,
    )  # fmt: skip


def _chooser(
    engine: Engine,
    processors: LogitsProcessorList,
    seed: int | None,
    acceptance: TypicalAcceptance | None,
    out: Output,
    prompts: Prompts,
    pad_token: int,
) -> Chooser:
    """Who turns scores into tokens for this call."""
    if acceptance is not None:
        _check_acceptance(acceptance, engine, processors, seed)
        return Typical(acceptance, engine.ops, without_padding(processors, prompts), seed, out.history, prompts.padding)
    if not is_vectorised(processors):
        processors = with_padding(processors, prompts)
        return Sequential(
            engine.ops, engine.view.ranks, processors, seed, out.deliver, lambda: out.padded_history(pad_token)
        )
    if processors or seed is not None:
        return Vectorised(engine.ops, without_padding(processors, prompts), seed, out.history, prompts.padding)
    return Greedy(engine.ops)


def _check_acceptance(
    acceptance: TypicalAcceptance, engine: Engine, processors: LogitsProcessorList, seed: int | None
) -> None:
    if not isinstance(acceptance, TypicalAcceptance):
        raise ValueError(f"acceptance: got {acceptance!r}, expected firp.TypicalAcceptance(epsilon, delta) or None")
    if seed is None:
        raise ValueError(
            "acceptance: got TypicalAcceptance with do_sample=False, expected do_sample=True: greedy decoding is exact"
        )
    if engine.predictor is None:
        raise ValueError(
            "acceptance: got TypicalAcceptance without a predictor, expected one: there are no drafts to accept"
        )
    for processor in processors:
        if type(processor) not in VECTORISED:
            raise ValueError(
                f"acceptance: got TypicalAcceptance with {type(processor).__name__}, expected processors without "
                f"state: "
                "others see emitted tokens only, not drafts"
            )


def _engine_for(
    model: PreTrainedModel, engine: Engine | None, predictor: FirpPredictor | None, tree: TreeConfig | None
) -> Engine:
    if engine is None:
        return Engine(model, predictor, tree, compile=False)
    if predictor is not None or tree is not None:
        raise ValueError("engine: given with predictor or tree, expected one or the other: the engine has its own")
    if not isinstance(engine, Engine):
        raise ValueError(f"engine: got {type(engine).__name__}, expected a firp.Engine")
    if engine.model is not model:
        raise ValueError("engine: was made for another model object")
    return engine
