"""The folder that replaces `generate`: beside a model, in a model's own folder, and on the Hub."""

import copy
import functools
import gc
import pickle
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import firp
import pytest
import torch
from firp.decoder.seen import ENGINE
from firp.integrations import custom_generate
from models import tiny_model, tiny_predictor
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

IDS = torch.tensor([[5, 6, 7]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
OTHER_TREE = firp.TreeConfig(4, 1)


def load(tiny, **options):
    return AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32, **options)


@pytest.fixture(scope="session")
def expected(tiny):
    return load(tiny).generate(IDS, **GREEDY)


@pytest.fixture(params=["model folder", "folder beside the model"])
def form(request, tiny):
    """A model and its `generate` by a folder, in both forms."""
    model = load(tiny, trust_remote_code=request.param == "model folder")
    if request.param == "model folder":
        return model, model.generate
    return model, functools.partial(model.generate, custom_generate=str(tiny / "exported"), trust_remote_code=True)


def test_tokens_are_those_of_hugging_face_and_one_engine_decodes_them(form, expected):
    model, generate = form
    assert torch.equal(generate(IDS, **GREEDY), expected)
    kept = getattr(model, ENGINE).engine
    assert kept.predictor is not None and torch.equal(generate(input_ids=IDS, **GREEDY), expected)
    assert getattr(model, ENGINE).engine is kept
    out = generate(IDS, **GREEDY, return_dict_in_generate=True, tree=OTHER_TREE)
    assert torch.equal(out.sequences, expected) and isinstance(out, firp.FirpOutput)
    assert getattr(model, ENGINE).engine.drafter(1).config == OTHER_TREE
    own = firp.Engine(model)
    assert torch.equal(generate(IDS, **GREEDY, engine=own), expected)
    assert torch.equal(firp.generate(model, IDS, **GREEDY), expected)
    assert torch.equal(type(model).generate(model, IDS, **GREEDY), expected)


def test_a_model_folder_is_not_trusted_unasked(tiny):
    model = load(tiny)
    model.generate(IDS, **GREEDY)
    assert "generate" not in vars(model) and not hasattr(model, ENGINE)


@pytest.fixture(scope="session")
def letters():
    """A tokenizer of one letter a token."""
    words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *(chr(ord("a") + i) for i in range(28))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def test_streamer_tokenizer_and_stop_strings(form, tiny, letters, expected):
    _, generate = form
    stop = {**GREEDY, "tokenizer": letters, "stop_strings": [letters.decode(expected[0, 7:9])]}
    stopped = load(tiny).generate(IDS, **stop)
    assert stopped.shape < expected.shape and torch.equal(generate(IDS, **stop), stopped)
    streamer = TextIteratorStreamer(letters, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(IDS,), kwargs={**stop, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == letters.decode(stopped[0, 3:])


def test_arguments_by_position(tiny):
    config = GenerationConfig(**GREEDY, pad_token_id=0)
    given = IDS, config, [MinLengthLogitsProcessor(9, 7)], [MaxLengthCriteria(11)], lambda *_: list(range(4, 32))
    wanted = load(tiny).generate(*given)
    assert torch.equal(load(tiny, trust_remote_code=True).generate(*given), wanted) and wanted.shape[1] == 11


def test_a_pipeline_over_a_model_folder(tiny):
    options = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False}
    plain, ours = (
        pipeline("text-generation", model=str(tiny / "model"), trust_remote_code=trusted) for trusted in (False, True)
    )
    assert ours(["w1 w2 w3", "w4"], **options) == plain(["w1 w2 w3", "w4"], **options)
    assert hasattr(ours.model, ENGINE) and not hasattr(plain.model, ENGINE)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("assistant_model", tiny_model(1), "assistant_model: got LlamaForCausalLM, expected None: FIRP is the drafter here"),
        ("assistant_tokenizer", "x", "assistant_tokenizer: got str, expected None: FIRP is the drafter here"),
        ("predictor", 3, "predictor: got int, expected None: the folder has its own; pass custom_generate=firp.decode for another one"),
        ("num_beams", 2, "num_beams: got 2, expected None or 1: FIRP follows one sequence at a time; call type(model).generate without custom_generate for beams"),
        ("tree", 5, "tree: got 5, expected a firp.TreeConfig"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(form, name, value, message):
    _, generate = form
    with pytest.raises(ValueError) as caught:
        generate(IDS, **GREEDY, **{name: value})
    assert str(caught.value) == message


def test_another_method_for_a_model_folder_is_refused(tiny):
    with pytest.raises(ValueError, match=r"^custom_generate: got function, .* pass it to type\(model\).generate"):
        load(tiny, trust_remote_code=True).generate(IDS, custom_generate=firp.decode)


@pytest.mark.parametrize("checked_before", [False, True])
@pytest.mark.parametrize(
    "bound",
    [
        lambda model: functools.partial(print, model=model),
        lambda model: functools.partial(custom_generate.generate, model=model, do_sample=True),
        lambda model: functools.partial(functools.wraps(custom_generate.generate)(lambda *_, **__: None), model=model),
    ],
    ids=["another function", "options bound too", "a wrapper"],
)
def test_a_model_with_a_generate_of_another_owner_is_refused(tiny, bound, checked_before):
    model = load(tiny)
    if checked_before:
        firp.generate(model, IDS, **GREEDY)
    model.generate = bound(model)
    with pytest.raises(ValueError, match="the model has its own generate"):
        firp.generate(model, IDS, **GREEDY)


def test_a_model_that_changed_gets_a_new_engine(form):
    model, generate = form
    generate(IDS, **GREEDY)
    before = getattr(model, ENGINE).engine
    model.double()
    plain = type(model).generate(model, IDS, **GREEDY)
    assert torch.equal(generate(IDS, **GREEDY), plain) and getattr(model, ENGINE).engine is not before
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has a forward hook"):
        generate(IDS, **GREEDY)


def test_copies_have_engines_of_their_own(tiny, expected):
    model = load(tiny, trust_remote_code=True)
    model.generate(IDS, **GREEDY)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)
    for other in others[:2]:
        assert getattr(other, ENGINE).engine is None
    for other in others:
        folder = {"custom_generate": str(tiny / "exported"), "trust_remote_code": True}
        assert torch.equal(type(other).generate(other, IDS, **GREEDY, **folder), expected)
        assert getattr(other, ENGINE).engine.model is other
    assert getattr(model, ENGINE).engine.model is model


@pytest.mark.parametrize("trusted", [True, False])
def test_a_model_is_freed_with_its_engine(tiny, trusted):
    model = load(tiny, trust_remote_code=trusted)
    folder = {} if trusted else {"custom_generate": str(tiny / "exported"), "trust_remote_code": True}
    model.generate(IDS, **GREEDY, **folder)
    held = [weakref.ref(thing) for thing in (model, getattr(model, ENGINE).engine, model.lm_head.weight)]
    del model
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]


def test_a_streamer_that_raises_leaves_the_engine_ready(form, expected):
    model, generate = form

    class Gone:
        count = 0

        def put(self, _):
            self.count += 1
            if self.count == 5:
                raise ConnectionError("the reader is gone")

        def end(self):
            raise AssertionError("not reached")

    for _ in range(2):
        with pytest.raises(ConnectionError):
            generate(IDS, **GREEDY, streamer=Gone())
        kept = getattr(model, ENGINE).engine
        assert torch.equal(generate(IDS, **GREEDY), expected) and getattr(model, ENGINE).engine is kept


def test_calls_from_several_threads(form, expected):
    _, generate = form
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(lambda _: generate(IDS, **GREEDY), range(8)))


