"""Whether decoding works at all: captured runs equal eager ones, buffers grow, two engines share a GPU.

Random weights in float32, so no file is needed. Where there are two models each has a process of its own, and they run
side by side. Exit code: 0, 1 where a check failed; the others run all the same.
"""

from __future__ import annotations

import copy
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import firp
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# Tokens of prompts and answers. The longer run takes more cache than the smallest allocation, and a second bucket on
# its way.
SHORT, LONG, NEW_TOKENS = (20, 40), (420, 260), 60
DRY_LONG, DRY_NEW_TOKENS = (60, 50), 8
TINY = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def random_model(sizes: dict, device: str) -> tuple[LlamaForCausalLM, firp.FirpPredictor]:
    """A model whose greedy text varies, and a predictor near the identity."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=2048, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
        predictor = firp.FirpPredictor.for_model(model, 3, config.num_hidden_layers * 2 // 3, transition_rank=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        predictor.transition.normal_(0.0, 0.05)
    return model, predictor.to(device)


class Decoder:
    """Runs of one model on one device."""

    def __init__(self, sizes: dict, device: str) -> None:
        self.device, self.tree = device, firp.TreeConfig(16, 8)
        self.long, self.new_tokens = (LONG, NEW_TOKENS) if device == "cuda" else (DRY_LONG, DRY_NEW_TOKENS)
        self.model, self.predictor = random_model(sizes, device)
        # Without a GPU the reference ops stand in, and nothing is captured or compiled.
        self.options = {"graphs": True, "compile": False} if device == "cuda" else {"impl": "reference"}
        self.eager = self.engine(graphs=False) if device == "cuda" else self.engine()
        self._expected: dict[tuple[int, ...], list[list[int]]] = {}

    def engine(self, drafts: bool = True, **options) -> firp.Engine:
        drafting = (self.predictor, self.tree) if drafts else ()
        return firp.Engine(self.model, *drafting, **(self.options | options))

    def prompts(self, *lengths: int) -> tuple[Tensor, Tensor]:
        """Left-padded tokens and their mask."""
        generator = torch.Generator().manual_seed(sum(lengths))
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in enumerate(lengths):
            ids[row, -length:] = torch.randint(2, self.model.config.vocab_size, (length,), generator=generator)
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        return ids.to(self.device), mask.long().to(self.device)

    def decode(self, engine: firp.Engine, *lengths: int, **options) -> list[list[int]]:
        ids, mask = self.prompts(*lengths)
        options = {"do_sample": False, "max_new_tokens": self.new_tokens, "attention_mask": mask} | options
        return firp.generate(engine.model, ids, engine=engine, **options)[:, ids.shape[1] :].tolist()

    def expected(self, *lengths: int) -> list[list[int]]:
        """What an eager greedy run gives, decoded once."""
        if lengths not in self._expected:
            self._expected[lengths] = self.decode(self.eager, *lengths)
        return self._expected[lengths]

    def start(self, engine: firp.Engine):
        return engine.start([self.prompts(SHORT[0])[0][0]], 4 * self.new_tokens, [])

    def steps(self, engine: firp.Engine, state, count: int) -> list[int]:
        """What `count` further steps of a run emit."""
        tokens = []
        for _ in range(count):
            record = engine.step(state)
            tokens += record.tokens[0, : int(record.counts[0])].tolist()
        return tokens


def captured_equals_eager(run: Decoder) -> None:
    captured = run.engine()
    equal(run.decode(captured, SHORT[0]), run.expected(SHORT[0]))
    equal(run.decode(captured, SHORT[0]), run.expected(SHORT[0]))


def a_longer_run_makes_buffers_grow(run: Decoder) -> None:
    captured = run.engine()
    for length in (SHORT[0], run.long[0], SHORT[0]):
        equal(run.decode(captured, length), run.expected(length))


def one_engine_grows_while_the_other_replays(run: Decoder) -> None:
    first, second = run.engine(), run.engine()
    expected = run.steps(run.eager, run.start(run.eager), 20)
    state = run.start(second)
    tokens = run.steps(second, state, 5)
    run.decode(first, SHORT[0])
    tokens += run.steps(second, state, 5)
    equal(run.decode(first, run.long[0]), run.expected(run.long[0]))
    tokens += run.steps(second, state, 5)
    del first
    tokens += run.steps(second, state, 5)
    equal(tokens, expected)


def a_batch_equals_its_sequences(run: Decoder) -> None:
    lengths = (*SHORT, run.long[1])
    equal(run.decode(run.engine(), *lengths), run.expected(*lengths))


def plain_equals_firp(run: Decoder) -> None:
    equal(run.decode(run.engine(drafts=False), SHORT[0]), run.expected(SHORT[0]))


def sampling_equals_eager_sampling(run: Decoder) -> None:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3}
    equal(run.decode(run.engine(), SHORT[1], **options), run.decode(run.eager, SHORT[1], **options))


def hugging_face_gives_the_same(run: Decoder) -> None:
    ids, mask = run.prompts(SHORT[0])
    out = run.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=run.new_tokens)
    equal(run.decode(run.engine(), SHORT[0]), out[:, ids.shape[1] :].tolist())


def compiled_layers_give_the_same(run: Decoder) -> None:
    if run.device == "cuda":
        equal(run.decode(run.engine(compile=True), SHORT[0]), run.expected(SHORT[0]))


def bfloat16_repeats_itself(run: Decoder) -> None:
    """Graphs and the default settings in the dtype that is used; buckets may part it from an eager run at near ties."""
    model, predictor = copy.deepcopy(run.model).bfloat16(), copy.deepcopy(run.predictor).bfloat16()
    engine = firp.Engine(model, predictor, run.tree, **(run.options if run.device == "cpu" else {}))
    once = run.decode(engine, SHORT[0])
    equal(run.decode(engine, SHORT[0]), once)
    equal(len(once[0]), run.new_tokens)


CHECKS: tuple[Callable[[Decoder], None], ...] = (
    captured_equals_eager, a_longer_run_makes_buffers_grow, one_engine_grows_while_the_other_replays,
    a_batch_equals_its_sequences, plain_equals_firp, sampling_equals_eager_sampling, hugging_face_gives_the_same,
    compiled_layers_give_the_same, bfloat16_repeats_itself,
)  # fmt: skip


def equal(found, expected) -> None:
    if found != expected:
        raise AssertionError(f"got {found}, expected {expected}")


def run_checks(device: str, name: str, sizes: dict) -> list[str]:
    """Run all checks of one model; those that failed."""
    run, failed = Decoder(sizes, device), []
    for check in CHECKS:
        began, title = time.monotonic(), f"{name}: {check.__name__.replace('_', ' ')}"
        try:
            check(run)
            print(f"ok      {title}, {time.monotonic() - began:.1f} s", flush=True)
        except Exception:
            print(f"{traceback.format_exc()}FAILED  {title}", flush=True)
            failed.append(title)
    return failed


def main(device: str) -> int:
    shapes = {"tiny": TINY, "smollm2": SMOLLM2} if device == "cuda" else {"tiny": TINY}
    calls = [device] * len(shapes), shapes, shapes.values()
    if len(shapes) == 1:
        found = list(map(run_checks, *calls))
    else:
        with ProcessPoolExecutor(len(shapes), mp_context=get_context("spawn")) as pool:
            found = list(pool.map(run_checks, *calls))
    failed = [title for titles in found for title in titles]
    total = len(shapes) * len(CHECKS)
    print(f"{total - len(failed)} of {total} checks passed{'; failed: ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
