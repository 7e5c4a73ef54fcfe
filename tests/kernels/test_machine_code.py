"""The rules of machine code: which kernels they are for, and that a broken one is named."""

from types import SimpleNamespace

import pytest

from firp_kernels.triton import machine_code
from firp_kernels.triton.variants import Variant

COPY, MMA, WIDE = "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "HMMA.16816.F32.BF16 R4, R8", "HGMMA.64x64x16.F32.BF16 R24"
SMALL_COPY, SPILL = "LDGSTS.E [R1], [R2.64]", "STL [R1], R4"


def faults(monkeypatch, code, kernel="tree_attention_kernel", dtype="bf16", capability=90, **tile):
    monkeypatch.setattr(machine_code, "listing", lambda compiled: "\n".join(code))
    tile = tile or {"BLOCK_M": 16}
    function = SimpleNamespace(__name__=kernel, arg_names=list(tile))
    constants = {(place,): value for place, value in enumerate(tile.values())}
    op = "verify_tree" if kernel == "walk_kernel" else "tree_attention"
    return machine_code.faults(op, Variant(function, {"out": f"*{dtype}"}, constants, {}, {}), None, capability)


@pytest.mark.parametrize("capability, rows, code", [(80, 64, MMA), (90, 16, MMA), (90, 64, WIDE), (100, 16, MMA)])
def test_good_code_has_no_fault(monkeypatch, capability, rows, code):
    assert not faults(monkeypatch, [COPY, code], capability=capability, BLOCK_M=rows)
    assert not faults(monkeypatch, [COPY.replace("128", "LTC128B.128"), code], capability=capability, BLOCK_M=rows)


def test_what_is_missing_is_named(monkeypatch):
    assert faults(monkeypatch, [SMALL_COPY, MMA]) == ["no asynchronous copy of 16 bytes"]
    assert faults(monkeypatch, [COPY, "FFMA R1"]) == ["no matrix instruction"]
    assert faults(monkeypatch, [COPY, MMA], BLOCK_M=64) == ["no matrix instruction of a warp group"]
    assert faults(monkeypatch, [COPY, MMA, SPILL]) == ["loads or stores local memory"]
    assert faults(monkeypatch, ["ld.local.u32 %r1, [%r2];"], "walk_kernel") == ["loads or stores local memory"]


def test_what_no_rule_is_for(monkeypatch):
    assert not faults(monkeypatch, [SPILL], dtype="fp32")
    assert not faults(monkeypatch, [SPILL], "write_cache_kernel")
    unaligned = {"BLOCK_O": 32, "WIDTH": 577}
    assert not faults(monkeypatch, [SMALL_COPY, MMA], "predictor_projection_kernel", **unaligned)
    assert faults(monkeypatch, [SMALL_COPY, MMA], "predictor_projection_kernel", **{**unaligned, "WIDTH": 576})


def test_ptx_says_the_same(monkeypatch):
    copy, product = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "mma.sync.aligned.m16n8k16.row"
    assert not faults(monkeypatch, [copy, product])
    assert faults(monkeypatch, [copy.replace("0x10", "0x4"), product]) == ["no asynchronous copy of 16 bytes"]
    assert not faults(monkeypatch, [copy, "tcgen05.mma.cta_group::1.kind::f16"], capability=100, BLOCK_M=128)