def test_first_calls_that_come_together_make_one_engine(form, expected, monkeypatch):
    model, generate = form
    made, together = [], threading.Barrier(4)

    def engine(*arguments, **options):
        made.append(firp.Engine(*arguments, **options))
        return made[-1]

    def call(_):
        together.wait()
        return generate(IDS, **GREEDY)

    monkeypatch.setattr(custom_generate, "Engine", engine)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(call, range(4)))
    assert made == [getattr(model, ENGINE).engine]


def test_a_folder_on_the_hub(tiny, expected, monkeypatch):
    asked = []

    def snapshot_download(source, **options):
        asked.append((source, options))
        return str(tiny / "exported")

    monkeypatch.setattr(custom_generate, "snapshot_download", snapshot_download)
    model = load(tiny, trust_remote_code=True)
    model.config._name_or_path, model.config._commit_hash = "owner/model", "abc"
    for _ in range(2):
        assert torch.equal(model.generate(IDS, **GREEDY), expected)
    own = {"allow_patterns": ["custom_generate/*"], "token": None, "cache_dir": None}
    assert asked == [("owner/model", {**own, "revision": "abc"})]
    model.generate(IDS, **GREEDY, revision="v2", token="t")
    assert asked[1:] == [("owner/model", {**own, "revision": "v2", "token": "t"})]


def test_a_predictor_that_is_not_there(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    shutil.rmtree(tmp_path / "model/custom_generate")
    with pytest.raises(
        FileNotFoundError, match="model has no custom_generate folder, expected what `firp export` wrote"
    ):
        model.generate(IDS, **GREEDY)
    model.config._name_or_path = ""
    with pytest.raises(FileNotFoundError, match="the model was not loaded from a folder"):
        model.generate(IDS, **GREEDY)

    def unreachable(*_, **__):
        raise OSError("no such\nrepository")

    monkeypatch.setattr(custom_generate, "snapshot_download", unreachable)
    model.config._name_or_path = "owner/model"
    with pytest.raises(FileNotFoundError, match=r"^predictor: got 'owner/model', expected .*: no such repository$"):
        model.generate(IDS, **GREEDY)


def test_a_predictor_of_another_model(exported):
    model = tiny_model(1, vocab=9)
    with pytest.raises(firp.PredictorMismatch, match="vocab_size differs"):
        model.generate(IDS, custom_generate=exported(7), trust_remote_code=True, **GREEDY)


def test_two_folders_of_one_name_for_one_model(exported, tmp_path):
    """Hugging Face keeps the code of both as one module; each call takes its own folder's predictor."""
    model, seen = tiny_model(1, vocab=11), []
    predictor = tiny_predictor(model, 2)
    predictor.save_pretrained(tmp_path / "predictor")
    shutil.copytree(exported(11), tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tmp_path / "predictor" / name, tmp_path / "out/custom_generate" / name)
    for folder in (exported(11), str(tmp_path / "out"), exported(11)):
        model.generate(IDS, custom_generate=folder, trust_remote_code=True, **GREEDY)
        seen.append(getattr(model, ENGINE).engine.predictor.fingerprint())
    assert seen[0] == seen[2] != seen[1] == predictor.float().fingerprint()
