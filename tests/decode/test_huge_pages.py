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
def test_values_ties_and_files_stay(dtype, monkeypatch, tmp_path):
    every_size(monkeypatch)
    model = tiny_model(2, dtype=dtype)
    model.lm_head.weight = model.model.embed_tokens.weight
    before, addresses, answer = (
        values(model),
        places(model),
        firp.generate(model, torch.tensor([[4, 5]]), max_new_tokens=8),
    )
    assert huge_pages.use_huge_pages(model)
    assert same(values(model), before) and not set(places(model).values()) & set(addresses.values())
    assert all(address % huge_pages.ALIGNMENT == 0 for address in places(model).values())
    assert torch.equal(firp.generate(model, torch.tensor([[4, 5]]), max_new_tokens=8), answer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(values(copy.deepcopy(model)), before)
    # What saves a parameter does not take the others along.
    assert all(len(parameter.untyped_storage()) == parameter.nbytes for parameter in model.parameters())


def every_size(monkeypatch):
    """Tiny models, too, lie in huge pages, and in several mappings."""
    monkeypatch.setattr(huge_pages, "SMALLEST", 1)
    monkeypatch.setattr(huge_pages, "MAPPING", 4096)


@GIVEN
def test_huge_pages_are_asked_for_a_loaded_model():
    loaded, _ = firp.load_model("smollm2-135m", "bfloat16")
    large = [parameter for parameter in loaded.parameters() if parameter.nbytes >= huge_pages.SMALLEST]
    assert len(large) == 211
    spans = advised_spans()
    assert all(advised(parameter.data_ptr(), spans) for parameter in large)
    assert not any(advised(parameter.data_ptr(), spans) for parameter in loaded.parameters() if parameter.nbytes < 4096)


def advised_spans():
    """The mappings that are marked for huge pages; how many there are, the system decides."""
    spans, span = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            span = int(found[1], 16), int(found[2], 16)
        elif line.startswith("VmFlags") and "hg" in line.split():
            spans.append(span)
    return spans


def advised(address, spans):
    return any(first <= address < end for first, end in spans)


@GIVEN
def test_no_room_for_a_mapping_leaves_the_rest_where_it_is(monkeypatch):
    every_size(monkeypatch)
    model = tiny_model(1, dtype=torch.float32)
    before, addresses, make, made = values(model), places(model), huge_pages.mmap.mmap, []

    def second_fails(*args, **options):
        made.append(args)
        if len(made) > 1:
            raise OSError(12, "Cannot allocate memory")
        return make(*args, **options)

    monkeypatch.setattr(huge_pages.mmap, "mmap", second_fails)
    assert not huge_pages.use_huge_pages(model)
    moved = sum(place != addresses[name] for name, place in places(model).items())
    assert 0 < moved < len(addresses) and same(values(model), before)


def test_what_cannot_be_moved_stays(monkeypatch, tmp_path):
    class Own(torch.nn.Parameter):
        pass

    every_size(monkeypatch)
    model = tiny_model(1, dtype=torch.float32)
    before = places(model)
    (tmp_path / "memory.max").write_text("200000\n")
    (tmp_path / "memory.current").write_text("199000\n")
    for name, little in (("available_memory", lambda device: 1000), ("CONTAINER", tmp_path)):
        with monkeypatch.context() as patch:
            patch.setattr(huge_pages, name, little)
            assert not huge_pages.use_huge_pages(model)
    for setting in (tmp_path / "missing", tmp_path / "never"):
        (tmp_path / "never").write_text("always madvise [never]\n")
        with monkeypatch.context() as patch:
            patch.setattr(huge_pages, "SETTING", setting)
            assert not huge_pages.use_huge_pages(model)
    norm = model.model.norm
    weight = norm.weight.detach()
    for other in (
        Own(weight),
        torch.nn.Parameter(model.lm_head.weight.detach()[0]),
        torch.nn.Parameter(weight.to_sparse()),
    ):
        kept, norm.weight = norm.weight, other
        assert not huge_pages.use_huge_pages(model)
        norm.weight = kept
    assert places(model) == before
    assert not huge_pages.use_huge_pages(torch.nn.Module())
