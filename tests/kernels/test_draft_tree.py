"""draft_tree: every implementation gives the integers of the oracle, and the oracle those of an exhaustive search."""

import torch
from cases import draft_case, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_devices

import firp_kernels as kernels
from firp_kernels.ops import draft_tree

IMPLEMENTATIONS = on_devices("draft_tree")


@IMPLEMENTATIONS
def test_equals_the_oracle(impl, device):
    for seed in range(200):
        args = draft_case(seed)
        for out, exact in zip(
            kernels.draft_tree(*moved(args, device), impl=impl), draft_tree.reference(*args), strict=True
        ):
            assert out.device.type == device and torch.equal(out.cpu(), exact), seed


@IMPLEMENTATIONS
def test_strided_inputs(impl, device):
    for seed in range(8):
        args = draft_case(seed)
        strided = [torch.stack([t, t], -1)[..., 0] if torch.is_tensor(t) else t for t in args]
        for out, same in zip(
            kernels.draft_tree(*moved(strided, device), impl=impl), draft_tree.reference(*args), strict=True
        ):
            assert torch.equal(out.cpu(), same), seed


@IMPLEMENTATIONS
def test_children_follow_their_own_parent(impl, device):
    """After candidate 0 comes 1 for sure, after 1 comes 0 or 2, after 2 nothing."""
    first = [[0.6, 0.4], [0.0, 0.0], [0.0, 0.0]]
    probabilities = torch.tensor([[first, [[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]]])
    order = torch.tensor([[[[1, 2], [0, 0], [0, 0]], [[1, 0], [0, 2], [0, 1]]]], dtype=torch.int32)
    candidates = torch.tensor([[[10, 11, 12], [20, 21, 22]]])
    root, usable = torch.tensor([9]), torch.tensor([2], dtype=torch.int32)
    tokens, parents, *_ = kernels.draft_tree(
        *moved([probabilities, candidates, root, usable], device), 6, 2, order.to(device), impl=impl
    )
    # The root's children are candidates 1 (0.6) and 2 (0.4); 1 has 20 and 22 (0.3 each), 2 has none.
    assert tokens.tolist() == [[9, 11, 12, 20, 22, 0]] and parents.tolist() == [[-1, 0, 0, 1, 1, -1]]


@IMPLEMENTATIONS
def test_the_largest_tree(impl, device):
    """All 256 nodes, every node a lookahead node, from nearly flat marginals: the deepest ties and all mask words."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (
        (torch.rand(2, 5, 9, generator=generator) * 4).round().div(4).clamp(min=0.25).sort(-1, descending=True).values
    )
    args = [
        probabilities,
        torch.arange(90).view(2, 5, 9),
        torch.tensor([1, 2]),
        torch.tensor([5, 3], dtype=torch.int32),
        256,
        256,
    ]
    for out, exact in zip(
        kernels.draft_tree(*moved(args, device), impl=impl), draft_tree.reference(*args), strict=True
    ):
        assert torch.equal(out.cpu(), exact)


@IMPLEMENTATIONS
def test_nothing_to_draft_from(impl, device):
    """Without usable offsets, and with marginals that are not numbers, the root stays alone."""
    probabilities = torch.tensor([[[0.9, 0.1]], [[float("nan"), 0.1]], [[0.0, 0.0]]])
    args = [
        probabilities,
        torch.ones(3, 1, 2, dtype=torch.long),
        torch.tensor([3, 4, 5]),
        torch.tensor([0, 1, 1], dtype=torch.int32),
        3,
        2,
    ]
    tokens, parents, depths, ancestors, lookahead = (
        out.cpu() for out in kernels.draft_tree(*moved(args, device), impl=impl)
    )
    assert tokens.tolist() == [[3, 0, 0], [4, 0, 0], [5, 0, 0]]
    assert parents.tolist() == [[-1, -1, -1]] * 3 and depths.tolist() == [[0, 0, 0]] * 3
    assert ancestors.tolist() == [[[1], [2], [4]]] * 3 and lookahead.tolist() == [[0, -1]] * 3


def searched(probabilities, num_nodes):
    """The reaches of the best `num_nodes` nodes of the whole product tree, in float32, in decreasing order."""
    level, reaches = torch.ones(1), [torch.ones(1)]
    for marginal in probabilities:
        level = (level[:, None] * marginal).flatten()
        reaches.append(level)
    best = torch.cat(reaches).sort(descending=True).values
    return best[best > 0][:num_nodes]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))
def test_best_first_finds_the_best_nodes(seed, k, ranks, num_nodes):
    """Growing one child at a time reaches as much as choosing among all rank paths at once."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(2 * torch.randn(1, k, ranks + 2, generator=generator), -1).topk(ranks, -1).values
    candidates = torch.arange(ranks).expand(1, k, ranks).contiguous()
    usable = torch.tensor([k], dtype=torch.int32)
    tokens, parents, depths, _, _ = kernels.draft_tree(
        probabilities, candidates, torch.zeros(1, dtype=torch.long), usable, num_nodes, 1
    )
    best = searched(probabilities[0], num_nodes)
    reach = torch.ones(num_nodes)
    for node in range(1, len(best)):
        parent = int(parents[0, node])
        assert 0 <= parent < node and depths[0, node] == depths[0, parent] + 1
        reach[node] = reach[parent] * probabilities[0, depths[0, parent], tokens[0, node]]
    assert torch.equal(reach[: len(best)], best)
    assert bool((parents[0, len(best) :] == -1).all())
