"""For any model object Hugging Face's output comes out, or one refusal that names what is not supported."""

import re
from contextlib import ExitStack

import firp
import pytest
import torch
from models import FAMILIES, tiny_model, tiny_predictor
from value_places import PLACES

IDS = torch.tensor([[4, 9, 6, 10, 5, 7, 4]])
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def outcome(call, expected):
    """ "equal" or "refused"; anything else is a fault."""
    try:
        found = call()
    except Exception as error:
        if type(error) is type(expected):
            return "equal"
        assert isinstance(error, ValueError), f"unclear: {error!r}"
        assert re.match(r"(model|engine|predictor|max_new_tokens): ", str(error)), f"unclear: {error}"
        return "refused"
    assert not isinstance(expected, Exception), f"Hugging Face raises {expected!r}"
    assert torch.equal(found, expected), f"silently wrong: {found.tolist()}, expected {expected.tolist()}"
    return "equal"


def theirs(model):
    try:
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    except Exception as error:
        return error


def check(name, family, dtype):
    """An engine made after the patch, through both entry points, and one made before it."""
    model = tiny_model(1, family, vocab=11, dtype=dtype, eos_token_id=None)
    drafts = {"predictor": tiny_predictor(model, 1), "tree": firp.TreeConfig(8, 3)}
    kept = firp.Engine(model, *drafts.values())
    with ExitStack() as undo:
        PLACES[name](model, undo.enter_context(pytest.MonkeyPatch.context()), undo)
        expected = theirs(model)
        found = outcome(lambda: firp.generate(model, IDS, **drafts, **GREEDY), expected)
        hooked = {"attention_mask": torch.ones_like(IDS), "custom_generate": firp.decode, **drafts}
        assert outcome(lambda: model.generate(IDS, **hooked, **GREEDY), expected) == found
        return found, outcome(lambda: firp.generate(model, IDS, engine=kept, **GREEDY), expected)


def test_enough_places_are_patched():
    assert len(PLACES) >= 60


ONE_OF_EACH_TYPE = {model_type: family for family, (model_type, _) in reversed(FAMILIES.items())}.values()
EACH = [*ONE_OF_EACH_TYPE, "llama-dynamic", "llama-longrope", "qwen2-sliding"]


@pytest.mark.parametrize("family", EACH)
def test_every_place_in_every_family(family, pytestconfig):
    """llama meets every place, any other family every twelfth of them; all meet all with --exhaustive."""
    some = family != "llama" and not pytestconfig.getoption("exhaustive")
    faults = []
    for name in list(PLACES)[EACH.index(family) % 12 :: 12] if some else PLACES:
        try:
            check(name, family, torch.float64)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_place_where_cpu_layers_take_the_place_of_modules(family, pytestconfig):
    some = family != "llama" and not pytestconfig.getoption("exhaustive")
    faults = []
    for name in list(PLACES)[len(family) % 3 :: 3] if some else PLACES:
        try:
            check(name, family, torch.float32)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


WORKS = [
    "eager_attention",
    "weight_swapped_in_place",
    "rotary_scaling",
    "activation_of_another_kind",
    "final_norm_of_another_kind",
]


@pytest.mark.parametrize("name", [*WORKS, "attention_scaling", "weight_replaced", "head_with_more_rows", "norm_eps"])
def test_what_can_be_followed_is_followed(name):
    """A check that refused everything would pass the tests above."""
    assert check(name, "llama", torch.float64)[0] == "equal"
