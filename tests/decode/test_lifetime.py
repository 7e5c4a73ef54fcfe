"""What an engine and a call keep: nothing of a call, tensors that any grad mode may write, and no stale values."""

import gc
import threading
import weakref
from types import FunctionType

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor

IDS = torch.tensor([[4, 9, 6]])
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def drafting(model):
    return {"predictor": tiny_predictor(model, 1), "tree": firp.TreeConfig(8, 3)}


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_engine_dies_with_its_last_reference(no_collector):
    model = tiny_model(1, vocab=11)
    engine = firp.Engine(model, *drafting(model).values())
    firp.generate(model, IDS, engine=engine, **GREEDY)
    alive = weakref.ref(engine)
    del engine
    assert alive() is None


def tracked():
    """Objects, less the three by which an inner function of a configuration's `to_dict` holds itself: transformers
    5.17."""
    objects = gc.get_objects()
    functions = [one.__qualname__ for one in objects if type(one) is FunctionType]
    return len(objects) - 3 * sum(name.startswith("PreTrainedConfig.to_dict.") for name in functions)


@pytest.mark.parametrize("hooked", [False, True])
def test_calls_leave_nothing_behind(no_collector, hooked):
    """As many objects after three hundred calls as after ten, with the cycle collector off."""
    model = tiny_model(1, vocab=11)
    draft = drafting(model)
    options = {"do_sample": False, "max_new_tokens": 2}

    def call():
        if hooked:
            model.generate(IDS, custom_generate=firp.decode, **draft, **options)
        else:
            firp.generate(model, IDS, **draft, **options)

    for _ in range(10):
        call()
    after_ten = tracked()
    for _ in range(290):
        call()
    assert tracked() <= after_ten + 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_model_that_was_checked_can_be_freed(no_collector, dtype):
    model = tiny_model(1, vocab=11, dtype=dtype)
    firp.generate(model, IDS, **GREEDY)
    first, second, *_ = model.model.layers
    alive = [weakref.ref(linear.weight) for linear in (second.mlp.up_proj, first.self_attn.o_proj)]
    second.mlp.up_proj = torch.nn.Linear(32, 48, bias=False).to(dtype)
    first.self_attn.o_proj.weight = torch.nn.Parameter(first.self_attn.o_proj.weight.detach().clone())
    assert [weight() for weight in alive] == [None, None]
    assert torch.equal(firp.generate(model, IDS, **GREEDY), model.generate(IDS, **GREEDY))


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True, False)])
def test_an_engine_works_in_and_out_of_inference_mode(order):
    model = tiny_model(1, vocab=11)
    expected = model.generate(IDS, **GREEDY)
    for made_inside in (False, True):
        with torch.inference_mode(made_inside):
            engine = firp.Engine(model, *drafting(model).values())
        for inside in order:
            with torch.inference_mode(inside):
                assert torch.equal(firp.generate(model, IDS, engine=engine, **GREEDY), expected)


def test_a_warm_up_inside_inference_mode_serves_calls_outside():
    model = tiny_model(1, vocab=11)
    engine = firp.Engine(model, *drafting(model).values())
    with torch.inference_mode():
        engine.warm_up(progress=False)
    assert torch.equal(firp.generate(model, IDS, engine=engine, **GREEDY), model.generate(IDS, **GREEDY))


def test_a_caller_with_gradients_switched_on_gets_tokens():
    model = tiny_model(1, vocab=11)
    with torch.enable_grad():
        assert torch.equal(firp.generate(model, IDS, **drafting(model), **GREEDY), model.generate(IDS, **GREEDY))


def test_weights_made_in_inference_mode_are_read():
    with torch.inference_mode():
        model = tiny_model(1, vocab=11)
    expected = model.generate(IDS, **GREEDY)
    assert torch.equal(
        firp.generate(model, IDS, predictor=tiny_predictor(tiny_model(1, vocab=11), 1), **GREEDY), expected
    )


CHANGES = {
    "dtype": (lambda model: model.to(torch.float32), "a parameter of 'model.embed_tokens', its dtype or its device"),
    "scaling": (
        lambda model: setattr(model.model.layers[1].self_attn, "scaling", 3.0),
        "attribute scaling of 'model.layers.1.self_attn'",
    ),
    "layers": (lambda model: setattr(model.config, "num_hidden_layers", 3), "config.num_hidden_layers from 4 to 3"),
    "head": (lambda model: setattr(model, "lm_head", torch.nn.Linear(32, 11).double()), "modules of the model itself"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_named_by_its_engine(name):
    model = tiny_model(1, vocab=11)
    engine = firp.Engine(model, *drafting(model).values())
    change, what = CHANGES[name]
    change(model)
    with pytest.raises(ValueError) as caught:
        firp.generate(model, IDS, engine=engine, **GREEDY)
    assert str(caught.value) == f"engine: the model changed after the engine was made ({what}), expected a new Engine"


def test_what_an_engine_reads_at_use_may_change():
    model = tiny_model(1, "llama-dynamic", vocab=11)
    engine = firp.Engine(model, *drafting(model).values())
    model.train()
    model.gradient_checkpointing_enable()
    model.eval()
    model.model.rotary_emb.attention_scaling = 1.5
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1
    assert torch.equal(firp.generate(model, IDS, engine=engine, **GREEDY), model.generate(IDS, **GREEDY))


def test_spare_buffers_that_another_thread_takes_first():
    """It takes them just after this thread has looked whether there are any."""

    class Watched(list):
        def __bool__(self):
            there = len(self) > 0
            other = threading.Thread(target=self.clear)
            other.start()
            other.join()
            return there

    model = tiny_model(1, vocab=11)
    engine = firp.Engine(model, *drafting(model).values())
    expected = model.generate(IDS, **GREEDY)
    for _ in range(2):
        assert torch.equal(firp.generate(model, IDS, engine=engine, **GREEDY), expected)
        engine._spare = Watched(engine._spare)
