"""silu(x @ gate.T) * (x @ up.T): within rounding of float64, and a row's bits do not depend on the other rows."""

import pytest
import torch
from implementations import available, on_devices, run

from firp_kernels.ops import gated_linear

IMPLEMENTATIONS = on_devices("gated_linear")


@IMPLEMENTATIONS
@pytest.mark.parametrize("width, outputs", [(5, 7), (64, 10), (577, 33), (576, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_linear(impl, device, dtype, width, outputs):
    generator = torch.Generator().manual_seed(width)
    gate, up = (torch.randn(outputs, width, generator=generator).mul_(width**-0.5).to(dtype) for _ in range(2))
    rows = torch.randn(40, width, generator=generator).to(dtype)
    out = run("gated_linear", (rows, gate, up), impl, device)
    exact = gated_linear.reference(rows.double(), gate.double(), up.double())
    bound = 2**-6 if dtype == torch.bfloat16 else 2**-18
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)
    if impl == "extension":
        for count in range(1, 41):
            assert torch.equal(run("gated_linear", (rows[:count], gate, up), impl, device), out[:count])
        assert torch.equal(
            run("gated_linear", (rows.view(2, 20, width), gate, up), impl, device), out.view(2, 20, outputs)
        )


@pytest.mark.skipif(("extension", "cpu") not in available("gated_linear"), reason="the C++ extension is not built")
@pytest.mark.parametrize("width, outputs", [(96, 1700), (1030, 261), (1600, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(dtype, width, outputs):
    """Blocks of rows and outputs are gated one by one, and no row can tell."""
    generator = torch.Generator().manual_seed(width)
    gate, up = (torch.randn(outputs, width, generator=generator).mul_(width**-0.5).to(dtype) for _ in range(2))
    rows = torch.randn(300, width, generator=generator).to(dtype)
    out = run("gated_linear", (rows, gate, up), "extension", "cpu")
    for first in range(0, 300, 20):
        some = slice(first, first + 1 + first // 20)
        assert torch.equal(run("gated_linear", (rows[some], gate, up), "extension", "cpu"), out[some])


@IMPLEMENTATIONS
def test_far_values(impl, device):
    """silu far from zero is the identity or nothing, and NaN stays in its row."""
    rows = torch.tensor([[200.0], [-200.0], [0.0], [float("nan")]])
    out = run("gated_linear", (rows, torch.ones(1, 1), torch.ones(1, 1)), impl, device)
    assert out[0] == 200.0 * 200.0 and out[1].abs() < 1e-30 and out[2] == 0 and out[3].isnan()


def test_roundings_are_those_of_the_module():
    """In bfloat16, silu and the product round as the separate torch calls do."""
    generator = torch.Generator().manual_seed(0)
    rows, gate, up = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((6, 64), (96, 64), (96, 64)))
    for impl, device in available("gated_linear"):
        products = [run("linear", (rows, weight), impl, device) for weight in (gate, up)]
        expected = torch.nn.functional.silu(products[0]) * products[1]
        assert torch.equal(run("gated_linear", (rows, gate, up), impl, device), expected)
