"""A bad argument is refused with its name, by every implementation."""

import pytest
import torch
from bad_layer_ops import (
    bad_decoder_layers,
    bad_gated_linear,
    bad_joint_linear,
    bad_linear,
    bad_norm_qkv_rotary,
    bad_output_norm_mlp,
    bad_rms_norm,
    bad_rotary,
    bad_update_states,
    replaced,
)
from cases import attention_case, draft_case, lookup_case, projection_case, verify_case
from implementations import available

import firp_kernels as kernels
from firp_kernels import ops


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def bad_attention():
    good = attention_case(3, torch.float32, None)
    query, key, lens, depths, lookahead = good[0], good[1], good[3], good[4], good[6]
    yield "query", replaced(good, _0=query[0])
    yield "query", replaced(good, _0=query[:, :-1] if query.shape[1] > depths.shape[1] else query.repeat(1, 3, 1, 1))
    yield "key_cache", replaced(good, _1=key.double())
    yield "value_cache", replaced(good, _2=key[:, :-1])
    yield "context_lens", replaced(good, _3=lens.long())
    yield "context_lens", replaced(good, _3=lens + 10_000)
    yield "context_lens", replaced(good, _3=lens - 10_000)
    yield "depths", replaced(good, _4=torch.zeros(query.shape[0], 257, dtype=torch.int32))
    yield "ancestors", replaced(good, _5=good[5][..., :0])
    if lookahead.numel():
        yield "lookahead", replaced(good, _6=torch.full_like(lookahead, depths.shape[1]))
    yield "num_offsets", replaced(good, _7=-1)
    yield "sliding_window", replaced(good, _9=0)


def bad_write():
    key, cache = torch.zeros(2, 3, 1, 4), torch.zeros(2, 8, 1, 4)
    good = [key, key, cache, cache.clone(), ints(0, 5)]
    yield "key", replaced(good, _0=key[0])
    yield "key", replaced(good, _0=key.int())
    yield "value", replaced(good, _1=key[:, :2])
    yield "value", replaced(good, _1=key.half())
    yield "key_cache", replaced(good, _2=cache[:1])
    yield "value_cache", replaced(good, _3=cache[:, :7])
    yield "value_cache", replaced(good, _3=cache.double())
    yield "context_lens", replaced(good, _4=ints(0))
    yield "context_lens", replaced(good, _4=ints(0, 5).long())
    yield "context_lens", replaced(good, _4=ints(0, 6))
    yield "context_lens", replaced(good, _4=ints(-1, 5))


def bad_write_and_attend():
    query, key_cache, value_cache, lens, *tree = attention_case(3, torch.float32, None)
    key, cache = key_cache[:, : query.shape[1]], torch.stack([key_cache, value_cache])
    good = [query, key, key, cache, lens, *tree]
    yield "query", replaced(good, _0=query[:, 1:])
    yield "key", replaced(good, _0=query.double())
    yield "key", replaced(good, _1=key[0])
    yield "value", replaced(good, _2=key.double())
    yield "layer_cache", replaced(good, _3=cache[0])
    yield "layer_cache", replaced(good, _3=cache[:, :, :, :0])
    yield "layer_cache", replaced(good, _3=cache.double())
    yield "context_lens", replaced(good, _4=lens + 10_000)
    yield "sliding_window", replaced(good, _10=0)
    turns = torch.zeros(key.shape[0], key.shape[1], key.shape[3])
    rotated = [*good, turns, turns]
    yield "sin", rotated[:-1]
    yield "cos", replaced(rotated, _11=turns[:, 1:])
    yield "sin", replaced(rotated, _12=turns[..., :-2])
    yield "sin", replaced(rotated, _12=turns.double())
    odd = [query[..., :-1], key[..., :-1], key[..., :-1], cache[..., :-1], lens, *tree]
    yield "cos", [*odd, turns[..., :-1], turns[..., :-1]]


