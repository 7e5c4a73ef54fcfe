"""RMS norm of few rows: within rounding of float64, row by row."""

import pytest
import torch
from implementations import on_devices, run

from firp_kernels.ops import rms_norm

IMPLEMENTATIONS = on_devices("rms_norm")


@IMPLEMENTATIONS
@pytest.mark.parametrize("width", [1, 5, 16, 33, 576, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(impl, device, dtype, width):
    generator = torch.Generator().manual_seed(width)
    rows, weight = (
        torch.randn(2, 9, width, generator=generator).to(dtype),
        torch.randn(width, generator=generator).to(dtype),
    )
    out = run("rms_norm", (rows, weight, 1e-5), impl, device)
    exact = rms_norm.reference(rows.double(), weight.double(), 1e-5)
    bound = 2**-7 if dtype == torch.bfloat16 else 2**-20
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=1e-30)
    for r in range(9):
        assert torch.equal(run("rms_norm", (rows[:, r], weight, 1e-5), impl, device), out[:, r])
    strided = torch.stack([rows, rows], -1)[..., 0]
    assert torch.equal(run("rms_norm", (strided, weight, 1e-5), impl, device), out)


@IMPLEMENTATIONS
def test_zero_and_nan_rows(impl, device):
    rows = torch.stack([torch.zeros(8), torch.full((8,), float("nan")), torch.ones(8)])
    out = run("rms_norm", (rows, torch.ones(8), 1e-5), impl, device)
    assert torch.equal(out[0], torch.zeros(8)) and out[1].isnan().all() and out[2].isfinite().all()
