"""What decoding needs in memory, planned from shapes before any of it is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from firp.decoder.view import DecoderView
from firp.drafting.trees import TreeConfig
from firp.engine.buffers import allocated_slots
from firp.engine.prefill import CAPTURED_ROWS, CHUNK_TOKENS, most_rows
from firp.tools.hardware import available_memory
from firp.tools.ranks import planned_heads

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, part by part.

    Attributes:
        weights: the model's parameters.
        predictor: one d x d map per offset, two tables [V, r] of a token transition, three d x w per offset of an
            update, and the head's rows of the tokens that may be drafted.
        cache: keys and values of every layer, for every slot allocated.
        scores: the head's scores of one step, and what sampling and drafting make of them.
        scratch: rows on their way through one layer, in a step or in a chunk of the prompt, whichever is larger.
        graphs: scores and scratch in the pool that captured steps and prompts share; 0 where nothing is captured.
    """

    weights: int
    predictor: int
    cache: int
    scores: int
    scratch: int
    graphs: int

    @property
    def run(self) -> int:
        """What a run needs beyond model and predictor."""
        return self.cache + self.scores + self.scratch + self.graphs

    @property
    def total(self) -> int:
        return self.weights + self.predictor + self.run


def plan_memory(
    config: PretrainedConfig,
    dtype: torch.dtype,
    slots: int,
    batch_size: int = 1,
    num_nodes: int = 1,
    num_lookahead: int = 0,
    num_offsets: int = 0,
    weights: int = 0,
    captures: bool = False,
    transition_rank: int = 0,
    update_width: int = 0,
    draft_vocabulary: int = 0,
    prefill_rows: int = CHUNK_TOKENS,
    tp_size: int = 1,
    local_heads: tuple[int, int] | None = None,
) -> MemoryPlan:
    """Plan a run of B sequences over a cache of `slots` slots each.

    Args:
        config, dtype: of the model.
        num_nodes, num_lookahead, num_offsets: N, P, k; 1, 0, 0 is plain decoding.
        weights: bytes of the model's parameters.
        captures: whether steps are captured as graphs.
        transition_rank: r of the predictor's token transition.
        update_width: w of its update of final states.
        draft_vocabulary: tokens that updated rows are scored for; 0 is all.
        prefill_rows: rows of prompts that pass the model at once, as `most_rows` counts them.
        tp_size: tensor parallel ranks; what one of them needs is planned.
        local_heads: query heads and key heads of a rank; None: all.
    """
    size, width, vocab = dtype.itemsize, config.hidden_size, config.vocab_size
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads, kv_heads = local_heads or (config.num_attention_heads, config.num_key_value_heads)
    rows = num_nodes + num_lookahead * num_offsets
    logits = batch_size * rows * vocab * size
    # Sampling holds processed scores, sorted ones and probabilities in float32, drafting the scores of k rows.
    wide = batch_size * (3 * num_nodes + 2 * num_offsets) * vocab * 4
    per_row = (4 * width + 3 * -(-config.intermediate_size // tp_size) + 2 * (heads + 2 * kv_heads) * head_width) * size

    def passing(rows: int, reach: int) -> int:
        """Rows of prompts: keys and values spread over their groups, and a mask of one prompt's chunk, among them."""
        attended = 2 * heads * head_width * max(reach, rows) * size + min(rows, reach) * reach
        return rows * per_row + attended

    steps, together = batch_size * rows * per_row, slots * batch_size
    captured = min(CAPTURED_ROWS, together)
    maps = num_offsets * width * (width + 3 * update_width) + draft_vocabulary * width
    return MemoryPlan(
        weights=weights,
        predictor=(maps + 2 * vocab * transition_rank) * size,
        cache=config.num_hidden_layers * 2 * batch_size * slots * kv_heads * head_width * size,
        scores=logits + wide,
        scratch=max(steps, passing(min(prefill_rows, together), slots)),
        graphs=logits + wide + max(steps, passing(captured, captured)) if captures else 0,
    )


def plan_run(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    batch_size: int,
    tp_size: int = 1,
    weights: int = 0,
    drafts: Mapping[str, int] | None = None,
) -> tuple[int, MemoryPlan]:
    """Cache slots of a sequence, and the memory of a run on each of `tp_size` ranks, on a device that need not be here.

    Args:
        max_len: tokens of prompt and output together.
        weights: bytes of the model's parameters on a rank.
        drafts: sizes of tree and predictor, by the names that `plan_memory` has; None decodes plainly.

    Raises:
        ValueError: heads that cannot be divided over the ranks.
    """
    drafts = drafts or {}
    rows = drafts["num_nodes"] + drafts["num_lookahead"] * drafts["num_offsets"] if drafts else 1
    slots = slots_for(max_len, rows)
    plan = plan_memory(
        config, dtype, slots, batch_size, **drafts, weights=weights, captures=device.type == "cuda" and tp_size == 1,
        prefill_rows=most_rows(device, slots, batch_size), tp_size=tp_size, local_heads=planned_heads(config, tp_size),
    )  # fmt: skip
    return slots, plan


def slots_for(max_len: int, rows: int) -> int:
    """Cache slots allocated for sequences of up to `max_len` tokens and steps of `rows` rows."""
    return allocated_slots(max_len + rows)


def gib(number: int) -> str:
    """Bytes in words; a little in MiB."""
    return f"{number / MIB:.2f} MiB" if 0 < number < GIB / 10 else f"{number / GIB:.2f} GiB"


def check_memory(
    view: DecoderView, batch_size: int, slots: int, tree: TreeConfig | None, num_offsets: int, captures: bool
) -> None:
    """Raise ValueError, with the numbers, if a run of B sequences of `slots` slots will not fit the model's device.

    Args:
        tree: the draft tree; None decodes plainly.
        num_offsets: k.
        captures: whether steps are captured as graphs.
    """
    num_nodes, num_lookahead = (1, 0) if tree is None else (tree.num_nodes, tree.num_lookahead)
    plan = plan_memory(
        view.config, view.dtype, slots, batch_size, num_nodes, num_lookahead, num_offsets, captures=captures,
        prefill_rows=most_rows(view.device, slots, batch_size), tp_size=view.ranks.size, local_heads=view.heads[:2],
    )  # fmt: skip
    available = view.ranks.least(available_memory(view.device))
    if plan.run > available:
        parts = ", ".join(f"{name} {gib(getattr(plan, name))}" for name in ("cache", "scores", "scratch", "graphs"))
        raise ValueError(
            f"max_new_tokens: {batch_size} sequences of {slots} cache slots need {gib(plan.run)} ({parts}), but "
            f"{gib(available)} of memory are free on {view.device}; ask for fewer tokens or a smaller batch"
        )