def bad_projection():
    hidden, weight, lookahead = good = projection_case(1, torch.float32)
    yield "hidden", replaced(good, _0=hidden[0])
    yield "hidden", replaced(good, _0=hidden.int())
    yield "weight", replaced(good, _1=weight[:, :-1])
    yield "weight", replaced(good, _1=weight.half())
    yield "lookahead", replaced(good, _2=lookahead.long())
    yield "lookahead", replaced(good, _2=torch.full((hidden.shape[0], 1), hidden.shape[1], dtype=torch.int32))
    yield "lookahead", replaced(good, _2=torch.full((hidden.shape[0], 1), -2, dtype=torch.int32))


def bad_verify():
    good = verify_case(5, torch.float32, False)
    parents = good[3]
    yield "scores", replaced(good, _0=good[0][0])
    yield "scores", replaced(good, _0=good[0][..., :0])
    yield "uniforms", replaced(good, _1=torch.zeros(1, 99))
    yield "tokens", replaced(good, _2=good[2].int())
    yield "parents", replaced(good, _3=torch.zeros_like(parents))
    yield "lookahead", replaced(good, _4=torch.full((parents.shape[0], 1), 999, dtype=torch.int32))
    yield "max_depth", replaced(good, _5=-1)
    cycle = parents.clone()
    cycle[:, 1:] = parents.shape[1]
    if parents.shape[1] > 1:
        yield "parents", replaced(good, _3=cycle)


def bad_draft():
    good = draft_case(4)
    yield "probabilities", replaced(good, _0=good[0].double())
    yield "candidates", replaced(good, _1=good[1][..., :0])
    yield "root_token", replaced(good, _2=good[2].int())
    yield "num_offsets", replaced(good, _3=good[3] + 99)
    yield "num_nodes", replaced(good, _4=257)
    yield "num_nodes", replaced(good, _4=0)
    yield "num_lookahead", replaced(good, _5=good[4] + 1)
    ordered = next(case for case in map(draft_case, range(99)) if case[6] is not None and len(case[1]))
    yield "probabilities", replaced(ordered, _6=None)
    yield "order", replaced(ordered, _6=ordered[6].long())
    yield "order", replaced(ordered, _6=ordered[6][:, :, :, :0])
    for outside in (-1, ordered[1].shape[2]):
        yield "order", replaced(ordered, _6=torch.full_like(ordered[6], outside))


def bad_commit():
    cache, done = torch.zeros(1, 2, 1, 8, 1, 2), torch.tensor([False])
    good = [cache, ints(2), torch.tensor([[0, 2, 3]], dtype=torch.int32), ints(2), done]
    yield "num_accepted", replaced(good, _3=ints(3))
    yield "path", replaced(good, _2=torch.tensor([[0, 3, 2]], dtype=torch.int32))
    yield "path", replaced(good, _2=torch.tensor([[1, 2, 3]], dtype=torch.int32))
    yield "context_lens", replaced(good, _1=ints(6))
    yield "finished", replaced(good, _4=ints(0))


def bad_emit():
    good = [ints(0)[None], ints(0), torch.tensor([4]), ints(-1), ints(0), ints(0), torch.tensor([[1, 2]])]
    good += [torch.tensor([-1]), ints(3), torch.tensor([False]), torch.tensor([5]), 2, 10, 20]
    names = ("path", "num_accepted", "bonus", "last_slot", "levels_up", "status", "tokens", "stop_tokens")
    for index, name in enumerate((*names, "context_lens", "finished", "remaining")):
        yield name, replaced(good, **{f"_{index}": good[index][None]})
        yield name, replaced(good, **{f"_{index}": good[index].float()})
    yield "path", replaced(good, _0=ints(0)[None, :0])
    yield "path", replaced(good, _0=ints(2)[None])
    yield "path", replaced(good, _0=ints(-2)[None])
    yield "num_accepted", replaced(good, _1=ints(1))
    yield "num_accepted", replaced(good, _1=ints(-1))
    yield "num_offsets", replaced(good, _11=-1)
    yield "num_embeddings", replaced(good, _12=0)


