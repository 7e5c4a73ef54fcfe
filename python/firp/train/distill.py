"""`firp distill`: the base model answers prompts, so that a predictor trains on the model's own text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from firp.engine.engine import Engine
from firp.generation.batch import answer, cut_after_stop
from firp.tools.models import load_model
from firp.tools.prompt_files import Prompt, encode, load_prompts
from firp.train.data import TextDataset
from firp.train.text_parts import join_parts, opened_parts, remove_parts, save_arrays, token_dtype


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides the text.

    Attributes:
        model: base model, as `load_model` takes it.
        prompts: JSONL file (`firp.tools.prompt_files`), first turns.
        limit: prompts taken, None for all.
        max_new_tokens: tokens of an answer at most.
        batch_size: prompts answered at once.
        temperature: of every second batch; the others are greedy.
        max_prompt_tokens: longer prompts are left out.
        seed: of sampling.
        dtype: of the base model.
    """

    model: str
    prompts: str
    limit: int | None = None
    max_new_tokens: int = 192
    batch_size: int = 16
    temperature: float = 0.7
    max_prompt_tokens: int = 512
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected more than 0")


def _answer(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    greedy: bool,
    config: DistillConfig,
    batch: int,
) -> list[list[int]]:
    """Answers of one batch, end token kept."""
    options = {} if greedy else {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    answers = answer(
        engine,
        rows,
        seed=config.seed * 1_000_003 + batch,
        max_new_tokens=config.max_new_tokens,
        do_sample=not greedy,
        **options,
    )
    return cut_after_stop(answers, {tokenizer.eos_token_id})


def distill(config: DistillConfig, output: str | Path, device: str = "cpu", progress: bool = True) -> Path:
    """Answer the prompts batch by batch and write what `firp train` reads; go on where an earlier run was cut off.

    Finished batches are kept in `OUTPUT.parts/` until all are there; one process at a time works on them.

    Returns:
        the file, arrays as in `firp.train.data.TextDataset` plus `greedy` [n] and `ids` [n].

    Raises:
        ValueError, FileNotFoundError: unreadable prompts, a bad setting, parts that are damaged or of other settings.
        OSError: the disk refuses a file (finished batches stay), or another process is at work on the same output.
    """
    output = Path(output)
    prompts = load_prompts(config.prompts, config.limit)
    with opened_parts(output, asdict(config)) as parts:
        join_parts(_answer_all(config, prompts, parts, device, progress), output)
        remove_parts(parts)
    return output


def _answer_all(
    config: DistillConfig, prompts: list[Prompt], parts: Path, device: str, progress: bool
) -> list[dict[str, np.ndarray]]:
    """Write the parts that are missing; return the arrays of all of them in order."""
    model, tokenizer = load_model(config.model, config.dtype, device)
    kept = [(p.id, encode(tokenizer, [{"role": "user", "content": p.turns[0]}])) for p in prompts]
    kept = sorted((item for item in kept if len(item[1]) <= config.max_prompt_tokens), key=lambda item: len(item[1]))
    if not kept:
        raise ValueError(f"max_prompt_tokens: no prompt has at most {config.max_prompt_tokens} tokens")
    batches = [kept[i : i + config.batch_size] for i in range(0, len(kept), config.batch_size)]
    engine = Engine(model)
    arrays: dict[int, dict[str, np.ndarray]] = {}
    bar = tqdm(total=len(kept), desc="distill", unit="prompt", disable=None if progress else True)
    # The longest first: the engine's buffers, and steps captured over them, then fit every batch.
    for index, batch in reversed(list(enumerate(batches))):
        part = parts / f"{index:06d}.npz"
        ids, rows = [p for p, _ in batch], [row for _, row in batch]
        if part.is_file():
            arrays[index] = _read_part(part, ids, rows)
        else:
            greedy = index % 2 == 0
            answers = _answer(engine, tokenizer, rows, greedy, config, index)
            arrays[index] = _write_part(part, ids, rows, answers, greedy, model)
            seconds = bar.format_dict["elapsed"]
            bar.set_postfix_str(
                f"{sum(map(len, answers)) / max(seconds - getattr(bar, 'seconds', 0.0), 1e-9):.0f} tokens/s"
            )
            bar.seconds = seconds
        bar.update(len(batch))
    bar.close()
    return [arrays[index] for index in range(len(batches))]


def _write_part(
    path: Path, ids: list[str], prompts: list[list[int]], answers: list[list[int]], greedy: bool, model: PreTrainedModel
) -> dict[str, np.ndarray]:
    dtype = token_dtype(model.config.vocab_size)
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    arrays = {
        "tokens": np.concatenate([np.array(sequence, dtype) for sequence in sequences]),
        "lengths": np.array([len(sequence) for sequence in sequences], np.int64),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "greedy": np.full(len(ids), greedy),
        "ids": np.array(ids),
    }
    save_arrays(path, **arrays)
    return arrays


def _read_part(path: Path, ids: list[str], prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """The arrays of a finished batch; ValueError for a damaged file, or answers to other prompts."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("tokens", "lengths", "prompt_lengths", "greedy", "ids")}
        offsets = np.concatenate([[0], arrays["lengths"].cumsum()])
        text = TextDataset(arrays["tokens"], offsets, arrays["prompt_lengths"])
        text.check()
        if arrays["ids"].tolist() != np.array(ids).tolist() or arrays["prompt_lengths"].tolist() != [
            len(prompt) for prompt in prompts
        ]:
            raise ValueError("ids: got those of other prompts")
        if any(text.sequence(i)[: len(prompt)].tolist() != prompt for i, prompt in enumerate(prompts)):
            raise ValueError("tokens: got other prompts")
        if arrays["greedy"].shape != (len(ids),) or arrays["greedy"].dtype != bool:
            raise ValueError("greedy: expected a boolean for each prompt")
    except Exception as error:
        raise ValueError(
            f"output: {path} is no batch of this run: {error}; remove it to answer that batch again"
        ) from error
    return arrays
