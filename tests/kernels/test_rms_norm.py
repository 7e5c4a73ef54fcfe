"""RMS norm of few rows: within rounding of float64, row by row."""

import pytest
import torch
from test_implementations import implementations

import firp_kernels as kernels
from firp_kernels import reference


@pytest.mark.parametrize("impl", implementations("rms_norm"))
@pytest.mark.parametrize("width", [1, 5, 16, 33, 576, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(impl, dtype, width):
    generator = torch.Generator().manual_seed(width)
    rows, weight = torch.randn(2, 9, width, generator=generator).to(dtype), torch.randn(width, generator=generator).to(dtype)
    out = kernels.rms_norm(rows, weight, 1e-5, impl=impl)
    exact = reference.rms_norm(rows.double(), weight.double(), 1e-5)
    bound = 2**-7 if dtype == torch.bfloat16 else 2**-20
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=1e-30)
    for r in range(9):
        assert torch.equal(kernels.rms_norm(rows[:, r], weight, 1e-5, impl=impl), out[:, r])
    strided = torch.stack([rows, rows], -1)[..., 0]
    assert torch.equal(kernels.rms_norm(strided, weight, 1e-5, impl=impl), out)


@pytest.mark.parametrize("impl", implementations("rms_norm"))
def test_zero_and_nan_rows(impl):
    rows = torch.stack([torch.zeros(8), torch.full((8,), float("nan")), torch.ones(8)])
    out = kernels.rms_norm(rows, torch.ones(8), 1e-5, impl=impl)
    assert torch.equal(out[0], torch.zeros(8)) and out[1].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize("impl", implementations("add_rms_norm"))
@pytest.mark.parametrize("width", [1, 5, 16, 33, 576, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_rms_norm(impl, dtype, width):
    """The bits of torch's addition, then of `rms_norm`, for any number of rows."""
    generator = torch.Generator().manual_seed(width)
    hidden, residual, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((20, width), (20, width), (width,)))
    for count in range(21):
        total, normed = kernels.add_rms_norm(hidden[:count], residual[:count], weight, 1e-5, impl=impl)
        assert torch.equal(total, residual[:count] + hidden[:count])
        assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-5, impl=impl))
    strided = torch.stack([hidden, residual], -1)
    again = kernels.add_rms_norm(strided[..., 0], strided[..., 1], weight, 1e-5, impl=impl)
    assert torch.equal(again[0], total) and torch.equal(again[1], normed)
    hidden[1, 0] = float("nan")
    poisoned = kernels.add_rms_norm(hidden, residual, weight, 1e-5, impl=impl)[1]
    assert poisoned[1].isnan().all() and torch.equal(poisoned[2:], normed[2:])
