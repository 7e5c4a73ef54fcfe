"""What keeps an engine from capturing its steps is named before a capture."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from firp.engine.graphs import STEP_OPS, make_runner
from firp.tools.ranks import ALONE

from firp_kernels import registry


def view_of(device="cuda:1", dtype=torch.bfloat16, **config):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, config=SimpleNamespace(**config), ranks=ALONE)


@pytest.mark.parametrize(
    ("experts", "dtype", "capability", "captures"),
    [
        (None, torch.bfloat16, (9, 0), False),
        ("eager", torch.bfloat16, (9, 0), False),
        ("sonicmoe", torch.bfloat16, (9, 0), False),
        ("batched_mm", torch.float32, (8, 0), True),
        ("grouped_mm", torch.bfloat16, (9, 0), True),
        ("grouped_mm", torch.bfloat16, (10, 0), True),
        ("grouped_mm", torch.bfloat16, (8, 0), False),
        ("grouped_mm", torch.float16, (9, 0), False),
    ],
)
def test_experts_that_wait_for_the_host_are_named_before_a_capture(monkeypatch, experts, dtype, capability, captures):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for count in ("num_experts", "num_local_experts"):
        view = view_of(dtype=dtype, _experts_implementation=experts, **{count: 4})
        assert make_runner(view, None, None).captures == captures
        if not captures:
            with pytest.raises(
                ValueError, match=f"graphs: got True, but experts_implementation {experts!r} in {dtype}"
            ):
                make_runner(view, True, None)
    assert make_runner(view_of(dtype=dtype, _experts_implementation=experts), True, None).captures


@pytest.mark.parametrize("op", sorted(STEP_OPS))
def test_only_a_reference_that_waits_prevents_captures(monkeypatch, op):
    FakeCuda(monkeypatch)
    registry._owners[op, "cuda"] = "reference"
    assert make_runner(view_of(), None, None).captures != STEP_OPS[op]
    if STEP_OPS[op]:
        with pytest.raises(ValueError, match=f"graphs: got True, but the reference runs {op}, which waits"):
            make_runner(view_of(), True, None)
