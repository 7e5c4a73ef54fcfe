"""tree_attention: every implementation against the oracle in float64; what a row sees, and what never reaches it."""

import implementations
import pytest
import torch
from cases import attention_case, in_double, moved
from cases import shaped_attention_case as case
from hypothesis import given, settings
from hypothesis import strategies as st

import firp_kernels as kernels
from firp_kernels.bitmask import unpack_ancestors
from firp_kernels.ops import tree_attention
from firp_kernels.triton import tree_attention as module

DEVICE = implementations.TRITON_DEVICE
EXTENSION = ("extension", "cpu")
IMPLEMENTATIONS = implementations.on_devices("tree_attention")
# Triton's interpreter multiplies bfloat16 wrongly; there it is covered by compiling.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = implementations.ATTENTION_TOLERANCE
# NaN and infinity are what is tested; numpy, under the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
NAMES = [
    "query",
    "key_cache",
    "value_cache",
    "context_lens",
    "depths",
    "ancestors",
    "lookahead",
    "num_offsets",
    "scale",
    "window",
]


def run(args, impl="triton", device=DEVICE):
    return implementations.run("tree_attention", args, impl, device)


def assert_exact(out, args):
    exact = tree_attention.reference(*in_double(args))
    assert out.dtype == args[0].dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=TOLERANCE[out.dtype])


@pytest.mark.parametrize(
    "window, expected",
    [
        (None, ["11 100 00", "11 110 00", "11 101 00", "11 110 10", "11 110 11"]),
        (2, ["01 100 00", "00 110 00", "00 101 00", "00 010 10", "00 000 11"]),
    ],
)
def test_the_mask_of_a_small_tree(window, expected):
    """A root with two children and two pseudo rows of node 1, after a context of 2, or of 3 in the second sequence."""
    lens, depths = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([[0, 1, 1]] * 2, dtype=torch.int32)
    ancestors, lookahead = torch.tensor([[[1], [3], [5]]] * 2, dtype=torch.int32), torch.ones(2, 1, dtype=torch.int32)
    mask = tree_attention.tree_mask(lens, depths, ancestors, lookahead, 2, 5, window)
    wanted = torch.tensor([[int(bit) for bit in row.replace(" ", "")] for row in expected]).bool()
    assert torch.equal(mask[0, :, :7], wanted) and not mask[0, :, 7].any()
    assert torch.equal(mask[1, :, 1:], wanted) and bool(mask[1, :, 0].eq(window is None).all())


@pytest.mark.parametrize("window", [None, 1, 3, 40, 100])
@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_random_cases(poisoned_outputs, impl, device, dtype, window):
    if impl == "triton" and dtype not in DTYPES:
        pytest.skip("not a dtype of the kernel here")
    for seed in implementations.seeds(24, impl, device):
        args = attention_case(seed, dtype, window)
        assert_exact(run(args, impl, device), args)


@pytest.mark.parametrize("window", [None, 1, 3, 40, 100])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_fallback(dtype, window):
    """What a CPU without the extension runs."""
    for seed in range(12):
        args = attention_case(seed, dtype, window)
        assert_exact(tree_attention.fallback(*args), args)


@given(seed=st.integers(8, 10**6), window=st.one_of(st.none(), st.integers(1, 250)), dtype=st.sampled_from(DTYPES))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_case(seed, window, dtype):
    args = attention_case(seed, dtype, window)
    for impl, device in implementations.available("tree_attention"):
        assert_exact(run(args, impl, device), args)


GROUPS, WIDTHS = (1, 5, 8), (8, 64, 80, 96, 128, 256)


@IMPLEMENTATIONS
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_groups(poisoned_outputs, pytestconfig, dtype, head_dim, group, impl, device):
    """In the interpreter each pair of the three meets, all of them with --exhaustive."""
    place = DTYPES.index(dtype) + WIDTHS.index(head_dim) + GROUPS.index(group)
    if (impl, device) == ("triton", "cpu") and place % 3 and not pytestconfig.getoption("exhaustive"):
        pytest.skip("--exhaustive")
    for num_nodes, slots, lens in ((1, 1, [5]), (7, 2, [70])):
        args = case(num_nodes, lens, slots=slots, offsets=2, kv_heads=2, group=group, head_dim=head_dim, dtype=dtype)
        assert_exact(run(args, impl, device), args)


