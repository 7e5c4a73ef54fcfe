"""A predictor's files are loaded whole and unchanged, or refused by one error that names file, field and
expectation."""

import json
import os
import re
import shutil

import firp
import pytest
import torch
from firp.drafting.predictor import SHIPPED, FirpPredictor
from models import tiny_model, tiny_predictor, update_predictor
from predictor_file_cases import ABSENT, CONFIG, REFUSED, WEIGHTS, filled, load_file, recast, tensors
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path):
    tiny_predictor(tiny_model(1, dtype=torch.float32), 1).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_refused_by_name(folder, case):
    spoil, name, message = REFUSED[case]
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        FirpPredictor.from_pretrained(folder)
    assert type(caught.value) is ValueError
    said = str(caught.value)
    assert said.startswith(f"predictor: {folder / name}: ") and message in said and len(said) < 1200
    with pytest.raises(ValueError, match=re.escape(said)):
        firp.load_predictor(folder)


@pytest.mark.parametrize("case", ABSENT)
def test_an_absent_file_is_named(folder, case):
    spoil, name = ABSENT[case]
    spoil(folder)
    for load in (FirpPredictor.from_pretrained, firp.load_predictor):
        with pytest.raises(FileNotFoundError) as caught:
            load(folder)
        assert str(caught.value) == f"predictor: {folder} has no {name} that can be read"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("what, kind", [("", FileNotFoundError), (CONFIG, ValueError), (WEIGHTS, ValueError)])
def test_what_may_not_be_read_is_named(folder, what, kind):
    path = folder / what
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with pytest.raises(kind, match=f"^predictor: {re.escape(str(path))}"):
            FirpPredictor.from_pretrained(folder)
    finally:
        path.chmod(mode)


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "predictor: got NoneType, expected a folder or a hub id"),
        (3, "predictor: got int, expected a folder or a hub id"),
        ("not a hub id", "predictor: cannot load 'not a hub id' from the hub: "),
        ("x" * 5000, "from the hub: "),
        ("a\0b", "from the hub: "),
    ],
)
def test_a_source_that_is_none_is_refused(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FirpPredictor.from_pretrained(source)


def test_a_file_is_not_its_folder(folder):
    with pytest.raises(ValueError, match=r"expected the folder of config.json and model.safetensors"):
        FirpPredictor.from_pretrained(folder / WEIGHTS)


def hub_cache(cache, folder):
    """A hub cache that holds the folder as the repository firp/tiny."""
    commit = "0" * 40
    repository = cache / "models--firp--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)


def test_a_hub_id_is_read_as_strictly(folder, tmp_path_factory):
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    hub_cache(whole, folder)
    loaded = FirpPredictor.from_pretrained("firp/tiny", cache_dir=whole, local_files_only=True)
    assert torch.equal(loaded.weight, load_file(folder / WEIGHTS)["weight"]) and loaded.folder is None
    filled("weight", float("nan"))(folder)
    hub_cache(broken, folder)
    with pytest.raises(ValueError, match=r"predictor: .*firp--tiny.*model.safetensors: weight: got values from nan"):
        FirpPredictor.from_pretrained("firp/tiny", cache_dir=broken, local_files_only=True)


def test_a_hub_repository_with_a_pickle_alone_is_refused(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    hub_cache(cache, folder)
    with pytest.raises(ValueError, match="predictor: cannot load 'firp/tiny' from the hub: "):
        FirpPredictor.from_pretrained("firp/tiny", cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_point_dtype_loads_as_float32(folder, dtype):
    recast(dtype)(folder)
    expected = load_file(folder / WEIGHTS)
    for loaded in (FirpPredictor.from_pretrained(folder), firp.load_predictor(str(folder))):
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            assert torch.equal(parameter, expected[name].float())
        assert not loaded.training


def test_a_configuration_of_the_required_fields_has_the_defaults(folder):
    required = ("num_offsets", "hidden_size", "insertion_layer", "num_layers", "vocab_size")
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({name: found[name] for name in required}))
    tensors(lambda found: {"weight": found["weight"]})(folder)
    loaded = firp.load_predictor(folder)
    assert (loaded.num_nodes, loaded.num_lookahead, loaded.tree_kind, loaded.transition) == (8, 2, "dynamic", None)


def test_what_was_saved_is_loaded(folder, tmp_path):
    first = firp.load_predictor(folder)
    first.save_pretrained(tmp_path / "again")
    again = firp.load_predictor(tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_text() == (folder / CONFIG).read_text()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_loaded_predictor_does_not_change_with_its_file(folder):
    loaded = firp.load_predictor(folder)
    before = [parameter.clone() for parameter in loaded.parameters()]
    size = (folder / WEIGHTS).stat().st_size
    with open(folder / WEIGHTS, "r+b") as file:
        file.write(b"\x42" * size)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.parameters(), strict=True))
    tiny_predictor(tiny_model(1, dtype=torch.float32), 2).save_pretrained(folder)
    loaded.save_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, firp.load_predictor(folder).parameters(), strict=True))


