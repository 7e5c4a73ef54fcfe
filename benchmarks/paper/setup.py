"""What the figures are made from: the model, its drafters, and its own greedy answers to held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import firp
import torch
from firp.decoder.view import DecoderView
from firp.drafting.predictor import FirpPredictor
from firp.drafting.recording import Recording, record
from firp.drafting.transition import token_tables
from firp.drafting.trees import MAX_RANKS
from firp.generation.batch import greedy_answers
from firp.tools.environment import environment
from firp.tools.files import read_object
from firp.tools.prompt_files import OWN_PROMPTS, Prompt, encode, load_prompts
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.baselines.compare import heads_in, made_from
from benchmarks.baselines.heads import CURVES, Heads
from benchmarks.baselines.recording import record_heads
from benchmarks.document import Document, digest

TEXT = "text.json"
PROMPTS_AT_ONCE = 8
TRAINING = ("steps", "batch_size", "anchors", "max_length", "learning_rate", "seed")
NAMES = {"firp": "FIRP", "firp-maps": "FIRP, maps alone", "medusa": "Medusa-1", "early-exit": "early exit"}


@dataclass(frozen=True)
class Answer:
    """A held-out prompt [T] and the model's own greedy answer to it."""

    category: str
    prompt: Tensor
    tokens: list[int]


@dataclass
class Setup:
    """Settings of all figures, and what follows from them.

    Attributes:
        out: folder of the figures.
        model_name, dtype, device: as `firp.load_model` takes them.
        predictor_name: folder or hub id; None takes the one shipped for the model.
        heads_folder: where `benchmarks.baselines.train` put its heads; None or a kind that is not there: not measured.
        prompts, limit, max_new_tokens: the held-out text.
        data: training text, for maps that are solved here.
        ridge_tokens: tokens of it.
        repeats: of a timed figure.
    """

    out: Path
    model_name: str = "smollm2-135m"
    dtype: str = "float32"
    device: str = "cpu"
    predictor_name: str | None = None
    heads_folder: Path | None = None
    prompts: Path = OWN_PROMPTS
    limit: int = 24
    max_new_tokens: int = 96
    data: Path | None = None
    ridge_tokens: int = 30_000
    repeats: int = 3
    _recordings: dict[str, list[Recording]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "ridge_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return firp.load_model(self.model_name, self.dtype, self.device)

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    @cached_property
    def view(self) -> DecoderView:
        return DecoderView(self.model)

    @cached_property
    def predictor(self) -> FirpPredictor:
        name = self.predictor_name
        return firp.default_predictor(self.model_name) if name is None else firp.load_predictor(name)

    @cached_property
    def maps(self) -> FirpPredictor:
        """The predictor's maps, without a transition and an update."""
        own = self.predictor
        maps = FirpPredictor.for_model(self.model, own.num_offsets, own.insertion_layer)
        maps.load_state_dict({"weight": own.weight})
        return maps.eval()

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Of the predictor's token transition."""
        tables = token_tables(self.view, self.predictor.transition)
        return None if tables is None else (tables[0].cpu(), tables[1].cpu())

    @cached_property
    def heads(self) -> dict[str, Heads]:
        """The heads that are there, by kind."""
        return heads_in(self.heads_folder)

    @property
    def drafters(self) -> list[str]:
        """Names of `NAMES` that can be measured here."""
        maps = ["firp-maps"] if self.predictor.transition_rank or self.predictor.update_width else []
        return ["firp", *maps, *self.heads]

    @property
    def num_offsets(self) -> int:
        return self.predictor.num_offsets

    def made_from(self, drafter: str) -> dict:
        """What a drafter's figures depend on beside the text."""
        kind = drafter.partition("-maps")[0]
        layer = self.predictor.insertion_layer if kind == "firp" else self.heads[kind].source_layer
        found = {"weights": made_from(self.predictor, self.heads)[kind], "source_layer": layer}
        return found if kind == "firp" else found | {"training": self._training(kind)}

    def _training(self, kind: str) -> dict:
        """Settings that heads were trained with, where their curves are still beside them."""
        path = (self.heads_folder or Path()) / CURVES
        settings = read_object(path).get(kind, {}).get("settings", {}) if path.is_file() else {}
        return {name: settings[name] for name in TRAINING if name in settings}

    @property
    def text_settings(self) -> dict:
        """Of every figure: the held-out text is the model's own, greedy, which no seed changes."""
        prompts = Path(self.prompts)
        return {
            "model": self.model_name, "dtype": self.dtype, "prompts": prompts.name,
            "prompts_digest": digest(prompts.read_bytes()),
            "limit": self.limit, "max_new_tokens": self.max_new_tokens, "decoding": "greedy",
        }  # fmt: skip

    def document(self, name: str, **settings: object) -> Document:
        """The JSON of the figure `name`."""
        return Document(self.out / f"{name}.json", self.text_settings | settings, environment(self.model))

    @cached_property
    def chosen_prompts(self) -> list[Prompt]:
        return load_prompts(self.prompts, self.limit)

    @cached_property
    def answers(self) -> list[Answer]:
        """The held-out text, which is kept in `out`."""
        prompts = [
            torch.tensor(encode(self.tokenizer, [{"role": "user", "content": prompt.turns[0]}]))
            for prompt in self.chosen_prompts
        ]
        document = Document(self.out / TEXT, self.text_settings, environment(self.model))

        def decode() -> dict:
            engine = firp.Engine(self.model)
            return {"answers": greedy_answers(engine, prompts, self.max_new_tokens, PROMPTS_AT_ONCE)}

        ids = digest(json.dumps([prompt.tolist() for prompt in prompts]).encode())
        found = document.part("text", {"prompt_ids": ids}, decode)["answers"]
        categories = [prompt.category for prompt in self.chosen_prompts]
        return [Answer(*parts) for parts in zip(categories, prompts, found, strict=True)]

    def recordings(self, drafter: str) -> list[Recording]:
        """Marginals of a drafter at every position of the held-out text."""
        if drafter not in self._recordings:
            predictor = {"firp": self.predictor, "firp-maps": self.maps}.get(drafter)
            self._recordings[drafter] = [
                record_heads(self.view, self.heads[drafter], answer.prompt, answer.tokens, MAX_RANKS)
                if predictor is None
                else record(self.view, predictor, answer.prompt, answer.tokens, MAX_RANKS)
                for answer in self.answers
            ]
        return self._recordings[drafter]

    def transition_of(self, drafter: str) -> tuple[Tensor, Tensor] | None:
        """Tables that the drafter reweights candidates with."""
        return self.tables if drafter == "firp" else None
