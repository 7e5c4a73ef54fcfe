"""The Triton kernel of tree_attention against the oracle in float64: in the interpreter, or on a GPU where there is one."""

import random

import pytest
import torch
from cases import attention_case, moved, random_tree
from hypothesis import given, settings
from hypothesis import strategies as st

import firp_kernels as kernels
from firp_kernels import reference
from firp_kernels.triton import tree_attention as module
from firp_kernels.triton.attention_config import attention_config, split_count

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly; there it is covered by compiling.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# NaN and infinity are what is tested; numpy, under the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
NAMES = ["query", "key_cache", "value_cache", "context_lens", "depths", "ancestors", "lookahead", "num_offsets", "scale", "window"]


def case(num_nodes, lens, *, slots=0, offsets=1, kv_heads=1, group=1, width=16, dtype=torch.float32, window=None, tree="random", seed=0):
    """Arguments of one stated shape; dead slots are NaN."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, rows = len(lens), num_nodes + slots * offsets
    parents, depths, ancestors = random_tree(rng, batch, num_nodes, tree)
    real = (parents >= 0).sum(1).tolist()
    lookahead = torch.tensor([[rng.randint(-1, real[b]) for _ in range(slots)] for b in range(batch)], dtype=torch.int32)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, rows, kv_heads * group, width)
    cache = normal(2, batch, max(lens) + rows + 3, kv_heads, width)
    for b, length in enumerate(lens):
        cache[:, b, length + rows :] = float("nan")
    lengths = torch.tensor(lens, dtype=torch.int32)
    return [query, cache[0], cache[1], lengths, depths, ancestors, lookahead.view(batch, slots), offsets, width**-0.5, window]


def run(args):
    return kernels.tree_attention(*moved(args, DEVICE), impl="triton").cpu()


def assert_exact(out, args):
    exact = reference.tree_attention(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args))
    assert out.dtype == args[0].dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=TOLERANCE[out.dtype])


def with_splits(monkeypatch, splits):
    monkeypatch.setattr(module, "split_count", lambda *_: splits)


@pytest.mark.parametrize("window", [None, 1, 3, 40, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_cases(poisoned_outputs, dtype, window):
    for seed in range(8):
        args = attention_case(seed, dtype, window)
        assert_exact(run(args), args)


@given(seed=st.integers(8, 10**6), window=st.one_of(st.none(), st.integers(1, 250)), dtype=st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_case(seed, window, dtype):
    args = attention_case(seed, dtype, window)
    assert_exact(run(args), args)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits(monkeypatch, poisoned_outputs, dtype, splits):
    """Context and tree cut anywhere, down to splits that are empty for a short sequence."""
    with_splits(monkeypatch, splits)
    args = case(40, [0, 3, 200], slots=5, offsets=3, group=2, dtype=dtype)
    # Scores of very different size in different splits: a join that forgets to weigh them is far off.
    args[1][2, :64] *= 4
    assert_exact(run(args), args)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [90, 200, 332, 333, 334, 1000])
def test_a_window_over_unmasked_blocks(monkeypatch, poisoned_outputs, dtype, window, splits):
    with_splits(monkeypatch, splits)
    args = case(6, [333, 64], slots=3, offsets=2, dtype=dtype, window=window, tree="chain")
    assert_exact(run(args), args)


@pytest.mark.parametrize("group", [1, 5, 8])
@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_groups(poisoned_outputs, dtype, width, group):
    for num_nodes, slots in ((1, 0), (1, 1), (7, 2)):
        args = case(num_nodes, [70, 5], slots=slots, offsets=2, kv_heads=2, group=group, width=width, dtype=dtype)
        assert_exact(run(args), args)


@pytest.mark.parametrize("tree", ["chain", "star", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_trees(poisoned_outputs, dtype, tree):
    """Several mask words and several tiles of rows, chains of pseudo rows across a tile's edge."""
    for num_nodes, slots, offsets, group in ((256, 0, 1, 1), (65, 21, 3, 3), (256, 40, 3, 1))[: 2 if dtype == torch.float32 else 3]:
        args = case(num_nodes, [45], slots=slots, offsets=offsets, group=group, dtype=dtype, tree=tree)
        assert_exact(run(args), args)


