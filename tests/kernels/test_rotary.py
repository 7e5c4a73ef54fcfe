"""Rotary embedding in place: the bits of Hugging Face's own function."""

import pytest
import torch
from test_implementations import implementations
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import firp_kernels as kernels


@pytest.mark.parametrize("impl", implementations("rotary"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 8, 64, 80])
def test_rotary(impl, dtype, width):
    generator = torch.Generator().manual_seed(width)
    angles = torch.randn(2, 5, width // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    fused = torch.randn(2, 5, 7, width, generator=generator).to(dtype)
    before = fused.clone()
    rows = fused[:, :, 1:4]
    expected, _ = apply_rotary_pos_emb(rows.transpose(1, 2), rows.transpose(1, 2), cos, sin)
    kernels.rotary(rows, cos, sin, impl=impl)
    assert torch.equal(rows, expected.transpose(1, 2))
    assert torch.equal(fused[:, :, :1], before[:, :, :1]) and torch.equal(fused[:, :, 4:], before[:, :, 4:])
