"""Triton kernels run on the GPU where there is one, else in Triton's interpreter; tests marked `gpu` need a GPU."""

import functools
import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# Steps timed beside other tests are not figures for the user's own cache.
TEST_CACHE = Path(__file__).parents[1] / "build/test-cache"
os.environ["FIRP_CACHE"] = str(TEST_CACHE)
# Where Hugging Face copies the code of a folder; it writes in place, so workers beside each other need their own.
os.environ["HF_MODULES_CACHE"] = str(TEST_CACHE / f"modules-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_collection_finish():
    """What imports and collection made stays to the end: full collections of garbage need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter looks through its whole language at every call of a function: here only the first time."""
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(place):
        return [name for name in dir(place) if is_builtin(getattr(place, name))]

    def patch_builtin(place, *others):
        for name in builtins(place):
            member = getattr(place, name)
            if is_builtin(member):
                interpreter._patch_attr(place, name, member, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture(autouse=True)
def memory_for_other_workers():
    """Tests run side by side on one GPU: what torch keeps of a large one would be missing to the others."""
    yield
    if HAS_GPU and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="200,000 draws a case, 1,000 random configurations, every place in every family, every kernel variant, "
        "and cases that are slow in the interpreter",
    )
    parser.addoption(
        "--check-kernels",
        action="store_true",
        help="check every launch in Triton's interpreter for faults of memory and races",
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """By size of the vocabulary: a folder of `firp export --to custom-generate` with a predictor of tiny models."""
    import firp
    from firp.integrations.export import export
    from models import tiny_model, tiny_predictor

    @functools.cache
    def folder(vocab: int) -> str:
        root = tmp_path_factory.mktemp("exported")
        tiny_predictor(tiny_model(1, vocab=vocab), 1).save_pretrained(root / "predictor")
        export("custom-generate", root / "out", firp.load_predictor(root / "predictor"), root / "predictor")
        return str(root / "out")

    return folder


@pytest.fixture(scope="session")
def folder_forms(exported):
    """The `generate` of a model by such a folder, in both forms: beside the model, and in the model's own folder."""

    def forms(model, vocab: int) -> list:
        folder = {"pretrained_model_name_or_path": exported(vocab), "trust_remote_code": True}
        model.config._name_or_path = exported(vocab)
        beside = functools.partial(model.generate, custom_generate=exported(vocab), trust_remote_code=True)
        # As `from_pretrained` does for a folder that holds custom_generate/.
        return [beside, functools.partial(model.load_custom_generate(**folder), model=model)]

    return forms


@pytest.fixture(autouse=True, scope="session")
def checked_kernels(request):
    """With --check-kernels a fault of any launch fails its test."""
    if not request.config.getoption("--check-kernels"):
        yield
        return
    from memory_checker import checked

    with checked():
        yield
