"""Rotary embeddings of every kind stay on the model's device: a copy from the host would make a step wait."""

import pytest
import torch
from firp.decoder.rotary import LENGTH_ROPE_TYPES, LengthRotary, rope_type_of
from models import FAMILIES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostTensors(TorchDispatchMode):
    """Names every op that takes or gives a tensor on the host."""

    def __init__(self):
        self.found = []
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_copies_no_frequencies(family, monkeypatch):
    """Tensors on "meta" have a device and a shape, but no values."""
    monkeypatch.setattr(LengthRotary, "check", lambda self: None)  # It reads values, once before a run.
    model = tiny_model(1, family)
    module, config = model.model.rotary_emb.to("meta"), model.config
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor):
            vars(module)[name] = value.to("meta")
    by_length = rope_type_of(config) in LENGTH_ROPE_TYPES
    rotary = LengthRotary(module, config) if by_length else module
    hidden, positions, lengths = (torch.empty(shape, device="meta").long() for shape in ((2, 5, 32), (2, 5), (2,)))
    for given in [(hidden.float(), positions), (hidden.float(), positions, lengths)][: 1 + by_length]:
        with HostTensors() as host:
            cos, sin = rotary(*given)
        assert cos.device.type == sin.device.type == "meta" and not host.found
