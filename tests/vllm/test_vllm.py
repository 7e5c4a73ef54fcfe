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
from firp_vllm.options import FILLED_IN, HONOURED, UNUSED
from models import tiny_model, tiny_predictor

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="no vLLM here; make test-vllm")
SERVE = Path(__file__).with_name("serve.py")
SAMPLING = {
    "plain": {}, "top_p": {"temperature": 0.8, "top_p": 0.9}, "penalty": {"repetition_penalty": 1.4},
    "top_k": {"temperature": 0.9, "top_k": 3},
}  # fmt: skip
NEAR = 0.5  # of the two gaps of logarithms where bfloat16 answers part: scores near 20 stand 0.125 apart
CHAIN = firp.TreeConfig(4, 4, "static", ((0,), (0, 0), (0, 0, 0)))


def serve(
    scenarios: str, model: Path, checkpoint: Path | None, output: Path, parallel: int = 1, dtype: str = "float32",
    **options,
) -> dict:  # fmt: skip
    given = {"model": str(checkpoint), "num_speculative_tokens": 3, **options}
    speculative = json.dumps(given) if checkpoint else "plain"
    subprocess.run(
        [sys.executable, str(SERVE), scenarios, speculative, str(model), str(output), str(parallel), dtype],
        check=True, env=os.environ | {"SAMPLING": json.dumps(SAMPLING)},
    )  # fmt: skip
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """SmolLM2, its FIRP checkpoint, and room for results."""
    root = tmp_path_factory.mktemp("smollm")
    model, tokenizer = firp.load_model("smollm2-135m")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_vllm_checkpoint(root / "out", firp.default_predictor("smollm2-135m"), load_config("smollm2-135m"))
    return root / "model", root / "out", root


@pytest.fixture(scope="module")
def smollm(folders) -> tuple[dict, dict]:
    """What SmolLM2 generated in vLLM without and with FIRP."""
    model, out, root = folders
    return tuple(
        serve("greedy,arrivals", model, checkpoint, root / f"{checkpoint is None}.json") for checkpoint in (None, out)
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


def test_bfloat16_answers_part_only_at_near_ties(folders, capsys):
    """Scores of one token change with the number of rows in a step, in vLLM too; each first difference is listed."""
    model, out, root = folders
    plain, drafted = (
        serve("scored", model, checkpoint, root / f"bf16-{checkpoint is None}.json", dtype="bfloat16")
        for checkpoint in (None, out)
    )
    gaps, told = [], []
    for prompt, (one, other) in enumerate(zip(plain["scored"], drafted["scored"], strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if place is None:
            assert one == other
            continue
        chosen = str(one[place]), str(other[place])
        scores = [run["logprobs"][prompt][place] for run in (plain, drafted)]
        gaps.append([abs(score[chosen[0]] - score[chosen[1]]) for score in scores])
        told.append(f"prompt {prompt}, token {place}: gap {gaps[-1][0]:.4f} without drafts, {gaps[-1][1]:.4f} with")
    told.append(f"{len(plain['scored']) - len(gaps)} of {len(plain['scored'])} bfloat16 answers are equal")
    with capsys.disabled():
        print("", *told, sep="\n")
    assert all(sum(gap) <= NEAR for gap in gaps)


def test_three_ranks_that_share_one_head_each(folders):
    model, out, root = folders
    runs = [
        serve("short", model, checkpoint, root / f"ranks-{parallel}.json", parallel=parallel)
        for checkpoint, parallel in ((None, 1), (out, 3))
    ]
    assert runs[0]["short"] == runs[1]["short"] and runs[1]["drafts"] > 0


def written(root: Path, model, predictor) -> tuple[Path, Path]:
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(root / "model")
    write_vllm_checkpoint(root / "out", predictor, model.config)
    return root / "model", root / "out"


def tiny(vocab: int, family: str = "llama"):
    """Heads of 32, which vLLM's kernels know, over few tokens."""
    model = tiny_model(
        2, family, vocab=vocab, dtype=torch.float32, hidden_size=64, num_attention_heads=2, head_dim=32,
        num_hidden_layers=4,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.div_(6)
    return model


def test_samples_have_the_models_distribution(tmp_path):
    model = tiny(6)
    found = serve("sampled", *written(tmp_path, model, tiny_predictor(model, 1)), tmp_path / "found.json")
    assert found["drafts"]["spec_decode_num_accepted_tokens"] > 500
    for name, options in SAMPLING.items():
        expected = joint_distribution(model, torch.tensor([[4]]), 4, **{"top_k": 0} | options)
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


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_targets_draft_too(tmp_path, family):
    model = tiny(64, family)
    folder, checkpoint = written(tmp_path, model, tiny_predictor(model, 1))
    plain, drafted = (
        serve("tokens", folder, given, tmp_path / f"{given is None}.json") for given in (None, checkpoint)
    )
    assert drafted["tokens"] == plain["tokens"] and drafted["drafts"]["spec_decode_num_drafts"] > 0


@pytest.fixture(scope="module")
def company(tmp_path_factory) -> tuple[Path, Path, Path, dict]:
    """A tiny model, its checkpoint, room for results, and what stood beside other requests without drafts."""
    root = tmp_path_factory.mktemp("company")
    model = tiny(64)
    folder, checkpoint = written(root, model, tiny_predictor(model, 1))
    return folder, checkpoint, root, serve("beside", folder, None, root / "plain.json")


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("beside", {}), ("beside", {"num_speculative_tokens": 1}), ("beside", {"max_model_len": 20}),
        ("beside", {"num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 8, 1]]}),
        ("beside", {"disable_padded_drafter_batch": True}), ("crowded", {}),
    ],
)  # fmt: skip
def test_requests_beside_others_are_as_without_drafts(company, scenario, options):
    folder, checkpoint, root, plain = company
    drafted = serve(scenario, folder, checkpoint, root / "drafted.json", **options)
    assert {name: drafted[name] for name in drafted if name != "preemptions"} == {
        name: plain[name] for name in plain if name != "preemptions"
    }
    assert (drafted["preemptions"] > 0) == (scenario == "crowded")


def test_every_field_of_the_speculative_config_is_classified():
    code = (
        "import dataclasses, json; from vllm.config.speculative import SpeculativeConfig as C;"
        "d = {f.name: getattr(f.default, 'default', f.default) for f in dataclasses.fields(C)};"
        "print(json.dumps(d))"
    )
    found = json.loads(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    assert found.keys() == {*HONOURED, *FILLED_IN, *UNUSED}
    assert {name: allowed[0] for name, allowed in UNUSED.items()} == {name: found[name] for name in UNUSED}
