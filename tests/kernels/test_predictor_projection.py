"""predictor_projection: every implementation against float64, and the kernel's own corners."""

import implementations
import pytest
import torch
from cases import moved, projection_case
from hypothesis import given, settings
from hypothesis import strategies as st

import firp_kernels as kernels
from firp_kernels.ops import predictor_projection

IMPLEMENTATIONS = implementations.on_devices("predictor_projection")
# Half a unit in the last place, and the smallest step of the type: rounding of the result. Products are in float32.
ROUNDING = {torch.float16: (2**-11, 2**-25), torch.bfloat16: (2**-8, 0.0), torch.float32: (2**-24, 0.0)}


def run(args, impl="triton", device=implementations.TRITON_DEVICE):
    return implementations.run("predictor_projection", args, impl, device)


def assert_exact_within_rounding(out, hidden, weight, lookahead):
    exact = predictor_projection.reference(hidden.double(), weight.double(), lookahead)
    magnitude = predictor_projection.reference(hidden.double().abs(), weight.double().abs(), lookahead)
    relative, absolute = ROUNDING[out.dtype]
    assert out.shape == exact.shape and out.dtype == hidden.dtype and out.is_contiguous()
    assert bool(((out.double() - exact).abs() <= relative * exact.abs() + 2**-20 * magnitude + absolute).all())
    assert torch.equal(out[:, : hidden.shape[1]], hidden)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_random_cases(impl, device, dtype):
    for seed in implementations.seeds(24, impl, device):
        args = projection_case(seed, dtype)
        assert_exact_within_rounding(run(args, impl, device), *args)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu():
    for seed in range(24):
        args = projection_case(seed, torch.bfloat16)
        assert_exact_within_rounding(run(args), *args)


@pytest.mark.parametrize("slots", [1, 20, 50, 90], ids=lambda slots: f"{2 * slots}rows")
def test_every_tiling(slots):
    """Row counts up to 16, 64, 128 and more have tile sizes of their own; the last takes two tiles of rows."""
    generator = torch.Generator().manual_seed(slots)
    for dtype in (torch.float16, torch.float32):
        hidden = torch.randn(2, 9, 144, generator=generator).to(dtype)
        weight = torch.randn(2, 144, 144, generator=generator).to(dtype)
        lookahead = torch.randint(-1, 9, (2, slots), generator=generator, dtype=torch.int32)
        assert_exact_within_rounding(run([hidden, weight, lookahead]), hidden, weight, lookahead)


def test_the_demo_models_shape():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, 8, 576, generator=generator), torch.randn(3, 576, 576, generator=generator) * 0.04
    lookahead = torch.tensor([[0, 5]], dtype=torch.int32)
    assert_exact_within_rounding(run([hidden, weight, lookahead]), hidden, weight, lookahead)


@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_whole_numbers_are_exact(data):
    """Sums of small whole numbers do not round, in any order: kernel and oracle agree bit for bit."""
    batch, num_nodes, width = (data.draw(st.integers(1, most)) for most in (3, 6, 40))
    slots, offsets = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from((torch.float16, torch.float32)))
    hidden = torch.randint(-4, 5, (batch, num_nodes, width), generator=generator).to(dtype)
    weight = torch.randint(-4, 5, (offsets, width, width), generator=generator).to(dtype)
    lookahead = torch.randint(-1, num_nodes, (batch, slots), generator=generator, dtype=torch.int32)
    assert torch.equal(run([hidden, weight, lookahead]), predictor_projection.reference(hidden, weight, lookahead))


@IMPLEMENTATIONS
def test_slots_and_offsets_are_in_order(impl, device):
    """Row N + p*k + j - 1 is weight[j] times the node of slot p."""
    hidden = torch.arange(1.0, 5.0)[None, :, None].expand(1, 4, 16)
    weight = torch.stack([torch.eye(16) * factor for factor in (10.0, 100.0, 1000.0)])
    lookahead = torch.tensor([[2, -1, 0]], dtype=torch.int32)
    out = run([hidden, weight, lookahead], impl, device)
    assert out[0, :, 3].tolist() == [1, 2, 3, 4, 30, 300, 3000, 0, 0, 0, 10, 100, 1000]


@IMPLEMENTATIONS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_empty_slots_are_zero_whatever_the_weight_holds(impl, device, poison):
    hidden = torch.ones(2, 3, 20)
    out = run(
        [hidden, torch.full((2, 20, 20), poison), torch.tensor([[-1, 0], [1, -1]], dtype=torch.int32)], impl, device
    )
    pseudo = out[:, 3:].unflatten(1, (2, 2))
    assert bool((pseudo[0, 0] == 0).all()) and bool((pseudo[1, 1] == 0).all())
    assert not bool(pseudo[0, 1].isfinite().any()) and not bool(pseudo[1, 0].isfinite().any())


@IMPLEMENTATIONS
def test_a_nan_row_stays_with_its_slots(impl, device):
    hidden = torch.ones(1, 3, 20)
    hidden[0, 1] = float("nan")
    out = run([hidden, torch.ones(2, 20, 20), torch.tensor([[0, 1, 2]], dtype=torch.int32)], impl, device)
    pseudo = out[:, 3:].unflatten(1, (3, 2))
    assert bool(pseudo[0, 1].isnan().all()) and bool((pseudo[0, [0, 2]] == 20).all())
    assert torch.equal(out[0, :3].isnan(), hidden[0].isnan())


def test_every_output_is_written(poisoned_outputs):
    for seed in range(8):
        assert not bool(run(projection_case(seed, torch.float32)).isnan().any()), seed


def test_float64_is_refused():
    with pytest.raises(TypeError, match="hidden: got dtype"):
        run(projection_case(3, torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width, slots", [(4096, 16), (5120, 64), (576, 100), (577, 3)])
def test_model_shapes_on_a_gpu(dtype, width, slots):
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(1, 64, width, generator=generator).to(dtype)
    weight = (torch.randn(3, width, width, generator=generator) * width**-0.5).to(dtype)
    lookahead = torch.randint(-1, 64, (1, slots), generator=generator, dtype=torch.int32)
    assert_exact_within_rounding(run([hidden, weight, lookahead]), hidden, weight, lookahead)


@pytest.mark.gpu
def test_graph_replay_equals_eager():
    args, others = (moved(projection_case(seed, torch.bfloat16), "cuda") for seed in (4, 4))
    kernels.predictor_projection(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.predictor_projection(*args)
    args[0].mul_(-2)
    graph.replay()
    assert torch.equal(out, kernels.predictor_projection(others[0] * -2, others[1], others[2]))
