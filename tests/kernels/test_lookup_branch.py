"""lookup_branch: every implementation gives the oracle's integers, and the oracle those of a search in Python."""

import torch
from cases import lookup_case, moved
from implementations import on_devices, run, seeds

from firp_kernels.bitmask import unpack_ancestors
from firp_kernels.ops import lookup_branch

IMPLEMENTATIONS = on_devices("lookup_branch")


def grown_by_a_search(
    history, context_lens, emitted, counts, tokens, parents, depths, num_branch, least, most, replaced, b
):
    """The text of sequence b, and (token, parent) and depth of each place of its tree; how many nodes were kept."""
    last = int(context_lens[b])
    count = int(counts[b])
    text = history[b, : last + 1 - count].tolist() + emitted[b, :count].tolist()
    best = (0, -1)
    for end in range(last):
        length = 0
        while length < most and length <= end and text[end - length] == text[last - length]:
            length += 1
        best = max(best, (length, end))
    given = list(zip(tokens[b].tolist(), parents[b].tolist(), strict=True))
    kept = len(given) - replaced
    nodes, levels, node = given[:kept], depths[b].tolist()[:kept], 0
    if best[0] >= least:
        loop = text[best[1] + 1 :]
        for token in (loop * num_branch)[:num_branch]:
            held = [i for i, pair in enumerate(nodes) if i and pair == (token, node)]
            if not held:
                held = [len(nodes)]
                nodes.append((token, node))
                levels.append(levels[node] + 1)
            node = held[0]
    if len(nodes) == kept:
        return text, given, depths[b].tolist(), len(given)
    return text, nodes, levels, kept


@IMPLEMENTATIONS
def test_a_search_grows_the_same(impl, device):
    for seed in seeds(160, impl, device):
        args = moved(lookup_case(seed), device)
        tokens, parents, depths, ancestors = moved(lookup_branch.lookup_branch(*args, impl=impl), "cpu")
        given = lookup_case(seed)
        seen = unpack_ancestors(ancestors, tokens.shape[1])
        for b in range(len(tokens)):
            text, nodes, levels, kept = grown_by_a_search(*given[:7], *given[8:], b)
            assert args[0][b, : len(text)].tolist() == text, seed
            assert torch.equal(args[0][b, len(text) :].cpu(), given[0][b, len(text) :]), seed
            pad = tokens.shape[1] - len(nodes)
            assert list(zip(tokens[b].tolist(), parents[b].tolist(), strict=True)) == nodes + [(0, -1)] * pad, seed
            assert depths[b].tolist() == levels + [0] * pad, seed
            old = unpack_ancestors(given[7], given[4].shape[1])[b, :kept, :kept]
            assert torch.equal(seen[b, :kept, :kept], old) and not bool(seen[b, :kept, kept:].any())
            for node in range(kept, tokens.shape[1]):
                above = set() if node >= len(nodes) else {nodes[node][1]}
                above |= {a for parent in above for a in seen[b, parent].nonzero().flatten().tolist()}
                assert set(seen[b, node].nonzero().flatten().tolist()) == above | {node}, seed


@IMPLEMENTATIONS
def test_strided_inputs(impl, device):
    for seed in seeds(16, impl, device):
        args, exact = lookup_case(seed), lookup_branch.reference(*lookup_case(seed))
        spread = [arg.repeat_interleave(2, -1)[..., ::2] if isinstance(arg, torch.Tensor) else arg for arg in args]
        for part, expected in zip(run("lookup_branch", spread, impl, device), exact, strict=True):
            assert part.dtype == expected.dtype and torch.equal(part, expected), seed


@IMPLEMENTATIONS
def test_a_branch_joins_the_nodes_there_are(impl, device):
    """After 1 2 came 3 4 5: the tree holds 3 already, under it 9."""
    history = torch.tensor([[1, 2, 3, 4, 5, 1, 0, 0]])
    tree = torch.tensor([[2, 3, 9]]), torch.tensor([[-1, 0, 1]]).int(), torch.tensor([[0, 1, 2]]).int()
    masks = torch.tensor([[[1], [3], [7]]]).int()
    args = [history, torch.tensor([6]).int(), torch.tensor([[2, -1]]), torch.tensor([1]), *tree, masks, 4, 2, 8]
    tokens, parents, depths, ancestors = run("lookup_branch", args, impl, device)
    assert tokens.tolist() == [[2, 3, 9, 4, 5, 1, 0]] and parents.tolist() == [[-1, 0, 1, 1, 3, 4, -1]]
    assert depths.tolist() == [[0, 1, 2, 2, 3, 4, 0]]
    assert ancestors.flatten().tolist() == [1, 3, 7, 0b1011, 0b11011, 0b111011, 0b1000000]


@IMPLEMENTATIONS
def test_a_branch_takes_the_place_of_the_last_nodes(impl, device):
    """After 1 2 came 3 4 5. In the tree 3 is kept, and two others make way; where nothing is added they stay."""
    history = torch.tensor([[1, 2, 3, 4, 5, 1, 0]]).repeat(3, 1)
    lens, roots = torch.tensor([6, 6, 6]).int(), torch.tensor([[2], [2], [9]])
    tokens = torch.tensor([[2, 3, 9, 8], [2, 3, 4, 8], [9, 3, 9, 8]])
    parents = torch.tensor([[-1, 0, 1, 0], [-1, 0, 1, 0], [-1, 0, 1, 0]]).int()
    depths, masks = torch.tensor([[0, 1, 2, 1]] * 3).int(), torch.tensor([[[1], [3], [7], [9]]] * 3).int()
    args = [history, lens, roots, torch.ones(3).long(), tokens, parents, depths, masks, 2, 2, 8, 2]
    tokens, parents, depths, ancestors = run("lookup_branch", args, impl, device)
    assert tokens.tolist() == [[2, 3, 4, 0], [2, 3, 4, 0], [9, 3, 9, 8]]
    assert parents.tolist() == [[-1, 0, 1, -1], [-1, 0, 1, -1], [-1, 0, 1, 0]]
    assert depths.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 1]]
    assert ancestors[..., 0].tolist() == [[1, 3, 7, 8], [1, 3, 7, 8], [1, 3, 7, 9]]


@IMPLEMENTATIONS
def test_a_long_text(impl, device):
    """Matches of 3, 5 and 5 tokens, far apart and over a border of blocks: the latest of the longest counts."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(100, 50_000, (2, 2600), generator=generator)
    for b, last in enumerate((2500, 1023)):
        root = torch.tensor([1, 2, 3, 4, 5])
        for end, length in ((200, 5), (1022 if b == 0 else 700, 5), (last - 20, 3), (last, 5)):
            history[b, end - length + 1 : end + 1] = root[-length:]
    zeros = torch.zeros(2, 1, dtype=torch.int32)
    args = [history, torch.tensor([2500, 1023]).int(), torch.full((2, 1), 5), torch.ones(2).long()]
    args += [torch.full((2, 1), 5), zeros - 1, zeros, torch.ones(2, 1, 1).int(), 6, 2, 8]
    tokens = run("lookup_branch", args, impl, device)[0]
    assert tokens[0].tolist() == [5, *history[0, 1023:1029].tolist()]
    assert tokens[1].tolist() == [5, *history[1, 701:707].tolist()]
