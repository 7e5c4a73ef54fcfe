"""Weights in huge pages: the same values, ties and files; nothing moves where it could not be so."""

import copy
import re
from pathlib import Path

import firp
import pytest
import torch
from firp.tools import huge_pages
from models import tiny_model

HELD = "[never]" in (huge_pages.SETTING.read_text() if huge_pages.SETTING.exists() else "[never]")
GIVEN = pytest.mark.skipif(HELD, reason="the system gives no huge pages")


def places(model):
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@GIVEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_ties_and_files_stay(dtype, tmp_path):
    model = tiny_model(2, dtype=dtype)
    model.tie_weights()
    before, addresses, answer = (
        values(model),
        places(model),
        firp.generate(model, torch.tensor([[4, 5]]), max_new_tokens=8),
    )
    assert huge_pages.use_huge_pages(model)
    assert same(values(model), before) and not set(places(model).values()) & set(addresses.values())
    assert all(address % huge_pages.ALIGNMENT == 0 for address in places(model).values())
    assert torch.equal(firp.generate(model, torch.tensor([[4, 5]]), max_new_tokens=8), answer)
    assert same(values(copy.deepcopy(model)), before)
    model.save_pretrained(tmp_path)
    assert same(values(type(model).from_pretrained(tmp_path, dtype=dtype)), before)
    # A parameter has a storage of its own: what saves or shares one does not take the others along.
    assert all(len(parameter.untyped_storage()) == parameter.nbytes for parameter in model.parameters())


@GIVEN
def test_a_loaded_model_lies_in_huge_pages():
    loaded, _ = firp.load_model("smollm2-135m", "bfloat16")
    largest = max(loaded.parameters(), key=torch.Tensor.numel)
    assert largest.nbytes > 2 * huge_pages.PAGE
    assert huge(largest.data_ptr()) > largest.nbytes / 2


def huge(address):
    """Bytes in huge pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            return 1024 * int(line.split()[1])
    return 0


def test_what_cannot_be_moved_stays(monkeypatch, tmp_path):
    class Own(torch.nn.Parameter):
        pass

    model = tiny_model(1, dtype=torch.float32)
    before = places(model)
    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "available_memory", lambda device: 1000)
        assert not huge_pages.use_huge_pages(model)
    for setting in (tmp_path / "missing", tmp_path / "never"):
        (tmp_path / "never").write_text("always madvise [never]\n")
        with monkeypatch.context() as patch:
            patch.setattr(huge_pages, "SETTING", setting)
            assert not huge_pages.use_huge_pages(model)
    norm = model.model.norm
    for other in (Own(norm.weight.detach()), torch.nn.Parameter(model.lm_head.weight.detach()[0])):
        kept, norm.weight = norm.weight, other
        assert not huge_pages.use_huge_pages(model)
        norm.weight = kept
    assert places(model) == before
    assert not huge_pages.use_huge_pages(torch.nn.Module())
