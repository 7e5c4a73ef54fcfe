"""Layers in one call: the bits, and the cache, of the ops that it stands for."""

import pytest
import torch
from cases import layers_case, moved, shaped_attention_case
from implementations import on_devices

import firp_kernels as kernels

IMPLEMENTATIONS = on_devices("decoder_layers")


def in_parts(args, impl):
    hidden, cos, sin, eps, norms, projections, biases, outputs, output_biases, mlps, cache, *tree = args
    for i, layer_cache in enumerate(cache):
        three = slice(3 * i, 3 * i + 3)
        start = norms[2 * i], eps, projections[three], biases[three], cos, sin
        parts = [len(weight) // layer_cache.shape[-1] for weight in projections[three]]
        heads = kernels.norm_qkv_rotary(hidden, *start, impl=impl).split(parts, 2)
        attended = kernels.write_and_attend(*heads, layer_cache, *tree, impl=impl)
        bias = output_biases[i] if output_biases else None
        end = outputs[i], bias, norms[2 * i + 1], eps, *mlps[three]
        hidden = kernels.output_norm_mlp(attended, hidden, *end, impl=impl)
    return hidden


def equal(args, impl):
    """Whether the op gives the bits of its parts, and leaves the cache as they do."""
    apart = [*args[:10], args[10].clone(), *args[11:]]
    out = kernels.decoder_layers(*args, impl=impl)
    assert out.shape == args[0].shape and out.dtype == args[0].dtype
    assert torch.equal(out, in_parts(apart, impl)) and not out.isnan().any()
    return torch.equal(args[10].nan_to_num(-1.0), apart[10].nan_to_num(-1.0))


@IMPLEMENTATIONS
@pytest.mark.parametrize("with_biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("layers, window", [(1, None), (3, None), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_the_parts(impl, device, dtype, layers, window, with_biases):
    args = moved(layers_case(layers, dtype, with_biases, layers, window), device)
    input = args[0].clone()
    assert equal(args, impl)
    assert torch.equal(args[0], input)


@IMPLEMENTATIONS
def test_node_rows_alone(impl, device):
    """Rows of the nodes without pseudo rows, as below the insertion layer; angles are parts of longer ones."""
    args = layers_case(5, torch.float32, True)
    args[:3] = [part[:, :5] for part in args[:3]]
    assert equal(moved(args, device), impl)


@IMPLEMENTATIONS
def test_strided_arguments(impl, device):
    args = layers_case(1, torch.float32, True)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[1:3] = [part.repeat_interleave(2, 2)[..., ::2] for part in args[1:3]]
    args[5] = [weight.T.contiguous().T for weight in args[5]]
    args[11] = args[11].repeat_interleave(2)[::2]
    assert equal(args, impl)


@IMPLEMENTATIONS
def test_no_layers_are_a_copy(impl, device):
    args = layers_case(0, torch.float32, False)
    args[4:10], args[10] = [[]] * 6, args[10][:0]
    out = kernels.decoder_layers(*args, impl=impl)
    assert torch.equal(out, args[0]) and out.data_ptr() != args[0].data_ptr()


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_other_shapes(impl, device, dtype):
    """Other heads of queries and another MLP in each, weights and norms that are not dense, and a part of a cache."""
    rows, width, head_dim, generator = 9, 12, 8, torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def strided(*shape):
        return normal(*shape[::-1]).mT if len(shape) == 2 else normal(2 * shape[0])[::2]

    _, keys, values, *tree = shaped_attention_case(
        5, [0, 7], slots=2, offsets=2, kv_heads=2, group=1, head_dim=head_dim, dtype=dtype, window=None, seed=3
    )
    norms, projections, biases, outputs, output_biases, mlps = [], [], [], [], [], []
    for heads, wide in ((2, 40), (6, 21), (4, 33)):
        norms += strided(width), strided(width)
        projections += [strided(heads_of * head_dim, width) for heads_of in (heads, 2, 2)]
        biases += [strided(heads_of * head_dim) for heads_of in (heads, 2, 2)]
        outputs.append(strided(width, heads * head_dim))
        output_biases.append(strided(width))
        mlps += strided(wide, width), strided(wide, width), strided(width, wide)
    slots = keys.shape[1]
    larger = torch.full((6, 2, 2, slots + 3, 4, head_dim), torch.nan, dtype=dtype)
    cache = larger[::2, :, :, 2:-1, 1:3]
    cache.copy_(torch.stack([keys, values]).expand(3, -1, -1, -1, -1, -1))
    angles = normal(2, rows, head_dim)
    args = [normal(2, rows, width), angles.cos(), angles.sin(), 1e-5]
    args += [norms, projections, biases, outputs, output_biases, mlps, cache, *tree]
    assert equal(moved(args, device) if device != "cpu" else args, impl)
    assert larger[1::2].isnan().all() and larger[:, :, :, :2].isnan().all() and larger[..., 0, :].isnan().all()
