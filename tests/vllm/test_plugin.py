"""The vLLM plug-in's chain without vLLM: drafts over a paged cache, and what is decoded with them."""

import random

import firp
import pytest
import torch
from fake_vllm import BLOCK, PAGES, CommonAttentionMetadata, make_runner, written
from models import hf_alone, tiny_model, tiny_predictor, update_predictor

import firp_kernels

LAYER, OFFSETS, NEW = 2, 3, 24
CHAIN = firp.TreeConfig(OFFSETS + 1, OFFSETS + 1, "static", ((0,), (0, 0), (0, 0, 0)))


class Sequences:
    """A batch that decodes greedily as vLLM would: scheduled rows, verification, one draft for all."""

    def __init__(self, runner, prompts, seed: int = 0) -> None:
        self.runner, self.target = runner, runner.vllm_config.target
        self.tokens = [list(prompt) for prompt in prompts]
        self.computed = [0] * len(prompts)
        self.drafts = [[] for _ in prompts]
        self.accepted = [[] for _ in prompts]
        blocks = torch.randperm(PAGES, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        self.block_table = blocks[: len(prompts) * (PAGES // len(prompts))].view(len(prompts), -1)

    def step(self, chunk: int = 100) -> None:
        rows = [(self.tokens[b] + self.drafts[b])[self.computed[b] :][:chunk] for b in range(len(self.tokens))]
        at = [torch.arange(len(row)) + self.computed[b] for b, row in enumerate(rows)]
        slots = [self.block_table[b, p // BLOCK].long() * BLOCK + p % BLOCK for b, p in enumerate(at)]
        starts = torch.tensor([0] + [len(row) for row in rows]).cumsum(0).to(torch.int32)
        seq_lens = torch.tensor([int(p[-1]) + 1 for p in at], dtype=torch.int32)
        positions = torch.cat(at)
        metadata = CommonAttentionMetadata(
            starts, starts, seq_lens, len(rows), len(positions), max(map(len, rows)), int(seq_lens.max()),
            self.block_table, torch.cat(slots), seq_lens.clone(),
        )  # fmt: skip
        scores, hidden = self.target.forward(
            torch.tensor([token for row in rows for token in row]), positions, metadata, LAYER
        )
        best, last, bonus = scores.argmax(-1).tolist(), [], []
        for b, row in enumerate(rows):
            first = int(starts[b])
            if self.computed[b] + len(row) < len(self.tokens[b]):  # a part of a prompt: nothing is sampled
                last.append(first + len(row) - 1)
                bonus.append(-1)
                self.computed[b] += len(row)
                continue
            known = len(self.tokens[b]) - self.computed[b] - 1  # rows before the one whose next token is open
            index = first + known
            for draft in self.drafts[b]:
                if draft != best[index]:
                    break
                self.tokens[b].append(draft)
                index += 1
            self.accepted[b].append(index - first - known)
            self.tokens[b].append(best[index])
            self.computed[b] = len(self.tokens[b]) - 1
            last.append(index)
            bonus.append(best[index])
        drafts = self.runner.drafter.propose(
            num_speculative_tokens=OFFSETS, target_token_ids=None, target_positions=positions,
            target_hidden_states=hidden, next_token_ids=torch.tensor(bonus, dtype=torch.int32),
            token_indices_to_sample=torch.tensor(last, dtype=torch.int32), common_attn_metadata=metadata,
            sampling_metadata=None,
        )  # fmt: skip
        self.drafts = [row if token >= 0 else [] for row, token in zip(drafts.tolist(), bonus, strict=True)]


def decode(runner, prompts, chunk: int = 100, drop: bool = False) -> Sequences:
    """Until every sequence has its tokens; `drop` leaves some drafts out, as a scheduler without room does."""
    run, rng = Sequences(runner, prompts), random.Random(1)
    while min(len(t) - len(p) for t, p in zip(run.tokens, prompts, strict=True)) < NEW:
        run.step(chunk)
        if drop:
            run.drafts = [drafts[: rng.randrange(OFFSETS + 1)] for drafts in run.drafts]
    return run


def random_prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 7) for _ in range(rng.randint(1, 13))] for _ in range(count)]


@torch.no_grad()
def expected_drafts(model, predictor, tokens: list[int], bonus: int) -> list[int]:
    """The chain by the method's definition: one dense causal pass of the upper layers over real and pseudo rows."""
    decoder = model.model
    hidden = decoder(torch.tensor([tokens]), output_hidden_states=True).hidden_states[LAYER]
    rows = torch.cat([hidden, predictor(hidden[:, -1])], 1)
    positions = torch.arange(rows.shape[1])[None]
    mask = torch.full((rows.shape[1],) * 2, float("-inf"), dtype=rows.dtype).triu(1)[None, None]
    rotary = decoder.rotary_emb(rows, positions)
    for layer in decoder.layers[LAYER:]:
        rows = layer(rows, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        rows = rows[0] if isinstance(rows, tuple) else rows
    logits = model.lm_head(decoder.norm(rows[:, -OFFSETS:]))
    probabilities, candidates = firp_kernels.top_marginals(logits, torch.arange(OFFSETS)[None], 7)
    if predictor.transition is None:
        return candidates[0, :, 0].tolist()
    embeddings = decoder.embed_tokens.weight
    embeddings = embeddings * embeddings.pow(2).mean().rsqrt()
    source, target = (embeddings @ part for part in predictor.transition)
    _, order = firp_kernels.condition_marginals(probabilities, candidates, torch.tensor([bonus]), source, target, 1)
    chosen, drafts = 0, []
    for depth in range(OFFSETS):
        chosen = int(order[0, depth, chosen, 0])
        drafts.append(int(candidates[0, depth, chosen]))
    return drafts


@pytest.mark.parametrize("kind", ["random", "identity", "zero", "inverted"])
def test_drafts_are_those_of_the_method(vllm, tmp_path, kind):
    model = tiny_model(1)
    predictor = tiny_predictor(model, 3, kind)
    run = Sequences(make_runner(vllm, model, written(tmp_path, model, predictor)), random_prompts(5, 4))
    for _ in range(6):
        run.step()
        for tokens, drafts in zip(run.tokens, run.drafts, strict=True):
            assert drafts == expected_drafts(model, predictor, tokens[:-1], tokens[-1])


@pytest.mark.parametrize("chunk", [100, 5])
@pytest.mark.parametrize("make", [tiny_predictor, update_predictor])
@pytest.mark.parametrize("kind", ["random", "zero", "nan", "inf", "huge"])
def test_output_is_the_models_own(vllm, tmp_path, make, kind, chunk):
    model = tiny_model(2)
    runner = make_runner(vllm, model, written(tmp_path, model, make(model, 3)))
    if kind != "random":  # weights that no file may hold
        runner.drafter.chain = type(runner.drafter.chain)(
            make(model, 3, kind), model.model.embed_tokens, runner.drafter.chain.head, 7, model.dtype, model.device
        )
    prompts = random_prompts(6, 3)
    run = decode(runner, prompts, chunk, drop=True)
    for prompt, tokens in zip(prompts, run.tokens, strict=True):
        ids = torch.tensor([prompt])
        (own,) = hf_alone(model, ids, torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert tokens[len(prompt) :][:NEW] == own


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [LAYER, LAYER + 1])
def test_a_pass_that_overflows_leaves_the_cache_finite(vllm, tmp_path, monkeypatch, value, layer):
    model = tiny_model(2)
    runner = make_runner(vllm, model, written(tmp_path, model, tiny_predictor(model, 3)))
    target, propose, drafting = runner.vllm_config.target, runner.drafter.propose, []
    own = target.model.layers[layer].forward

    def overflowing(positions, hidden, residual):
        rows, residual = own(positions, hidden, residual)
        return (rows + value, residual) if drafting else (rows, residual)

    def flagged(**given):
        drafting.append(True)
        drafts = propose(**given)
        drafting.clear()
        return drafts

    monkeypatch.setattr(target.model.layers[layer], "forward", overflowing)
    monkeypatch.setattr(runner.drafter, "propose", flagged)
    prompts = random_prompts(6, 3)
    run = decode(runner, prompts, drop=True)
    assert all(attention.cache.isfinite().all() for attention in target.attention.values())
    for prompt, tokens in zip(prompts, run.tokens, strict=True):
        ids = torch.tensor([prompt])
        (own_tokens,) = hf_alone(
            model, ids, torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert tokens[len(prompt) :][:NEW] == own_tokens


@pytest.mark.parametrize("make", [tiny_predictor, update_predictor])
def test_it_accepts_what_the_engines_own_chain_accepts(vllm, tmp_path, make):
    model = tiny_model(3)
    predictor = make(model, 1)
    prompts = random_prompts(7, 3)
    run = decode(make_runner(vllm, model, written(tmp_path, model, predictor)), prompts)
    engine = firp.Engine(model, predictor, tree=CHAIN)
    for prompt, accepted in zip(prompts, run.accepted, strict=True):
        counts: list[int] = []
        firp.generate(
            model, torch.tensor([prompt]), engine=engine, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            on_step=lambda event, counts=counts: counts.append(len(event.tokens[0])),
        )  # fmt: skip
        # The engine's first step is vLLM's prefill. The last may be cut by the limit of tokens.
        assert accepted[: len(counts) - 1] == [count - 1 for count in counts[:-1]]
