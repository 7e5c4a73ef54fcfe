"""Random inputs of the ops: trees of every shape, ragged lengths, empty slots, poisoned dead slots."""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from firp_kernels.bitmask import pack_ancestors
from firp_kernels.ops import draft_tree, top_marginals, verify_tree


def random_tree(rng: random.Random, batch: int, num_nodes: int, kind: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    """Parents, depths [B, N] and ancestors [B, N, M]; the last nodes of some sequences are padding."""
    parents = torch.full((batch, num_nodes), -1, dtype=torch.int32)
    depths = torch.zeros(batch, num_nodes, dtype=torch.int32)
    visible = torch.eye(num_nodes, dtype=torch.bool).repeat(batch, 1, 1)
    for b in range(batch):
        for node in range(1, rng.randint(1, num_nodes)):
            parent = {"chain": node - 1, "star": 0, "random": rng.randrange(node)}[kind]
            parents[b, node] = parent
            depths[b, node] = depths[b, parent] + 1
            visible[b, node] |= visible[b, parent]
    return parents, depths, pack_ancestors(visible)


def attention_case(seed: int, dtype: torch.dtype, window: int | None) -> list:
    """Arguments of `tree_attention`; what lies after the step's rows in the cache is NaN."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, num_nodes = rng.randint(1, 3), rng.choice((1, 2, 5, 8, 33, 70))
    slots, offsets = rng.randint(0, min(num_nodes, 4)), rng.randint(1, 3)
    parents, depths, ancestors = random_tree(rng, batch, num_nodes, rng.choice(("chain", "star", "random")))
    real = (parents >= 0).sum(1).tolist()
    lookahead = torch.tensor(
        [[rng.randint(-1, real[b]) for _ in range(slots)] for b in range(batch)], dtype=torch.int32
    )
    rows = rng.choice((num_nodes, num_nodes + slots * offsets))
    kv_heads, group, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 3, 4)), rng.choice((8, 16, 64, 80, 96, 128))
    lens = torch.tensor([rng.choice((0, 1, 30, 63, 64, 65, 130, 200)) for _ in range(batch)], dtype=torch.int32)
    capacity = int(lens.max()) + rows + rng.randint(0, 5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, kv_heads * group, rows, head_dim).transpose(1, 2)
    key, value = normal(batch, capacity, kv_heads, head_dim), normal(batch, capacity, kv_heads, head_dim)
    for b, length in enumerate(lens.tolist()):
        key[b, length + rows :] = float("nan")
        value[b, length + rows :] = float("nan")
    return [query, key, value, lens, depths, ancestors, lookahead.view(batch, slots), offsets, head_dim**-0.5, window]


def shaped_attention_case(
    num_nodes: int, lens: list[int], *, slots=0, offsets=1, kv_heads=1, group=1, head_dim=16, dtype=torch.float32,
    window=None, tree="random", seed=0,
) -> list:  # fmt: skip
    """Arguments of `tree_attention` of one stated shape; dead slots are NaN."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, rows = len(lens), num_nodes + slots * offsets
    parents, depths, ancestors = random_tree(rng, batch, num_nodes, tree)
    real = (parents >= 0).sum(1).tolist()
    lookahead = torch.tensor(
        [[rng.randint(-1, real[b]) for _ in range(slots)] for b in range(batch)], dtype=torch.int32
    )

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, rows, kv_heads * group, head_dim)
    cache = normal(2, batch, max(lens) + rows + 3, kv_heads, head_dim)
    for b, length in enumerate(lens):
        cache[:, b, length + rows :] = float("nan")
    lengths = torch.tensor(lens, dtype=torch.int32)
    return [
        query,
        cache[0],
        cache[1],
        lengths,
        depths,
        ancestors,
        lookahead.view(batch, slots),
        offsets,
        head_dim**-0.5,
        window,
    ]


