"""The plug-in in vLLM itself, on a CPU: `make test-vllm` makes its environment; elsewhere these tests are skipped."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import firp
import pytest
import torch
from exact import chi_square, joint_distribution
from firp.integrations.vllm_checkpoint import write_vllm_checkpoint
from firp.tools.models import load_config
from firp.tools.prompt_files import OWN_PROMPTS, encode, load_prompts
from models import tiny_model, tiny_predictor

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="no vLLM here; make test-vllm")
SERVE = Path(__file__).with_name("serve.py")
# No top_k: the sampler of this vLLM ends in an error on a CPU where a step has no drafts, with any drafter.
SAMPLING = {
    "plain": {}, "top_p": {"temperature": 0.8, "top_p": 0.9}, "penalty": {"repetition_penalty": 1.4},
}  # fmt: skip
CHAIN = firp.TreeConfig(4, 4, "static", ((0,), (0, 0), (0, 0, 0)))


def serve(scenarios: str, model: Path, checkpoint: Path | None, output: Path, parallel: int = 1) -> dict:
    speculative = json.dumps({"model": str(checkpoint), "num_speculative_tokens": 3}) if checkpoint else "plain"
    subprocess.run(
        [sys.executable, str(SERVE), scenarios, speculative, str(model), str(output), str(parallel)],
        check=True, env=os.environ | {"SAMPLING": json.dumps(SAMPLING)},
    )  # fmt: skip
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> tuple[dict, dict]:
    """What SmolLM2 generated in vLLM without and with FIRP."""
    root = tmp_path_factory.mktemp("smollm")
    model, tokenizer = firp.load_model("smollm2-135m")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_vllm_checkpoint(root / "out", firp.default_predictor("smollm2-135m"), load_config("smollm2-135m"))
    return tuple(
        serve("greedy,arrivals", root / "model", checkpoint, root / f"{checkpoint is None}.json")
        for checkpoint in (None, root / "out")
    )


@pytest.mark.parametrize("part", ["greedy", "limits", "stops", "options", "first", "again", "arrivals"])
def test_greedy_output_is_vllms_own(smollm, part):
    plain, drafted = smollm
    assert drafted[part] == plain[part]


def test_limits_end_within_an_accepted_run(smollm):
    assert [len(tokens) for tokens in smollm[1]["limits"]] == list(range(1, 10))


def test_the_prefix_cache_is_used_as_without_drafts(smollm):
    plain, drafted = smollm
    assert drafted["prefix_hits"] == plain["prefix_hits"] > 0


def test_requests_were_preempted(smollm):
    assert min(run["preemptions"] for run in smollm) > 0


def test_it_accepts_what_the_engines_own_chain_accepts(smollm):
    drafts = smollm[1]["drafts"]
    delivered = sum(map(len, smollm[1]["greedy"])) - 24  # without the token of each prefill
    model, tokenizer = firp.load_model("smollm2-135m", dtype="float32")
    engine = firp.Engine(model, firp.default_predictor("smollm2-135m"), tree=CHAIN)
    counts: list[int] = []
    for prompt in load_prompts(OWN_PROMPTS, 24):
        asked = encode(tokenizer, [{"role": "user", "content": prompt.turns[0]}])
        firp.generate(
            model, torch.tensor([asked]), engine=engine, max_new_tokens=40, do_sample=False,
            on_step=lambda event: counts.append(len(event.tokens[0])),
        )  # fmt: skip
    # The engine's first step of a prompt is vLLM's prefill.
    own = (sum(counts) - 24) / (len(counts) - 24)
    assert delivered / drafts["spec_decode_num_drafts"] == pytest.approx(own, rel=0.03)


def written(root: Path, model, predictor) -> tuple[Path, Path]:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(root / "model")
    write_vllm_checkpoint(root / "out", predictor, model.config)
    return root / "model", root / "out"


def tiny(vocab: int):
    """Heads of 32, which vLLM's kernels know, over few tokens."""
    model = tiny_model(
        2, vocab=vocab, dtype=torch.float32, hidden_size=64, num_attention_heads=2, head_dim=32, num_hidden_layers=4
    )
    with torch.no_grad():
        model.lm_head.weight.div_(6)
    return model


def test_samples_have_the_models_distribution(tmp_path):
    model = tiny(6)
    found = serve("sampled", *written(tmp_path, model, tiny_predictor(model, 1)), tmp_path / "found.json")
    assert found["drafts"]["spec_decode_num_accepted_tokens"] > 500
    for name, options in SAMPLING.items():
        expected = joint_distribution(model, torch.tensor([[4]]), 4, top_k=0, **options)
        assert chi_square(Counter(map(tuple, found[name])), expected) > 1e-4, name


def test_two_ranks_give_the_tokens_of_one(tmp_path):
    model = tiny(64)
    folder, checkpoint = written(tmp_path, model, tiny_predictor(model, 1))
    runs = [
        serve("tokens", folder, *given, parallel=parallel)
        for given, parallel in (
            ((None, tmp_path / "plain.json"), 1), ((checkpoint, tmp_path / "one.json"), 1),
            ((checkpoint, tmp_path / "two.json"), 2),
        )
    ]  # fmt: skip
    assert runs[0]["tokens"] == runs[1]["tokens"] == runs[2]["tokens"]
    assert runs[1]["drafts"] == runs[2]["drafts"]