@IMPLEMENTATIONS
@pytest.mark.parametrize("tree", ["chain", "star", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_trees(poisoned_outputs, pytestconfig, dtype, tree, impl, device):
    """Several mask words and several tiles of rows, chains of pseudo rows across a tile's edge."""
    shapes = [(65, 21, 3, 3), (256, 0, 1, 1), (256, 40, 3, 1)]
    # Tiles of float32 are small: the interpreter takes ten times as long.
    slow = (impl, device) == ("triton", "cpu") and dtype == torch.float32
    if slow and tree != "random" and not pytestconfig.getoption("exhaustive"):
        pytest.skip("--exhaustive")
    for num_nodes, slots, offsets, group in shapes[:1] if dtype == torch.float32 else shapes:
        args = case(num_nodes, [45], slots=slots, offsets=offsets, group=group, dtype=dtype, tree=tree)
        assert_exact(run(args, impl, device), args)


@IMPLEMENTATIONS
@pytest.mark.parametrize("window", [None, 4])
def test_strides(window, impl, device, pytestconfig):
    """Any strides of the inputs, the same bits: transposed, every second element, a layer's slice of a whole cache."""
    if (impl, device, window) == ("triton", "cpu", None) and not pytestconfig.getoption("exhaustive"):
        pytest.skip("--exhaustive")
    args = case(9, [67, 2], slots=2, offsets=3, kv_heads=2, group=2, window=window)
    expected = run(args, impl, device)
    query, key, value = args[:3]
    layouts = {
        "query": [query.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([query, query], -1)[..., 0]],
        "key_cache": [torch.stack([key, key], -1)[..., 1], key.transpose(1, 2).contiguous().transpose(1, 2)],
        "value_cache": [torch.stack([key, value], 0)[1], torch.stack([value, value], 3)[:, :, :, 0]],
    }
    for name, others in layouts.items():
        for other in others:
            changed = list(args)
            changed[NAMES.index(name)] = other
            assert torch.equal(run(changed, impl, device), expected), name
    for name in ("context_lens", "depths", "ancestors", "lookahead"):
        changed = list(args)
        changed[NAMES.index(name)] = torch.stack([args[NAMES.index(name)]] * 2, -1)[..., 0]
        assert torch.equal(run(changed, impl, device), expected), name


@IMPLEMENTATIONS
@pytest.mark.parametrize("window", [None, 50])
def test_a_branch_equals_a_plain_chain(window, impl, device):
    """Every root-to-node branch, rerun as causal attention of its own rows."""
    for seed in implementations.seeds(3, impl, device):
        args = case(12, [0, 37, 64], kv_heads=2, group=2, window=window, seed=seed)
        out = run(args, impl, device)
        query, key, value, lens, _, ancestors = args[:6]
        seen = unpack_ancestors(ancestors, 12)
        for b, length in enumerate(lens.tolist()):
            for node in range(12):
                branch = seen[b, node].nonzero().flatten()
                slots = torch.cat([torch.arange(length), length + branch])
                keys, values = (
                    cache[b, slots].double().repeat_interleave(2, 1).transpose(0, 1) for cache in (key, value)
                )
                rows = query[b, branch].double().transpose(0, 1)
                position = torch.arange(len(slots))
                own = position[length:, None]
                mask = (position <= own) & (position > own - (window or 10**6))
                chain = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
                torch.testing.assert_close(
                    out[b, branch].double(), chain.transpose(0, 1), rtol=0, atol=TOLERANCE[torch.float32]
                )


@IMPLEMENTATIONS
def test_a_node_sees_the_context_and_its_ancestors(impl, device):
    """Every node row in float64 as a softmax over the slots of its branch; float64 is not a dtype of the kernel."""
    if impl == "triton":
        pytest.skip("no float64")
    for seed in range(6):
        args = attention_case(seed, torch.float64, None)
        query, key, value, lens, depths, ancestors, lookahead, k, scale, _ = args
        num_nodes, group = depths.shape[1], query.shape[2] // key.shape[2]
        out = run([query[:, :num_nodes], key, value, lens, depths, ancestors, lookahead, k, scale], impl, device)
        seen = unpack_ancestors(ancestors, num_nodes)
        for b, length in enumerate(lens.tolist()):
            for node in range(num_nodes):
                slots = list(range(length)) + [length + a for a in range(num_nodes) if seen[b, node, a]]
                keys = key[b, slots].repeat_interleave(group, 1)
                values = value[b, slots].repeat_interleave(group, 1)
                weights = torch.softmax(torch.einsum("hd,shd->hs", query[b, node], keys) * scale, -1)
                torch.testing.assert_close(
                    out[b, node], torch.einsum("hs,shd->hd", weights, values), rtol=0, atol=1e-12
                )


@pytest.mark.skipif(
    EXTENSION not in implementations.available("tree_attention"), reason="the C++ extension is not built"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_tree(dtype):
    """A chain decoded as one tree equals the chain decoded token by token, bit for bit."""
    generator = torch.Generator().manual_seed(5)
    for length in (0, 3, 60, 64, 127):
        key, value = (torch.randn(1, length + 8, 2, 64, generator=generator).to(dtype) for _ in range(2))
        query = torch.randn(1, 8, 6, 64, generator=generator).to(dtype)
        chain = torch.arange(8, dtype=torch.int32)[None]
        mask = torch.tensor([[(2 << i) - 1 for i in range(8)]], dtype=torch.int32)[..., None]
        none = torch.empty(1, 0, dtype=torch.int32)
        lens = torch.tensor([length], dtype=torch.int32)
        tree = kernels.tree_attention(query, key, value, lens, chain, mask, none, 1, 0.125)
        for i in range(8):
            row = query[:, i : i + 1], key, value, lens + i, chain[:, :1], mask[:, :1], none, 1, 0.125
            assert torch.equal(kernels.tree_attention(*row)[:, 0], tree[:, i]), (length, i)


@IMPLEMENTATIONS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_node_rows_do_not_depend_on_pseudo_rows(monkeypatch, pytestconfig, dtype, splits, impl, device):
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    args = case(5, [30, 64, 0], slots=4, offsets=3, group=2, dtype=dtype)
    expected = run(args, impl, device)[:, :5]
    contents = 5.0, float("-inf"), float("nan"), 0.0, float("inf")
    some = (impl, device) == ("triton", "cpu") and not pytestconfig.getoption("exhaustive")
    for content in contents[:3] if some else contents:
        changed = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        changed[0][:, 5:] = content
        for b, length in enumerate((30, 64, 0)):
            changed[1][b, length + 5 :] = content
            changed[2][b, length + 5 :] = content
        assert torch.equal(run(changed, impl, device)[:, :5], expected), content


@IMPLEMENTATIONS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [None, 6])
def test_what_a_row_does_not_see_never_reaches_it(window, poison, impl, device):
    """One poisoned key or value: exactly the rows that see it change, and they are no longer finite."""
    num_nodes, slots, offsets, length = 7, 3, 2, 40
    args = case(num_nodes, [length], slots=slots, offsets=offsets, window=window)
    args[6] = torch.tensor([[0, -1, 1]], dtype=torch.int32)
    expected = run(args, impl, device)
    rows = num_nodes + slots * offsets
    probe = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
    probe[2][:] = 0
    for cache in (1, 2):
        for slot in (length - 1, length - 20, *range(length, length + rows + 3)):
            # Who sees a slot, by the oracle: a value of one there shows in the output.
            probe[2][:, slot] = 1
            sees = tree_attention.reference(*probe)[0].ne(0).any(-1).any(-1)
            probe[2][:, slot] = 0
            changed = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
            changed[cache][0, slot, 0, 3] = poison if cache == 2 else float("nan")
            out = run(changed, impl, device)
            assert torch.equal(out[0, ~sees], expected[0, ~sees]), slot
            # In the extension an infinite value stays infinite.
            stays = slot < length or (impl == "extension" and poison == float("inf"))
            assert stays or bool(out[0, sees].isnan().any(-1).all()), slot
            assert not bool(out[0, sees].isfinite().all(-1).any()), slot


@IMPLEMENTATIONS
def test_padding_rows_are_finite(impl, device):
    args = case(9, [20, 0], slots=3, offsets=2, tree="star")
    args[6].fill_(-1)
    out = run(args, impl, device)
    assert bool(out.isfinite().all())
    assert_exact(out, args)


def test_offsets_past_32_bits():
    """A sequence of the batch that lies more than 2**31 elements after the first one."""
    args = case(3, [5, 40], slots=1, offsets=2, dtype=torch.float16)
    apart = 2**31 + 160
    # Made where it is used: a copy to another device would pack it.
    far = torch.empty(apart + 2 * args[1][0].numel(), dtype=torch.float16, device=DEVICE)
    strided = [far.as_strided(args[1].shape, (apart, 32, 16, 1)), far.as_strided(args[1].shape, (apart, 32, 16, 1), 16)]
    strided[0].copy_(args[1])
    strided[1].copy_(args[2])
    distant = moved([args[0], *strided, *args[3:]], DEVICE)
    assert distant[1].stride(0) == distant[2].stride(0) == apart
    assert torch.equal(run(distant), run(args))