def draft_case(seed: int) -> list:
    """Arguments of `draft_tree`, every second time with an order, with ties and now and then a NaN."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, k, vocab = rng.randint(1, 3), rng.randint(1, 4), rng.choice((5, 17, 40))
    num_nodes = rng.choice((1, 2, 5, 9, 33, 70))
    marginals = torch.softmax(torch.randn(batch, k, vocab, generator=generator) * 3, -1)
    if rng.random() < 0.5:
        marginals = (marginals * 8).round() / 8
    top = marginals.topk(min(rng.randint(1, 6), vocab), -1)
    probabilities, order = top.values.clone(), None
    if rng.random() < 0.5:
        width = probabilities.shape[2]
        rows = torch.softmax(torch.randn(batch, k, width, width, generator=generator) * 3, -1)
        if rng.random() < 0.5:
            rows = (rows * 8).round() / 8
        ranked = rows.topk(rng.randint(1, width), -1)
        probabilities, order = ranked.values.clone(), ranked.indices.to(torch.int32)
    if rng.random() < 0.1:
        probabilities[0, 0, 0] = float("nan")
    root = torch.randint(0, vocab, (batch,), generator=generator)
    usable = torch.randint(0, k + 1, (batch,), generator=generator).to(torch.int32)
    return [probabilities, top.indices, root, usable, num_nodes, rng.randint(1, num_nodes), order]


@functools.cache
def drafted_tree(seed: int) -> tuple[torch.Tensor, ...]:
    """Tokens, parents and look-ahead of a drafted tree, which many cases verify and none writes to."""
    tokens, parents, _, _, lookahead = draft_tree.reference(*draft_case(seed))
    return tokens, parents, lookahead


def verify_case(seed: int, dtype: torch.dtype, samples: bool) -> list:
    """Arguments of `verify_tree` over a drafted tree, with ties and now and then a NaN."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, parents, lookahead = drafted_tree(seed)
    batch, num_nodes = tokens.shape
    vocab, max_depth = int(tokens.max()) + 5, rng.randint(0, 4)
    scores = torch.randn(batch, num_nodes, vocab, generator=generator).to(dtype)
    if rng.random() < 0.3:
        scores = (scores * 2).round()
    if rng.random() < 0.2:
        scores[rng.randrange(batch), rng.randrange(num_nodes), rng.randrange(vocab)] = float("nan")
    uniforms = None
    if samples:
        scores = torch.softmax(scores.float(), -1)
        uniforms = torch.rand(batch, max_depth + 1, generator=generator)
        if rng.random() < 0.3:
            scores = (scores * 4).round() / 4
    if rng.random() < 0.2:
        lookahead = lookahead[:, :0]
    return [scores, uniforms, tokens, parents, lookahead, max_depth]


def projection_case(seed: int, dtype: torch.dtype) -> list:
    """Arguments of `predictor_projection`: odd widths, no offsets or slots now and then, strided inputs."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, num_nodes, width = rng.randint(1, 3), rng.choice((1, 2, 5, 33)), rng.choice((1, 7, 16, 33, 100, 130))
    slots, offsets = rng.choice((0, 1, 2, 7, 25)), rng.choice((0, 1, 2, 3, 3))
    hidden = torch.randn(batch, num_nodes + 2, width, generator=generator).to(dtype)[:, 1:-1]
    weight = torch.randn(offsets, width, width, generator=generator).to(dtype)
    lookahead = torch.randint(-1, num_nodes, (batch, slots + 1), generator=generator, dtype=torch.int32)[:, 1:]
    if rng.random() < 0.3:
        hidden, weight = (
            hidden.transpose(1, 2).contiguous().transpose(1, 2),
            weight.transpose(1, 2).contiguous().transpose(1, 2),
        )
    return [hidden, weight, lookahead]


def lookup_case(seed: int) -> list:
    """Arguments of `lookup_branch`: few different tokens, so that texts repeat, and trees of them."""
    rng = random.Random(seed)
    batch, num_nodes, vocab = rng.randint(1, 3), rng.choice((1, 2, 7, 31, 40)), rng.choice((2, 3, 9))
    parents, depths, ancestors = random_tree(rng, batch, num_nodes)
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (batch, *shape), generator=generator)

    slots, width = rng.choice((1, 4, 30, 70)), rng.randint(1, 4)
    lens = drawn(slots).to(torch.int32)
    counts = torch.minimum(drawn(width + 1), lens + 1)
    tokens = torch.where((parents >= 0) | (torch.arange(num_nodes) == 0), drawn(vocab, num_nodes), 0)
    least = rng.randint(1, 3)
    branch = rng.choice((0, 1, 3, 8))
    sizes = branch, least, rng.randint(least, 8), rng.choice((0, min(branch, num_nodes - 1)))
    return [drawn(vocab, slots), lens, drawn(vocab, width), counts, tokens, parents, depths, ancestors, *sizes]


def layer_start_case(seed: int, dtype: torch.dtype, with_biases: bool, rows: int = 5, width: int = 12) -> list:
    """Arguments of `norm_qkv_rotary`: 2 sequences, 3 heads of queries and 1 of keys, 8 wide."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = [normal(outputs, width) for outputs in (24, 8, 8)]
    biases = [normal(len(weight)) for weight in weights] if with_biases else []
    angles = normal(2, rows, 8)
    return [normal(2, rows, width), normal(width), 1e-5, weights, biases, angles.cos(), angles.sin()]