@pytest.mark.parametrize("window", [None, 4])
def test_strides(window):
    """Any strides of the inputs, the same bits: transposed, every second element, a layer's slice of a whole cache."""
    args = case(9, [67, 2], slots=2, offsets=3, kv_heads=2, group=2, window=window)
    expected = run(args)
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
            assert torch.equal(run(changed), expected), name
    for name in ("context_lens", "depths", "ancestors", "lookahead"):
        changed = list(args)
        changed[NAMES.index(name)] = torch.stack([args[NAMES.index(name)]] * 2, -1)[..., 0]
        assert torch.equal(run(changed), expected), name


@pytest.mark.parametrize("window", [None, 50])
def test_a_branch_equals_a_plain_chain(window):
    """Every root-to-node branch, rerun as causal attention of its own rows."""
    for seed in range(3):
        args = case(12, [0, 37, 64], kv_heads=2, group=2, window=window, seed=seed)
        out = run(args)
        query, key, value, lens, _, ancestors = args[:6]
        seen = reference.unpack_ancestors(ancestors, 12)
        for b, length in enumerate(lens.tolist()):
            for node in range(12):
                branch = seen[b, node].nonzero().flatten()
                slots = torch.cat([torch.arange(length), length + branch])
                keys, values = (cache[b, slots].double().repeat_interleave(2, 1).transpose(0, 1) for cache in (key, value))
                rows = query[b, branch].double().transpose(0, 1)
                position = torch.arange(len(slots))
                own = position[length:, None]
                mask = (position <= own) & (position > own - (window or 10**6))
                chain = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
                torch.testing.assert_close(out[b, branch].double(), chain.transpose(0, 1), rtol=0, atol=3e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_node_rows_do_not_depend_on_pseudo_rows(monkeypatch, dtype, splits):
    with_splits(monkeypatch, splits)
    args = case(5, [30, 64, 0], slots=4, offsets=3, group=2, dtype=dtype)
    expected = run(args)[:, :5]
    for content in (0.0, 5.0, float("inf"), float("-inf"), float("nan")):
        changed = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        changed[0][:, 5:] = content
        for b, length in enumerate((30, 64, 0)):
            changed[1][b, length + 5 :] = content
            changed[2][b, length + 5 :] = content
        assert torch.equal(run(changed)[:, :5], expected), content


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [None, 6])
def test_what_a_row_does_not_see_never_reaches_it(window, poison):
    """One poisoned key or value: exactly the rows that see it change, and they turn NaN."""
    num_nodes, slots, offsets, length = 7, 3, 2, 40
    args = case(num_nodes, [length], slots=slots, offsets=offsets, window=window)
    args[6] = torch.tensor([[0, -1, 1]], dtype=torch.int32)
    expected = run(args)
    rows = num_nodes + slots * offsets
    probe = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
    probe[2][:] = 0
    for cache in (1, 2):
        for slot in (length - 1, length - 20, *range(length, length + rows + 3)):
            # Who sees a slot, by the oracle: a value of one there shows in the output.
            probe[2][:, slot] = 1
            sees = reference.tree_attention(*probe)[0].ne(0).any(-1).any(-1)
            probe[2][:, slot] = 0
            changed = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
            changed[cache][0, slot, 0, 3] = poison if cache == 2 else float("nan")
            out = run(changed)
            assert torch.equal(out[0, ~sees], expected[0, ~sees]), slot
            assert bool(out[0, sees].isnan().any(-1).all()) or slot < length, slot
            assert not bool(out[0, sees].isfinite().all(-1).any()), slot


def test_padding_rows_are_finite():
    args = case(9, [20, 0], slots=3, offsets=2, tree="star")
    args[6].fill_(-1)
    out = run(args)
    assert bool(out.isfinite().all())
    assert_exact(out, args)


def test_offsets_past_32_bits():
    """A sequence of the batch that lies more than 2**31 elements behind the first one."""
    args = case(3, [5, 40], slots=1, offsets=2, dtype=torch.float16)
    apart = 2**31 + 160
    far = torch.empty(apart + 2 * args[1][0].numel(), dtype=torch.float16)
    strided = [far.as_strided(args[1].shape, (apart, 32, 16, 1)), far.as_strided(args[1].shape, (apart, 32, 16, 1), 16)]
    strided[0].copy_(args[1])
    strided[1].copy_(args[2])
    assert torch.equal(run([args[0], *strided, *args[3:]]), run(args))


