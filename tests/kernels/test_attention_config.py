"""Splits, tiles and launches of the tree attention kernel: exact for any, and within an architecture's limits."""

import pytest
import torch
from cases import in_double, moved
from cases import shaped_attention_case as case
from implementations import ATTENTION_TOLERANCE, TRITON_DEVICE, run
from triton.runtime import interpreter

import firp_kernels as kernels
from firp_kernels.ops import tree_attention
from firp_kernels.triton import arrivals
from firp_kernels.triton import tree_attention as module
from firp_kernels.triton.attention_config import launch_config, split_count
from firp_kernels.triton.attention_join import joins_in_place

# Triton's interpreter multiplies bfloat16 wrongly; there it is covered by compiling.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (TRITON_DEVICE == "cuda")
# NaN is what is tested; numpy, under the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def attend(args):
    return run("tree_attention", args, "triton", TRITON_DEVICE)


def assert_exact(args):
    exact = tree_attention.reference(*in_double(moved(args, TRITON_DEVICE))).cpu()
    torch.testing.assert_close(attend(args).double(), exact, rtol=0, atol=ATTENTION_TOLERANCE[args[0].dtype])


@pytest.mark.parametrize(("splits", "in_place"), [(1, True), (2, True), (5, True), (17, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits(monkeypatch, poisoned_outputs, pytestconfig, dtype, splits, in_place):
    """Context and tree cut anywhere, down to splits that are empty for a short sequence."""
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    monkeypatch.setattr(module, "joins_in_place", lambda *_: in_place)
    slow = dtype == torch.float32 and TRITON_DEVICE == "cpu"
    if slow and splits in (1, 5) and not pytestconfig.getoption("exhaustive"):
        pytest.skip("small tiles, ten times as long in the interpreter: --exhaustive")
    args = case(40 if splits < 5 else 9, [0, 3, 200], slots=2, offsets=3, group=2, dtype=dtype)
    # Scores of very different size in different splits: a join that forgets to weigh them is far off.
    args[1][2, :64] *= 4
    assert_exact(args)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [90, 200, 332, 333, 334, 1000])
def test_a_window_over_unmasked_blocks(monkeypatch, poisoned_outputs, dtype, window, splits):
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    args = case(6, [333, 64], slots=3, offsets=2, dtype=dtype, window=window, tree="chain")
    assert_exact(args)


@pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="a GPU chooses the order itself")
@pytest.mark.parametrize("splits", [5])
def test_whoever_comes_last_joins_in_the_same_order(monkeypatch, poisoned_outputs, splits):
    """Programs in reversed and in mixed order, and a second launch that joins, give the bits of the usual order; the
    counters are left at zero."""
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    counters = []
    take = module.take_arrivals
    monkeypatch.setattr(module, "take_arrivals", lambda *args: counters.append(take(*args)) or counters[-1])
    args = case(9, [0, 3, 200], slots=2, offsets=3, group=2)
    usual = attend(args)
    builder = interpreter.interpreter_builder
    place = type(builder).set_grid_idx
    orders = (lambda i, n: n - 1 - i), (lambda i, n: (i + n // 2) % n)
    for order in orders:
        reorder = lambda x, y, z, order=order: place(builder, order(x, builder.grid_dim[0]), y, z)  # noqa: E731
        monkeypatch.setattr(builder, "set_grid_idx", reorder, raising=False)
        assert torch.equal(attend(args), usual)
    assert len(counters) == 3 and not any(part.any() for part in counters)
    monkeypatch.setattr(module, "joins_in_place", lambda *_: False)
    assert torch.equal(attend(args), usual) and len(counters) == 3


def test_few_bytes_are_joined_in_place():
    """One row of any model, two splits of 64 rows; not a whole tile of 128 rows."""
    assert joins_in_place(32, 4, 128) and joins_in_place(2, 64, 128) and not joins_in_place(2, 128, 128)


def test_arrivals_are_not_shared_between_what_may_run_at_once(monkeypatch):
    """Launches of a stream share counters; each captured launch has its own, aligned, and keeps them."""
    made = arrivals.Arrivals(torch.device("cpu"))
    assert made.take(3).data_ptr() == made.take(2).data_ptr() and not made.take(700).any()
    made._slabs.append(made._zeros(arrivals.SLAB))
    first, second = made._take_for_graph(5), made._take_for_graph(5)
    assert (len(first), len(second)) == (5, 5) and second.data_ptr() - first.data_ptr() == 32
    inside = range(made._slabs[-1].data_ptr(), made._slabs[-1].data_ptr() + 4 * arrivals.SLAB)
    assert first.data_ptr() in inside and made._take_for_graph(arrivals.SLAB).data_ptr() not in inside


class Counted:
    """A kernel that notes the grids it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize(("splits", "in_place"), [(1, False), (4, True), (4, False)])
def test_launches_depend_on_shapes_alone(monkeypatch, splits, in_place):
    monkeypatch.setattr(module, "split_count", lambda *_: splits)
    monkeypatch.setattr(module, "joins_in_place", lambda *_: in_place)
    kernel, join = Counted(module.tree_attention_kernel), Counted(module.join_splits_kernel)
    monkeypatch.setattr(module, "tree_attention_kernel", kernel)
    monkeypatch.setattr(module, "join_splits_kernel", join)
    args = case(4, [100, 3], slots=1, offsets=2)
    for lens in ([0, 0], [100, 64]):
        attend([*args[:3], torch.tensor(lens, dtype=torch.int32), *args[4:]])
    assert len(kernel.grids) == 2 and len(set(kernel.grids)) == 1
    assert len(join.grids) == (2 if splits > 1 and not in_place else 0) and len(set(join.grids)) <= 1


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_configurations_fit(capability):
    limit = {80: 163, 86: 99, 90: 227, 100: 227}[capability] * 1024
    for element_size in (2, 4):
        for head_dim in (8, 64, 80, 96, 128, 256):
            for packed_rows in (1, 16, 33, 64, 65, 128, 2000):
                config = launch_config(packed_rows, head_dim, element_size, capability)
                block_m, block_n, block_d = (config.tile[f"BLOCK_{axis}"] for axis in "MND")
                assert block_m >= 16 and block_n % 32 == 0 and block_d >= head_dim
                blocks = config.num_stages - (element_size == 2 and (capability < 90 or block_m < 64))
                taken = block_m * block_d + 2 * max(blocks, 1) * block_n * block_d
                assert config.resident * taken * element_size <= limit or config.num_stages == 1


def test_split_counts():
    """LLaMA-2-7B and 13B and Llama-3-8B at one row: few waves, nearly full; no split with less than two blocks."""
    config = launch_config(1, 128, 2, 90)
    places = config.resident * 132
    for kv_heads in (32, 40, 8):
        for context in (4096, 16384, 131072):
            splits = split_count(kv_heads, context // config.tile["BLOCK_N"], config, 132)
            programs = kv_heads * splits
            assert programs >= 0.75 * places * -(-programs // places) and programs <= 2 * places
    assert split_count(32, 3, config, 132) == 1
    assert split_count(32 * 64, 64, config, 132) <= 2
    assert all(split_count(1, blocks, config, 132) <= max(blocks // 2, 1) for blocks in range(1, 200))
    for packed_rows in (48, 96, 384):  # trees of 16, 32 and 128 rows in a half-filled cache of 512 slots
        assert split_count(3, 6, launch_config(packed_rows, 64, 2, 90), 132) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads, group, context", [(32, 1, 4096), (40, 1, 1000), (8, 4, 20000)])
@pytest.mark.parametrize("num_nodes, slots", [(1, 0), (8, 8), (64, 0), (64, 20)])
def test_model_shapes_on_a_gpu(dtype, kv_heads, group, context, num_nodes, slots):
    for lens, window in (([context], None), ([context, 77], 4096)):
        shape = {"slots": slots, "offsets": 3, "kv_heads": kv_heads, "group": group, "head_dim": 128}
        assert_exact(case(num_nodes, lens, dtype=dtype, window=window, **shape))


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    """One graph holds for every length that the cache holds."""
    args = moved(
        case(8, [900, 30], slots=4, offsets=3, kv_heads=4, group=2, head_dim=128, dtype=torch.bfloat16), "cuda"
    )
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
    args = moved(case(8, [900], slots=4, offsets=3, kv_heads=4, head_dim=128, dtype=torch.float16), "cuda")
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


@pytest.mark.gpu
def test_graphs_replay_side_by_side():
    """Two graphs captured on one stream and replayed on two: neither counts the other's programs."""
    made, held = [], []  # a graph keeps the addresses of what it reads, not the tensors
    for seed in range(2):
        args = case(64, [6000], slots=8, offsets=3, kv_heads=8, head_dim=128, dtype=torch.bfloat16, seed=seed)
        args = moved(args, "cuda")
        expected, graph = kernels.tree_attention(*args), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [kernels.tree_attention(*args) for _ in range(20)]
        made.append((expected, graph, outs, torch.cuda.Stream()))
        held.append(args)
    torch.cuda.synchronize()
    for _ in range(50):
        for _, graph, _, stream in made:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for expected, _, outs, _ in made for out in outs)