def layer_end_case(seed: int, dtype: torch.dtype, with_bias: bool, rows: int = 5, width: int = 12) -> list:
    """Arguments of `output_norm_mlp`: 2 sequences, 3 heads 8 wide, an MLP of 21."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bias = normal(width) if with_bias else None
    mlp = [normal(21, width), normal(21, width), normal(width, 21)]
    return [normal(2, rows, 3, 8), normal(2, rows, width), normal(width, 24), bias, normal(width), 1e-5, *mlp]


def layers_case(seed: int, dtype: torch.dtype, with_biases: bool, layers: int = 2, window: int | None = None) -> list:
    """Arguments of `decoder_layers`: 2 sequences of other lengths, 3 heads of queries and 1 of keys, 8 wide; what lies
    after the step's rows in the cache is NaN."""
    lens, slots = [0, 7], 2
    _, keys, values, *tree = shaped_attention_case(
        5, lens, slots=slots, offsets=2, kv_heads=1, group=3, head_dim=8, dtype=dtype, window=window, seed=seed
    )
    rows, width = 5 + slots * 2, 12
    starts = [layer_start_case(seed + i, dtype, with_biases, rows, width) for i in range(layers)]
    ends = [layer_end_case(seed + i, dtype, with_biases, rows, width) for i in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randn(2, rows, 8, generator=generator).to(dtype)
    return [
        torch.randn(2, rows, width, generator=generator).to(dtype), angles.cos(), angles.sin(), 1e-5,
        [norm for start, end in zip(starts, ends, strict=True) for norm in (start[1], end[4])],
        [weight for start in starts for weight in start[3]], [bias for start in starts for bias in start[4]],
        [end[2] for end in ends], [end[3] for end in ends if with_biases], [part for end in ends for part in end[6:]],
        torch.stack([keys, values]).expand(layers, -1, -1, -1, -1, -1).clone(), *tree,
    ]  # fmt: skip


def example_arguments(seed: int) -> dict[str, tuple]:
    """Arguments of every op, small and in float32."""
    attention, draft = attention_case(seed, torch.float32, None), draft_case(seed)
    verify = verify_case(seed, torch.float32, seed % 2 == 1)
    query, key = attention[0], attention[1].nan_to_num()
    verified = verify_tree.reference(*verify)
    path, accepted = verified[:2]
    batch, rows = verify[2].shape
    hidden, which = torch.randn(2, 5, 8), torch.tensor([[0, 4], [2, 2]])
    marginals = top_marginals.reference(hidden, which, 3)
    written = key[:, :2].contiguous(), key[:, :2].contiguous(), key.clone(), key.clone()
    lens, done = torch.full((batch,), 2, dtype=torch.int32), torch.zeros(batch, dtype=torch.bool)
    step = key[:, : query.shape[1]].contiguous()
    turns = list(torch.randn(2, *step[:, :, 0].shape)) if seed % 2 else []
    return {
        "tree_attention": attention,
        "write_and_attend": (query, step, step.clone(), torch.stack([key, key]), *attention[3:], *turns),
        "draft_tree": draft,
        "verify_tree": verify,
        "emit_tokens": (*verified, verify[2], path[0].long(), lens, done, lens.long(), 3, 40, 50),
        "write_cache": (*written, torch.zeros(query.shape[0], dtype=torch.int32)),
        "commit_cache": (torch.randn(2, 2, batch, rows + 4, 1, 4), lens, path, accepted, done),
        "predictor_projection": (hidden, torch.randn(3, 8, 8), torch.tensor([[0, 4], [2, -1]], dtype=torch.int32)),
        "lookup_branch": lookup_case(seed),
        "keep_top_p": (hidden[0], 0.8, 1 + seed % 2, -1.0),
        "linear": (hidden, torch.randn(6, 8), torch.randn(6)),
        "joint_linear": (hidden, [torch.randn(6, 8), torch.randn(3, 8)], [torch.randn(6), torch.randn(3)]),
        "gated_linear": (hidden, torch.randn(6, 8), torch.randn(6, 8)),
        "update_states": (hidden[:, :3], hidden[:, 4], torch.randn(3, 5, 16), torch.randn(3, 5), torch.randn(3, 8, 5)),
        "rms_norm": (hidden, torch.randn(8), 1e-5),
        "norm_qkv_rotary": layer_start_case(seed, torch.float32, seed % 2 == 1),
        "output_norm_mlp": layer_end_case(seed, torch.float32, seed % 2 == 1),
        "decoder_layers": layers_case(seed, torch.float32, seed % 2 == 1),
        "top_marginals": (hidden, which, 3),
        "condition_marginals": (*marginals, torch.tensor([0, 7]), hidden[0, :1].repeat(8, 1), torch.randn(8, 8), 2),
        "rotary": (torch.randn(2, 5, 3, 8), hidden.cos(), hidden.sin()),
    }


def in_double(args: list) -> list:
    """The arguments with their floats in float64."""
    return [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]


def moved(args, device: torch.device | str) -> list:
    """The arguments with their tensors, those in lists included, on `device`; strides are kept."""

    def to_device(arg):
        if isinstance(arg, list):
            return [to_device(part) for part in arg]
        return arg.to(device) if isinstance(arg, Tensor) else arg

    return [to_device(arg) for arg in args]