def test_the_shipped_predictors_load():
    for folder in SHIPPED.iterdir():
        assert FirpPredictor.from_pretrained(folder).num_offsets >= 1


def test_predictors_in_memory_may_hold_anything(folder):
    model = tiny_model(1)
    ids = torch.tensor([[4, 5, 6]])
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for kind in ("nan", "inf", "huge"):
        predictor = tiny_predictor(model, 1, kind)
        assert torch.equal(firp.generate(model, ids, predictor=predictor, **options), expected)
        predictor.save_pretrained(folder)  # the user's business; the file is refused when it is loaded
        with pytest.raises(ValueError, match="expected finite ones"):
            firp.load_predictor(folder)


@pytest.mark.parametrize("listed", [0, 4])
def test_an_update_stays_with_the_first_offsets(tmp_path, listed):
    predictor = update_predictor(tiny_model(1, vocab=11), 1, listed=listed).float()
    predictor.save_pretrained(tmp_path)
    fewer = firp.load_predictor(tmp_path).first_offsets(2)
    assert (fewer.update_width, fewer.draft_vocabulary) == (9, listed)
    for name in ("update_inputs", "update_bias", "update_outputs"):
        assert torch.equal(getattr(fewer, name), getattr(predictor, name)[:2])
    assert torch.equal(fewer.transition, predictor.transition)
    assert fewer.draft_tokens.equal(predictor.draft_tokens) if listed else fewer.draft_tokens is None


def test_sizes_of_an_update_are_checked():
    model = tiny_model(1, vocab=11)
    with pytest.raises(ValueError, match="update_width: got -1, expected 0"):
        firp.FirpPredictor.for_model(model, 2, 2, update_width=-1)
    with pytest.raises(ValueError, match=r"draft_vocabulary: got 12, expected 0\.\.11 \(vocab_size"):
        firp.FirpPredictor.for_model(model, 2, 2, update_width=2, draft_vocabulary=12)
    with pytest.raises(ValueError, match=r"draft_vocabulary: got 4, expected 0\.\.0 \(vocab_size; 0 without an update"):
        firp.FirpPredictor.for_model(model, 2, 2, draft_vocabulary=4)


@pytest.mark.parametrize("tokens", [[1, 2, 2, 5], [3, 1, 5, 7], [-1, 2, 3, 4], [1, 2, 3, 11], [0.0, 1.0, 2.0, 3.0]])
def test_token_ids_that_do_not_ascend_within_the_vocabulary_are_refused(tmp_path, tokens):
    predictor = update_predictor(tiny_model(1, vocab=11), 1, listed=4).float()
    predictor.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {"draft_tokens": torch.tensor(tokens)}, tmp_path / "model.safetensors")
    kind = "expected one of int64, int32" if isinstance(tokens[0], float) else "expected ascending token ids in 0"
    with pytest.raises(ValueError, match=f"draft_tokens: got .*{kind}"):
        firp.load_predictor(tmp_path)


@pytest.mark.parametrize("name", ["weight", "transition", "update_bias", "draft_tokens"])
def test_a_fingerprint_follows_its_weights(name):
    predictor = update_predictor(tiny_model(1), 1, listed=3)
    before = predictor.fingerprint()
    assert predictor.fingerprint() == before
    with torch.no_grad():
        getattr(predictor, name).flatten()[0] += 1
    changed = predictor.fingerprint()
    predictor.insertion_layer += 1
    assert len({before, changed, predictor.fingerprint()}) == 3
