"""Rotary embedding in place: the bits of Hugging Face's own function."""

import pytest
import torch
from cases import moved
from implementations import on_devices
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import firp_kernels as kernels


@on_devices("rotary")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80])
def test_rotary(impl, device, dtype, head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    angles = torch.randn(2, 5, head_dim // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    fused = torch.randn(2, 5, 7, head_dim, generator=generator).to(dtype)
    before = fused.clone()
    rows = fused[:, :, 1:4]
    expected, _ = apply_rotary_pos_emb(rows.transpose(1, 2), rows.transpose(1, 2), cos, sin)
    fused, cos, sin = moved((fused, cos, sin), device)
    kernels.rotary(fused[:, :, 1:4], cos, sin, impl=impl)
    fused = fused.cpu()
    assert torch.equal(fused[:, :, 1:4], expected.transpose(1, 2))
    assert torch.equal(fused[:, :, :1], before[:, :, :1]) and torch.equal(fused[:, :, 4:], before[:, :, 4:])
