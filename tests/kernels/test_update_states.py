"""Updated states: within rounding of float64, row by row."""

import pytest
import torch
from implementations import on_devices, run

from firp_kernels.ops import update_states

IMPLEMENTATIONS = on_devices("update_states")


def case(batch, offsets, width, inner, dtype):
    generator = torch.Generator().manual_seed(width + inner)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    states, first = 5 * normal(batch, offsets, width), normal(batch, width)
    inputs = normal(offsets, inner, 2 * width) * (2 * width) ** -0.5
    outputs = normal(offsets, width, inner) * inner**-0.5
    return [part.to(dtype) for part in (states, first, inputs, normal(offsets, inner), outputs)]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "batch, offsets, width, inner", [(1, 1, 8, 4), (3, 2, 33, 5), (2, 3, 64, 130), (1, 3, 576, 512)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_updated(impl, device, dtype, batch, offsets, width, inner):
    args = case(batch, offsets, width, inner, dtype)
    out = run("update_states", args, impl, device)
    exact = update_states.reference(*(part.double() for part in args))
    assert out.dtype == dtype
    # States are of size 5: what is added and the sum are rounded.
    bound = 0.15 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=bound)
    states, first, *weights = args
    for b in range(batch):
        alone = run("update_states", [states[b : b + 1], first[b : b + 1], *weights], impl, device)
        torch.testing.assert_close(alone[0], out[b], rtol=0, atol=0 if impl == "extension" else bound)
    strided = [torch.stack([part, part], -1)[..., 0] for part in args]
    again = run("update_states", strided, impl, device)
    torch.testing.assert_close(again, out, rtol=0, atol=0 if impl == "extension" else bound)


@IMPLEMENTATIONS
def test_zero_states_and_nan_stay_in_their_row(impl, device):
    states, first, *weights = case(3, 2, 16, 8, torch.float32)
    states[0], states[1] = 0.0, float("nan")
    out = run("update_states", [states, first, *weights], impl, device)
    assert torch.equal(out[0], torch.zeros(2, 16)) and out[1].isnan().all() and out[2].isfinite().all()


@IMPLEMENTATIONS
def test_no_sequences_and_no_offsets(impl, device):
    states, first, *weights = case(2, 2, 16, 8, torch.float32)
    assert run("update_states", [states[:0], first[:0], *weights], impl, device).shape == (0, 2, 16)
    none = [states[:, :0], first, *(part[:0] for part in weights)]
    assert run("update_states", none, impl, device).shape == (2, 0, 16)
