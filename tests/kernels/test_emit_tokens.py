"""emit_tokens: every implementation gives the oracle's integers, and the oracle those of a loop in Python."""

import random

import pytest
import torch
from cases import moved
from implementations import TRITON_DEVICE, on_devices, run, seeds

import firp_kernels
from firp_kernels.ops import emit_tokens

IMPLEMENTATIONS = on_devices("emit_tokens")


def emit_case(seed: int) -> list:
    """Arguments of `emit_tokens`: tokens of a small vocabulary, so that stops are common; odd widths and counts."""
    rng = random.Random(seed)
    batch, num_nodes, width = rng.randint(1, 5), rng.choice((1, 2, 9, 40)), rng.choice((1, 2, 4, 5))
    num_offsets, slots = rng.choice((0, 1, 3)), rng.randint(1, 3)

    def drawn(low: int, high: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor([rng.randint(low, high) for _ in range(batch)], dtype=dtype)

    deepest = min(width, num_nodes) - 1
    accepted = drawn(0, deepest)
    path = torch.full((batch, width), -1, dtype=torch.int32)
    for b, count in enumerate(accepted.tolist()):
        path[b, : count + 1] = torch.tensor([0, *sorted(rng.sample(range(1, num_nodes), count))], dtype=torch.int32)
    status = drawn(0, 9) // 9
    bonus = torch.where(status != 0, -1, drawn(0, 12, torch.int64))
    stop_tokens = torch.tensor(rng.choice(([], [-1], [3], [-1, 7, 2])), dtype=torch.int64)
    tokens = torch.randint(0, 13, (batch, num_nodes), generator=torch.Generator().manual_seed(seed))
    finished = drawn(0, 3) == 0
    return [
        path, accepted, bonus, drawn(-1, slots - 1), drawn(0, width), status, tokens, stop_tokens, drawn(0, 20),
        finished,
        drawn(1, 6, torch.int64), num_offsets, rng.choice((8, 100)), rng.choice((12, 100)),
    ]  # fmt: skip


def emitted_by_a_loop(
    path, num_accepted, bonus, last_slot, levels_up, status, tokens, stop_tokens, context_lens, finished, remaining,
    num_offsets, num_embeddings, max_context, b,
):  # fmt: skip
    """New tokens, whether sequence b is finished, and the next tree's root, rows and usable depths."""
    choices = [int(tokens[b, node]) for node in path[b].tolist()[1:] if node >= 0] + [int(bonus[b])]
    assert len(choices) == int(num_accepted[b]) + 1
    new, done = [], bool(finished[b]) or bool(status[b])
    while not done and len(new) < len(choices):
        new.append(choices[len(new)])
        done = new[-1] in stop_tokens.tolist() or len(new) == int(remaining[b])
    done = done or int(context_lens[b]) + max(len(new), 1) > max_context
    up, slot = int(levels_up[b]), max(int(last_slot[b]), 0)
    rows = [slot * num_offsets + min(offset + up, num_offsets - 1) for offset in range(num_offsets)]
    return new, done, min(max(int(bonus[b]), 0), num_embeddings - 1), rows, max(num_offsets - up, 0)


@IMPLEMENTATIONS
def test_a_loop_emits_the_same(impl, device):
    for seed in seeds(160, impl, device):
        args, before = emit_case(seed), emit_case(seed)[10]
        args = moved(args, device)
        out = firp_kernels.Emitted(*moved(firp_kernels.emit_tokens(*args, impl=impl), "cpu"))
        for b in range(len(before)):
            new, done, root, rows, usable = emitted_by_a_loop(*emit_case(seed), b)
            padded = new + [-1] * (out.tokens.shape[1] - len(new))
            assert out.tokens[b].tolist() == padded and int(out.counts[b]) == len(new), seed
            assert int(out.kept[b]) == max(len(new) - 1, 0) and bool(out.finished[b]) == done, seed
            assert (int(out.root[b]), out.rows[b].tolist(), int(out.usable[b])) == (root, rows, usable), seed
            assert out.packed[b].tolist() == [*padded, len(new), done, int(emit_case(seed)[5][b])], seed
            assert int(args[10][b]) == int(before[b]) - len(new), seed


@IMPLEMENTATIONS
def test_dtypes_and_strided_inputs(impl, device):
    for seed in seeds(12, impl, device):
        args, exact = emit_case(seed), emit_tokens.reference(*emit_case(seed))
        spread = [arg.repeat_interleave(2, -1)[..., ::2] if isinstance(arg, torch.Tensor) else arg for arg in args]
        out = run("emit_tokens", spread, impl, device)
        for part, expected in zip(out, exact, strict=True):
            assert part.dtype == expected.dtype and torch.equal(part, expected), seed
        if device == "cpu":
            assert torch.equal(spread[10], args[10] - exact.counts), seed


def test_every_output_is_written(poisoned_outputs):
    largest = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
    for seed in range(8):
        for out in run("emit_tokens", emit_case(seed), "triton", TRITON_DEVICE):
            assert out.dtype == torch.bool or not bool((out == largest[out.dtype]).any()), seed


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    args, others = (moved(emit_case(7), "cuda") for _ in range(2))
    firp_kernels.emit_tokens(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = firp_kernels.emit_tokens(*args)
    args[10].copy_(others[10])
    graph.replay()
    for out, exact in zip(replayed, firp_kernels.emit_tokens(*others), strict=True):
        assert torch.equal(out, exact)
    assert torch.equal(args[10], others[10])
