"""Several linears over the same rows at once: the bits of `linear`, side by side."""

import pytest
import torch
from implementations import on_devices, run

IMPLEMENTATIONS = on_devices("joint_linear")
OUTPUTS = [(64,), (12, 4, 4), (7, 33, 1, 130), (0, 5)]


@IMPLEMENTATIONS
@pytest.mark.parametrize("with_biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
@pytest.mark.parametrize("width", [5, 64, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_linear(impl, device, dtype, width, outputs, with_biases):
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights, rows = [normal(count, width) for count in outputs], normal(40, width)
    biases = [normal(count) for count in outputs] if with_biases else []
    pairs = list(zip(weights, biases or [None] * len(weights), strict=True))
    for count in (*range(1, 10), 22, 23, 24, 25, 40):
        expected = torch.cat([run("linear", (rows[:count], *pair), impl, device) for pair in pairs], -1)
        out = run("joint_linear", (rows[:count], weights, biases), impl, device)
        assert out.dtype == dtype and out.is_contiguous() and torch.equal(out, expected)
    assert torch.equal(
        run("joint_linear", (rows.view(2, 20, width), weights, biases), impl, device).flatten(0, 1), expected
    )
    assert run("joint_linear", (rows[:0], weights, biases), impl, device).shape == (0, sum(outputs))


@IMPLEMENTATIONS
def test_strided_arguments(impl, device):
    generator = torch.Generator().manual_seed(0)
    wide, rows = torch.randn(3, 24, 40, generator=generator), torch.randn(6, 40, generator=generator)
    weights = [wide[0, :, ::2], wide[1, ::2, :20], wide[2].T[:20, :20]]
    biases = [torch.randn(2 * len(weight), generator=generator)[::2] for weight in weights]
    expected = [run("linear", (rows[:, ::2], *pair), impl, device) for pair in zip(weights, biases, strict=True)]
    assert torch.equal(run("joint_linear", (rows[:, ::2], weights, biases), impl, device), torch.cat(expected, -1))
