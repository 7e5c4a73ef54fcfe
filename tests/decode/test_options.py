"""Every field of GenerationConfig works as in Hugging Face, has no effect in either, or is refused
by name."""

import firp
import pytest
import torch
from firp.generation.options import REFUSED, WITHOUT_EFFECT
from firp.generation.options import SUPPORTED as SUPPORTED_NAMES
from models import tiny_model, tiny_predictor
from option_cases import DOCS, HARMLESS, SUPPORTED, UNSUPPORTED, Case, fields, markdown, prompt_of
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_every_field_stands_in_one_table():
    tables = (set(SUPPORTED_NAMES), set(WITHOUT_EFFECT), set(REFUSED))
    assert fields() - set.union(*tables) == set()
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert set(SUPPORTED) == tables[0] and set(HARMLESS) == tables[1] and set(UNSUPPORTED) == tables[2]


def test_the_document_is_current():
    assert DOCS.read_text() == markdown(), "run: python tests/decode/option_cases.py"


@pytest.fixture(scope="module")
def tokenizer():
    letters = {letter: i for i, letter in enumerate(["[PAD]", "a", "b", "[EOS]", *"def"])}
    tokenizer = Tokenizer(WordLevel({**letters, "c": 7}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def run(generate, model, case: Case, options: dict, tokenizer):
    """What the case compares of one call."""
    options = dict(options)
    if options.pop("logits", None) == "nan":
        with torch.no_grad():
            model.lm_head.weight[2] = float("nan")
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer
    if not {"max_length", "max_new_tokens"} & set(options):
        options["max_new_tokens"] = 12
    if case.compare == "scores":
        out = generate(
            prompt_of(case), **{**options, "max_new_tokens": 1}, return_dict_in_generate=True, output_scores=True
        )
        return out.scores[0]
    out = generate(prompt_of(case), **{"do_sample": False, **options})
    if case.compare == "type":
        return (
            "tensor"
            if isinstance(out, torch.Tensor)
            else [key for key in ("sequences", "scores", "logits") if out.get(key) is not None]
        )
    return out


def equal(a, b) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SUPPORTED)
def test_served_fields_do_what_they_do_in_hugging_face(name, tokenizer, folder_forms):
    case = SUPPORTED[name]
    others, with_field = case.others, {**case.others, name: case.value}
    changed = False
    for seed in range(3):

        def hugging_face(options, seed=seed):
            model = tiny_model(seed)
            return run(model.generate, model, case, options, tokenizer)

        def ours(options, seed=seed):
            model = tiny_model(seed)
            drafting = {"predictor": tiny_predictor(model, seed), "tree": firp.TreeConfig(8, 3)}
            return run(
                lambda *args, **given: firp.generate(model, *args, **drafting, **given), model, case, options, tokenizer
            )

        def by_folder(form, options, seed=seed):
            model = tiny_model(seed)
            return run(folder_forms(model, 7)[form], model, case, options, tokenizer)

        expected = hugging_face(with_field)
        assert equal(ours(with_field), expected), seed
        matters = case.compare == "same" or not equal(hugging_face(others), expected)
        if matters and not changed:
            assert equal(by_folder(0, with_field), expected) and equal(by_folder(1, with_field), expected), seed
        changed |= matters
    assert changed


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_without_effect_change_nothing_in_either(name, folder_forms):
    model, ids = tiny_model(1), torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    config = GenerationConfig(
        **{name: HARMLESS[name]}, max_new_tokens=12, do_sample=False, eos_token_id=3, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, generation_config=config), plain)
    assert torch.equal(firp.generate(model, ids, generation_config=config, predictor=tiny_predictor(model, 1)), plain)
    for generate in folder_forms(model, 7):
        assert torch.equal(generate(ids, generation_config=config), plain)


@pytest.mark.parametrize("where", ["argument", "config", "model", "hook", "folder", "model folder"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_fields_are_refused_by_name_with_the_alternative(name, where, folder_forms):
    model, ids = tiny_model(1), torch.tensor([[4, 5, 6]])
    values, instead = REFUSED[name]
    expected = f"{name}: got {UNSUPPORTED[name]!r}, expected {' or '.join(map(repr, values))}: {instead}"
    common = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError) as caught:
        if where == "argument":
            firp.generate(model, ids, **{name: UNSUPPORTED[name]}, **common)
        elif where == "config":
            config = GenerationConfig(**common)
            setattr(config, name, UNSUPPORTED[name])
            firp.generate(model, ids, generation_config=config)
        elif where == "model":
            setattr(model.generation_config, name, UNSUPPORTED[name])
            firp.generate(model, ids, **common)
        elif where.endswith("folder"):
            folder_forms(model, 7)[where == "model folder"](ids, **{name: UNSUPPORTED[name]}, **common)
        else:
            setattr(model.generation_config, name, UNSUPPORTED[name])
            firp.decode(model, ids, generation_config=model.generation_config)
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_their_harmless_values_pass(name):
    model, ids = tiny_model(1), torch.tensor([[4, 5, 6]])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    for value in set(REFUSED[name][0]) - {None}:
        assert torch.equal(firp.generate(model, ids, **{name: value}, max_new_tokens=8, do_sample=False), plain)


def test_a_field_of_the_future_is_refused():
    model = tiny_model(1)
    model.generation_config.telepathy = 3
    with pytest.raises(ValueError) as caught:
        firp.generate(model, torch.tensor([[4, 5]]), max_new_tokens=3, do_sample=False)
    assert str(caught.value) == "telepathy: got 3, an option that FIRP does not know and so does not ignore"
