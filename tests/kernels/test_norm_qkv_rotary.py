"""What a layer does before its attention, in one call: the bits of the ops it stands for."""

import pytest
import torch
from cases import layer_start_case
from implementations import on_devices, run

import firp_kernels

IMPLEMENTATIONS = on_devices("norm_qkv_rotary")


def in_parts(args, impl, device):
    input, norm, eps, weights, biases, cos, sin = args
    joint = run("joint_linear", (run("rms_norm", (input, norm, eps), impl, device), weights, biases), impl, device)
    heads = joint.unflatten(-1, (-1, cos.shape[-1]))
    query, key, value = heads.split([weight.shape[0] // cos.shape[-1] for weight in weights], 2)
    for rows in (query, key):
        firp_kernels.rotary(rows, cos, sin, impl=impl)
    return torch.cat([query, key, value], 2)


@IMPLEMENTATIONS
@pytest.mark.parametrize("with_biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("width", [5, 64, 577])
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_the_parts(impl, device, dtype, rows, width, with_biases):
    args = layer_start_case(width, dtype, with_biases, rows, width)
    before = [tensor.clone() for tensor in (args[0], args[5], args[6])]
    out = run("norm_qkv_rotary", args, impl, device)
    assert out.shape == (2, rows, 5, 8) and out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out, in_parts(args, impl, device))
    assert all(torch.equal(*pair) for pair in zip(before, (args[0], args[5], args[6]), strict=True))


@IMPLEMENTATIONS
def test_strided_arguments(impl, device):
    input, norm, eps, weights, biases, cos, sin = layer_start_case(1, torch.float32, True, 6, 10)
    strided = [
        input.transpose(0, 1).contiguous().transpose(0, 1), norm.repeat_interleave(2)[::2], eps,
        [weight.T.contiguous().T for weight in weights], [bias.repeat_interleave(3)[::3] for bias in biases],
        cos.repeat_interleave(2, 1)[:, ::2], sin.repeat_interleave(2, 2)[..., ::2],
    ]  # fmt: skip
    assert torch.equal(run("norm_qkv_rotary", strided, impl, device), in_parts(strided, impl, device))
