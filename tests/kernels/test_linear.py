"""Few rows times one weight: within rounding of float64, and a row's bits do not depend on the other rows."""

import pytest
import torch
from implementations import on_devices, run


@on_devices("linear")
@pytest.mark.parametrize("width, outputs", [(5, 7), (64, 10), (576, 64), (577, 33), (1536, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(impl, device, dtype, width, outputs):
    generator = torch.Generator().manual_seed(width)
    shapes = (outputs, width), (outputs,), (40, width)
    weight, bias, rows = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    out = run("linear", (rows, weight, bias), impl, device)
    exact = rows.double() @ weight.double().T + bias.double()
    bound = (2**-8 if dtype == torch.bfloat16 else 2**-21) * (rows.double().abs() @ weight.double().abs().T + 1)
    assert bool(((out.double() - exact).abs() <= bound).all())
    if impl == "extension":
        for count in range(41):
            assert torch.equal(run("linear", (rows[:count], weight, bias), impl, device), out[:count])
        strided = torch.stack([rows, rows], 1)[:, 0]
        assert torch.equal(run("linear", (strided, weight, bias), impl, device), out)
