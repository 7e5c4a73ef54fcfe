"""The `generate` of a folder that `firp export --to custom-generate` wrote, as Hugging Face loads it.

Hugging Face calls it in two ways. `model.generate(..., custom_generate=FOLDER, trust_remote_code=True)` hands over
every argument but the folder. A model from a folder that contains `custom_generate/` has it as its own `generate`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from firp.decoder.seen import ENGINE
from firp.drafting.predictor import load_predictor
from firp.drafting.trees import TreeConfig
from firp.engine.engine import Engine
from firp.generation.generate import generate as firp_generate
from firp.generation.output import FirpOutput

SUBFOLDER = "custom_generate"


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Any = None,
    synced_gpus: bool | None = None,
    assistant_model: PreTrainedModel | None = None,
    streamer: BaseStreamer | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    *,
    model: PreTrainedModel,
    engine: Engine | None = None,
    tree: TreeConfig | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Tensor | FirpOutput:
    """`model.generate(...)`, decoded by FIRP with the predictor of the folder that this was loaded from.

    The engine is made by the first call and kept on the model object, so that it goes when the model goes. A call with
    another folder or tree, or after the model changed, makes a new one.

    Args:
        inputs, ..., negative_prompt_attention_mask: those of `model.generate`, in its order.
        model: passed by Hugging Face.
        engine: a `firp.Engine` of this model to use instead.
        tree: as `firp.generate` takes it.
        revision, token, cache_dir: of a folder on the Hub.
        **options: all else that `firp.generate` takes.

    Returns:
        As `firp.generate`.

    Raises:
        FileNotFoundError: no predictor where this was loaded from.
        ValueError: as `firp.generate`; among others an `assistant_model`, or a `predictor` beside the folder's own.
    """
    if options.get("predictor") is not None:
        raise ValueError(
            f"predictor: got {type(options['predictor']).__name__}, expected None: the folder has its own; pass "
            "custom_generate=firp.decode for another one"
        )
    given = {
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn, "synced_gpus": synced_gpus,
        "assistant_model": assistant_model, "negative_prompt_ids": negative_prompt_ids,
        "negative_prompt_attention_mask": negative_prompt_attention_mask,
    }  # fmt: skip
    options |= {name: value for name, value in given.items() if value is not None}
    if engine is None:
        source = _called_with() or model.config._name_or_path
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        engine, tree = _kept_engine(model, source, tree, hub), None
    return firp_generate(
        model, inputs, generation_config, logits_processor, stopping_criteria, engine=engine, tree=tree,
        streamer=streamer, **options,
    )  # fmt: skip


def _called_with() -> str | None:
    """What the caller of `model.generate` gave as `custom_generate`, which Hugging Face hands to nobody.

    It runs a copy of the folder's file in a cache of modules, so `__file__` does not tell either. None where the model
    has this function as its own `generate`.
    """
    frame = sys._getframe(2)
    own = frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils"
    given = frame.f_locals.get("custom_generate") if own else None
    return given if isinstance(given, str) else None


_MAKING_ROOM = threading.Lock()


@dataclass(eq=False)
class _Kept:
    """The engine of a model object, kept on it. A copy or a pickle of the model has none.

    Attributes:
        owner: the model, weakly; a shallow copy of the model holds the same object.
        making: held while an engine is made, so that threads which come together get one.
    """

    owner: weakref.ref | None = None
    engine: Engine | None = None
    made_for: tuple = ()
    making: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def of(model: PreTrainedModel) -> _Kept:
        """The model's own, made where it has none."""
        with _MAKING_ROOM:
            kept = vars(model).get(ENGINE)
            if kept is None or kept.owner is None or kept.owner() is not model:
                kept = _Kept(weakref.ref(model))
                setattr(model, ENGINE, kept)
            return kept

    def __deepcopy__(self, memo: dict) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple:
        return _Kept, ()


def _kept_engine(model: PreTrainedModel, source: str, tree: TreeConfig | None, hub: dict[str, Any]) -> Engine:
    made_for, kept = (source, tree, hub["revision"]), _Kept.of(model)
    with kept.making:
        if kept.engine is None or kept.made_for != made_for or not _still_fits(kept.engine):
            kept.engine = Engine(model, load_predictor(_folder(model, source, hub)), tree, compile=False)
            kept.made_for = made_for
        return kept.engine


def _still_fits(engine: Engine) -> bool:
    try:
        engine.view.check_unchanged()
    except ValueError:
        return False
    return True


def _folder(model: PreTrainedModel, source: str, hub: dict[str, Any]) -> Path:
    """Where the predictor lies, fetched if it is on the Hub."""
    if not source:
        raise FileNotFoundError(
            "predictor: the model was not loaded from a folder, expected model.generate(custom_generate=FOLDER, "
            "trust_remote_code=True)"
        )
    root = Path(source)
    if not root.is_dir():
        if source == model.config._name_or_path:
            hub = {**hub, "revision": hub["revision"] or getattr(model.config, "_commit_hash", None)}
        try:
            root = Path(snapshot_download(source, allow_patterns=[f"{SUBFOLDER}/*"], **hub))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"predictor: got {source!r}, expected a folder that is there or a hub id: {reason}"
            ) from error
    if not (root / SUBFOLDER).is_dir():
        raise FileNotFoundError(f"predictor: {root} has no {SUBFOLDER} folder, expected what `firp export` wrote")
    return root / SUBFOLDER
