"""Ops whose rows or outputs are shared out among threads: the bits of one thread, with more rows than one takes."""

import pytest
import torch
from cases import layer_end_case, layer_start_case, layers_case

import firp_kernels as kernels
from firp_kernels import registry

pytestmark = pytest.mark.skipif(registry.load_extension()[0] is None, reason="the C++ extension is not built")
ROWS = 70


def normal(seed, *shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(dtype):
    return [normal(seed, 192, 100, dtype=dtype) for seed in (1, 2)]


CALLS = {
    "linear": lambda dtype: kernels.linear(normal(0, ROWS, 100, dtype=dtype), weights(dtype)[0]),
    "joint_linear": lambda dtype: kernels.joint_linear(normal(0, ROWS, 100, dtype=dtype), weights(dtype), []),
    "gated_linear": lambda dtype: kernels.gated_linear(normal(0, ROWS, 100, dtype=dtype), *weights(dtype)),
    "output_norm_mlp": lambda dtype: kernels.output_norm_mlp(*layer_end_case(1, dtype, True, ROWS, 96)),
    "norm_qkv_rotary": lambda dtype: kernels.norm_qkv_rotary(*layer_start_case(1, dtype, True, ROWS, 96)),
    "decoder_layers": lambda dtype: kernels.decoder_layers(*layers_case(3, dtype, True, 2, None)),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: f"extension-{dtype}")
@pytest.mark.parametrize("op", CALLS)
def test_the_bits_of_one_thread(op, dtype, threads):
    threads(1)
    alone = CALLS[op](dtype)
    assert not alone.isnan().any()
    for number in (2, 3):
        threads(number)
        assert torch.equal(CALLS[op](dtype), alone), number
