"""What a training run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from firp.drafting.predictor_file import OptionalFields


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run.

    Attributes:
        model: base model, as `load_model` takes it.
        data: file written by `firp distill`, JSONL file or folder of conversations (`firp.train.conversations`).
        insertion_layer: t.
        num_offsets: k.
        steps: optimizer steps.
        batch_size: sequences a step.
        anchors: anchors drawn from each sequence.
        max_length: sequences are cut to this many tokens.
        learning_rate: peak of AdamW's for the maps, after a linear warm-up of `warmup` steps; then a cosine to a tenth.
            0 keeps the maps of `start_from` and trains the transition and the update alone.
        transition_rank: r of the token transition; 0 trains none.
        transition_learning_rate: the same for the transition and the update.
        update_width: w of the update of final states; 0 trains none.
        draft_vocabulary: how many tokens updated rows are scored for, the most frequent ones of the answers; 0 is all.
        offset_decay: offset j weighs offset_decay ** (j - 1) in the loss.
        ridge_tokens: tokens of the closed-form start; 0 starts from the identity.
        start_from: folder or hub id of a predictor to go on from, instead of the closed form.
        held_out: sequences kept for accuracy.
        seed: of data order and anchors.
        dtype: dtype of the base model; the predictor itself trains in float32.
        keep_rows: compute the base model's rows once and keep them in the output folder instead of at every step; see
            `RowStore` for their size. With a learning rate of 0, pseudo rows never change either and are kept too.
        pack: run the base model over rows of up to `max_length` tokens that hold several sequences, which do not see
            each other; sequences, anchors and results are the same up to rounding.
    """

    model: str
    data: str
    insertion_layer: int
    num_offsets: int = 3
    steps: int = 1000
    batch_size: int = 8
    anchors: int = 64
    max_length: int = 512
    learning_rate: float = 5e-4
    warmup: int = 20
    transition_rank: int = 64
    transition_learning_rate: float = 1e-3
    update_width: int = 0
    draft_vocabulary: int = 0
    offset_decay: float = 0.8
    ridge_tokens: int = 100_000
    start_from: str | None = None
    held_out: int = 64
    seed: int = 0
    dtype: str = "float32"
    keep_rows: bool = False
    pack: bool = False

    def __post_init__(self) -> None:
        for name in ("num_offsets", "steps", "batch_size", "anchors", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("ridge_tokens", "seed", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if self.max_length <= self.num_offsets:
            raise ValueError(f"max_length: got {self.max_length}, expected more than num_offsets ({self.num_offsets})")
        if self.pack and self.keep_rows:
            raise ValueError("pack: got it with keep_rows, expected one of them: kept rows are computed once, unpacked")
        for name in ("learning_rate", "transition_learning_rate", "offset_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number of at least 0")
        if self.learning_rate == 0 and (self.start_from is None or not (self.transition_rank or self.update_width)):
            raise ValueError(
                "learning_rate: got 0, which trains a transition and an update alone, expected start_from with it, and "
                "transition_rank or update_width"
            )

    @property
    def sizes(self) -> OptionalFields:
        """Of the predictor that is trained."""
        return {
            "transition_rank": self.transition_rank,
            "update_width": self.update_width,
            "draft_vocabulary": self.draft_vocabulary,
        }

    @property
    def keeps_pseudo_rows(self) -> bool:
        """Whether kept rows hold the pseudo rows, because the maps stay as they are."""
        return self.keep_rows and self.learning_rate == 0

    def schedule(self, step: int) -> float:
        """Share of the peak learning rates at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return 0.55 + 0.45 * math.cos(math.pi * min(progress, 1.0))