class Counted:
    """A kernel that notes the grids it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("splits", [1, 4])
def test_launches_depend_on_shapes_alone(monkeypatch, splits):
    with_splits(monkeypatch, splits)
    attend, join = Counted(module.tree_attention_kernel), Counted(module.join_splits_kernel)
    monkeypatch.setattr(module, "tree_attention_kernel", attend)
    monkeypatch.setattr(module, "join_splits_kernel", join)
    args = case(4, [100, 3], slots=1, offsets=2)
    for lens in ([0, 0], [100, 64]):
        run([*args[:3], torch.tensor(lens, dtype=torch.int32), *args[4:]])
    assert len(attend.grids) == 2 and len(set(attend.grids)) == 1
    assert len(join.grids) == (2 if splits > 1 else 0) and len(set(join.grids)) <= 1


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_configurations_fit(capability):
    limit = {80: 163, 86: 99, 90: 227, 100: 227}[capability] * 1024
    for element_size in (2, 4):
        for width in (8, 64, 80, 96, 128, 256):
            for packed_rows in (1, 16, 33, 64, 65, 128, 2000):
                config = attention_config(packed_rows, width, element_size, capability)
                assert config.block_m >= 16 and config.block_n % 32 == 0 and config.block_d >= width
                blocks = config.num_stages - (element_size == 2 and (capability < 90 or config.block_m < 64))
                taken = config.block_m * config.block_d + 2 * max(blocks, 1) * config.block_n * config.block_d
                assert config.resident * taken * element_size <= limit or config.num_stages == 1


def test_split_counts():
    """LLaMA-2-7B and 13B and Llama-3-8B at one row: few waves, nearly full; no split with less than two blocks."""
    config = attention_config(1, 128, 2, 90)
    places = config.resident * 132
    for kv_heads in (32, 40, 8):
        for context in (4096, 16384, 131072):
            splits = split_count(kv_heads, context // config.block_n, config, 132)
            programs = kv_heads * splits
            assert programs >= 0.75 * places * -(-programs // places) and programs <= 2 * places
    assert split_count(32, 3, config, 132) == 1
    assert split_count(32 * 64, 64, config, 132) <= 2
    assert all(split_count(1, blocks, config, 132) <= max(blocks // 2, 1) for blocks in range(1, 200))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads, group, context", [(32, 1, 4096), (40, 1, 1000), (8, 4, 20000)])
@pytest.mark.parametrize("num_nodes, slots", [(1, 0), (8, 8), (64, 0), (64, 20)])
def test_model_shapes_on_a_gpu(dtype, kv_heads, group, context, num_nodes, slots):
    for lens, window in (([context], None), ([context, 77], 4096)):
        args = moved(case(num_nodes, lens, slots=slots, offsets=3, kv_heads=kv_heads, group=group, width=128, dtype=dtype, window=window), "cuda")
        assert_exact(kernels.tree_attention(*args), args)


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    """One graph serves every length that the cache holds."""
    args = moved(case(8, [900, 30], slots=4, offsets=3, kv_heads=4, group=2, width=128, dtype=torch.bfloat16), "cuda")
    kernels.tree_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.tree_attention(*args)
    args[1].nan_to_num_()
    args[2].nan_to_num_()
    for lens in ((900, 30), (0, 899), (64, 1)):
        args[3].copy_(torch.tensor(lens))
        graph.replay()
        assert torch.equal(out, kernels.tree_attention(*args))


@pytest.mark.gpu
def test_a_stream_of_its_own():
    args = moved(case(8, [900], slots=4, offsets=3, kv_heads=4, width=128, dtype=torch.float16), "cuda")
    expected, query = kernels.tree_attention(*args), args[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        args[0].zero_()
        torch.cuda._sleep(10_000_000)
        args[0].copy_(query)
        out = kernels.tree_attention(*args)
    stream.synchronize()
    assert torch.equal(out, expected)