def bad_lookup():
    good = next(case for case in map(lookup_case, range(99)) if case[8] and case[4].shape[1] > 1)
    names = ("history", "context_lens", "emitted", "counts", "tokens", "parents", "depths", "ancestors")
    for index, name in enumerate(names):
        yield name, replaced(good, **{f"_{index}": good[index][None]})
        yield name, replaced(good, **{f"_{index}": good[index].float()})
    width = good[2].shape[1]
    for name, index, values in (
        ("context_lens", 1, (-99, 99)),
        ("counts", 3, (-99, width + 1)),
        ("num_branch", 8, (-1, 256)),
        ("num_replaced", 11, (-1, good[8] + 1, good[4].shape[1])),
    ):
        for value in values:
            yield name, replaced(good, **{f"_{index}": good[index] * 0 + value})
    yield "counts: got 2 past", replaced(good, _1=good[1] * 0, _2=good[2].repeat(1, 2), _3=good[3] * 0 + 2)
    yield "parents", replaced(good, _5=good[5] * 0 + good[4].shape[1])
    yield "least_match", replaced(good, _9=0)


def bad_top_marginals():
    logits, rows = torch.zeros(1, 2, 5), torch.zeros(1, 1, dtype=torch.long)
    yield "logits", [logits[0], rows, 1]
    yield "logits", [logits.int(), rows, 1]
    yield "rows", [logits, rows.int(), 1]
    yield "rows", [logits, rows + 2, 1]
    yield "rows", [logits, rows - 1, 1]
    yield "num_ranks", [logits, rows, 6]


def bad_condition_marginals():
    tokens, root, table = torch.tensor([[[0, 4, 1]]]), torch.tensor([4]), torch.zeros(5, 2)
    good = [torch.ones(1, 1, 3), tokens, root, table, table, 3]
    for index, name in enumerate(("probabilities", "candidates", "root_token", "source", "target")):
        yield name, replaced(good, **{f"_{index}": good[index][..., None]})
        yield name, replaced(good, **{f"_{index}": good[index].to(torch.int32)})
    yield "probabilities", replaced(good, _0=good[0].double())
    yield "target", replaced(good, _4=table[:4])
    yield "target", replaced(good, _4=table.bfloat16())
    for name, index in (("candidates", 1), ("root_token", 2)):
        yield f"{name}: got 5", replaced(good, **{f"_{index}": good[index].clamp(min=5)})
        yield f"{name}: got -1", replaced(good, **{f"_{index}": good[index].clamp(max=-1)})
    yield "num_ranks", replaced(good, _5=0)
    yield "num_ranks", replaced(good, _5=4)


def bad_keep_top_p():
    scores = torch.zeros(2, 5)
    yield "scores", (scores[0], 0.9, 1, 0.0)
    yield "scores", (scores.half(), 0.9, 1, 0.0)
    yield "top_p", (scores, 1.1, 1, 0.0)
    yield "min_tokens_to_keep", (scores, 0.9, 0, 0.0)


CASES = {
    "keep_top_p": bad_keep_top_p,
    "write_cache": bad_write,
    "tree_attention": bad_attention,
    "write_and_attend": bad_write_and_attend,
    "predictor_projection": bad_projection,
    "verify_tree": bad_verify,
    "draft_tree": bad_draft,
    "commit_cache": bad_commit,
    "emit_tokens": bad_emit,
    "lookup_branch": bad_lookup,
    "linear": bad_linear,
    "joint_linear": bad_joint_linear,
    "gated_linear": bad_gated_linear,
    "norm_qkv_rotary": bad_norm_qkv_rotary,
    "output_norm_mlp": bad_output_norm_mlp,
    "decoder_layers": bad_decoder_layers,
    "rms_norm": bad_rms_norm,
    "update_states": bad_update_states,
    "rotary": bad_rotary,
    "top_marginals": bad_top_marginals,
    "condition_marginals": bad_condition_marginals,
}


def test_every_op_is_tried():
    assert CASES.keys() == ops.SCHEMAS.keys()


@pytest.mark.parametrize("name, impl", [(name, impl) for name in CASES for impl, _ in available(name)])
def test_bad_arguments(name, impl):
    for argument, args in CASES[name]():
        with pytest.raises((ValueError, TypeError), match=argument):
            getattr(kernels, name)(*args, impl=impl)
