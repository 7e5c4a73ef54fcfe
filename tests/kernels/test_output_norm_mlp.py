"""What a layer does after its attention, in one call: the bits of the ops it stands for."""

import pytest
import torch
from cases import layer_end_case
from implementations import on_devices, run

IMPLEMENTATIONS = on_devices("output_norm_mlp")


def in_parts(args, impl, device):
    attended, residual, output, bias, norm, eps, gate, up, down = args
    hidden = residual + run("linear", (attended.flatten(2), output, bias), impl, device)
    wide = run("gated_linear", (run("rms_norm", (hidden, norm, eps), impl, device), gate, up), impl, device)
    return hidden + run("linear", (wide, down, None), impl, device)


@IMPLEMENTATIONS
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("width", [5, 64, 577])
@pytest.mark.parametrize("rows", [0, 1, 7, 40, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_the_parts(impl, device, dtype, rows, width, with_bias):
    args = layer_end_case(width, dtype, with_bias, rows, width)
    before = [tensor.clone() for tensor in args[:2]]
    out = run("output_norm_mlp", args, impl, device)
    assert out.shape == (2, rows, width) and out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out, in_parts(args, impl, device))
    assert all(torch.equal(*pair) for pair in zip(before, args[:2], strict=True))


@IMPLEMENTATIONS
def test_strided_arguments(impl, device):
    dense = layer_end_case(1, torch.float32, True, 6, 10)

    def strided(arg):
        if not isinstance(arg, torch.Tensor):
            return arg
        return arg.repeat_interleave(2, -1)[..., ::2] if arg.dim() == 1 else arg.mT.contiguous().mT

    args = [strided(arg) for arg in dense]
    assert torch.equal(run("output_norm_mlp", args, impl, device), in_parts(args, impl, device))
