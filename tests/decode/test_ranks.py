"""Tensor parallel decoding over processes of this machine: the tokens of one process, and of plain decoding.

A sum over ranks is rounded otherwise than one process rounds it, so scores differ in their last bits. The tokens are
equal where no two scores tie that closely, as in all of these runs.
"""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import firp
import pytest
import torch
from firp.decoder.view import DecoderView
from firp.drafting.profile import FILE_NAME, save_profile
from firp.drafting.recording import make_profile
from firp.drafting.transition import token_tables
from firp.engine.weights import weights_of
from firp.engine.work import Draft, Sent, step_work
from firp.generation.batch import greedy_answers
from firp.tools.ranks import LAUNCHED, Ranks, launched_rank, launched_ranks, local_heads
from firp.train.ranks import TrainingRanks
from models import hf_alone, new_tokens
from rank_cases import (
    FAMILIES,
    FOUR,
    MORE_FAMILIES,
    ONE,
    OTHER_REQUESTS,
    REQUESTS,
    SMALL_TREE,
    STOPS,
    decoded,
    model_of,
    predictor_for,
    write_models,
)
from ranks_job import run_cases
from transformers import AutoConfig
from transformers.distributed import DistributedConfig

from benchmarks.gpu import tiny_model

# A job that hangs is a failure.
LONGEST = 500
pytestmark = pytest.mark.skipif(
    not hasattr(DistributedConfig(), "tp_size"), reason="transformers shards models in another way before 5.17"
)


def run_job(root: Path, size: int, cases: list[str]) -> list[dict]:
    """What each of `size` processes gave for the cases."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_job"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        processes = [context.Process(target=run_cases, args=(root, rank, size, cases)) for rank in range(size)]
        for process in processes:
            process.start()
    ends = time.monotonic() + LONGEST
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    results = [json.loads((root / f"results-{rank}.json").read_text()) for rank in range(size)]
    for rank, result in enumerate(results):
        for name, found in result.items():
            assert "error" not in found, f"rank {rank}, {name}: {found['error']}"
    assert codes == [0] * size
    return results


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> list[dict]:
    """Two ranks, each with half of the heads."""
    root = tmp_path_factory.mktemp("ranks")
    write_models(root, (*FAMILIES, "ties"), kv_heads=2)
    model_of("llama", kv_heads=1).save_pretrained(root / "one key head")
    model = model_of("llama")
    predictor, view = predictor_for(model), DecoderView(model)
    predictor.save_pretrained(root / "predictor")
    answers = greedy_answers(firp.Engine(model), [ONE["input_ids"][0]], 20, batch_size=1)
    named = [(ONE["input_ids"][0], answers[0], "own")]
    profile = make_profile(view, predictor, named, token_tables(view, predictor.transition))
    save_profile(root / "predictor" / FILE_NAME, profile)
    (root / "tiny").mkdir()
    tiny_model.write(root / "tiny")
    return run_job(
        root, 2, [*FAMILIES, "stops", "drop_in", "last_bit", "clocks", "refusals", "parts", "sent", "command"]
    )


def check_family(ranks: list[dict], family: str, kv_heads: int) -> None:
    """Tokens of every rank, drafted and plain, against one process and Hugging Face."""
    model = model_of(family, kv_heads)
    engine = firp.Engine(model)
    for name, request in (REQUESTS | OTHER_REQUESTS if family == "llama" else REQUESTS).items():
        alone = decoded(engine, request)["tokens"]
        for rank in ranks:
            found = rank[family][name]
            assert found["firp"]["tokens"] == found["plain"]["tokens"] == alone, name
    drafted, plain = (ranks[0][family]["greedy"][kind]["steps"] for kind in ("firp", "plain"))
    assert drafted < plain
    tokens = torch.tensor(ranks[0][family]["greedy"]["firp"]["tokens"])
    options = {"max_new_tokens": 10, "do_sample": False}
    assert new_tokens(tokens, FOUR["input_ids"].shape[1]) == hf_alone(model, *FOUR.values(), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_decode_what_one_process_does(job, family):
    check_family(job, family, kv_heads=2)


def test_a_stop_at_every_depth_of_an_accepted_path(job):
    engine = firp.Engine(model_of("llama"))
    for name, stop in STOPS.items():
        alone = decoded(engine, {**ONE, "do_sample": False, **stop})["tokens"]
        assert [rank["stops"][name]["tokens"] for rank in job] == [alone, alone], name
    assert len(job[0]["stops"]["criterion 9"]["deep"]) == 3  # drafts of every depth were accepted


def test_drop_in_and_a_context(job):
    alone = decoded(firp.Engine(model_of("llama")), {**ONE, "max_new_tokens": 8, "do_sample": False})["tokens"]
    assert [rank["drop_in"] for rank in job] == [[alone, alone]] * 2


def test_a_last_bit_on_one_rank_changes_nothing(job):
    engine = firp.Engine(model_of("ties"))
    for name, found in job[0]["last_bit"].items():
        alone = decoded(engine, (REQUESTS | OTHER_REQUESTS)[name])["tokens"]
        assert found["tokens"] == job[1]["last_bit"][name]["tokens"] == alone, name
    assert [sum(found["differences"] for found in rank["last_bit"].values()) > 9 for rank in job] == [False, True]


def test_what_cannot_be_decoded_is_refused_on_every_rank(job):
    for rank in job:
        told = rank["refusals"]
        assert "compile: got True with a model sharded over 2 ranks" in told["compile"]
        assert told["graphs"].startswith("graphs: got True, but the model is")
        assert told["prompts"].startswith("input_ids: rank 1 got another value than rank 0")
        assert told["criteria"].startswith("stopping_criteria: rank 1 got another value")
        assert told["seeds"].startswith("do_sample, seed: rank 1 got another value")
        assert "0.00 GiB of memory are free" in told["memory"]
        assert "1 key heads (num_key_value_heads) and 4 query heads cannot be divided over 2" in told["heads"]
        assert "'model.layers.0.mlp' has its own forward" in told["patch"]
        assert "'lm_head' has its own forward" in told["patched shard"]
        assert len(told["after"][0]) == ONE["input_ids"].shape[1] + 3


def test_rank_0_decides_what_clocks_decide(job):
    """A criterion that ends on rank 1 alone, and first-use timings with another clock there."""
    engine, request = firp.Engine(model_of("llama")), {**ONE, "max_new_tokens": 9, "do_sample": False}
    alone = [decoded(engine, {**request, **more})["tokens"] for more in ({"max_new_tokens": 5}, {})]
    for rank in job:
        assert [rank["clocks"][name]["tokens"] for name in ("impatient", "timed")] == alone
    assert job[0]["clocks"]["rungs"] == job[1]["clocks"]["rungs"]
    assert [len(rank["clocks"]["kept"]) for rank in job] == [1, 0]


def test_which_parts_run_over_shards(job):
    """As `firp doctor --tp` says: transformers' own modules, but for the norms."""
    for rank in job:
        own = {name for name in rank["parts"]["inside"] if name.startswith(("FewRow", "Joint"))}
        assert own <= {"FewRowNorm"} and "LlamaAttention" in rank["parts"]["inside"]
        assert rank["parts"]["heads"] == [2, 1, 8]


def check_sent(ranks: list[dict], families: tuple[str, ...], kv_heads: int) -> None:
    """What ranks hold and send is what `firp doctor --plan` counts."""
    size, draft = len(ranks), Draft(SMALL_TREE, 3, 1)
    for family in families:
        config = model_of(family, kv_heads).config
        weights = weights_of(config, torch.float32, size)
        assert max(rank["sent"][family]["held"] for rank in ranks) == weights.bytes, family
        for name, drafts in (("plain", replace(draft, tree=None)), ("FIRP", draft)):
            counted = step_work(config, weights, torch.device("cpu"), 2, 3, drafts, size).collectives
            for rank in ranks:
                sent = rank["sent"][family]["steps"][name]
                for kind in {kind for kind, _ in sent} | set(counted):
                    found = [number for other, number in sent if other == kind]
                    assert Sent(len(found), sum(found)) == counted[kind], (family, name, kind)


def test_ranks_hold_and_send_what_is_computed(job):
    check_sent(job, FAMILIES, kv_heads=2)


def test_rank_0_alone_prints(job):
    assert [rank["command"]["code"] for rank in job] == [0, 0]
    assert "identical output: yes" in job[0]["command"]["said"] and job[1]["command"]["said"] == ""


def test_heads_that_cannot_be_divided_are_named():
    config = AutoConfig.for_model("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"its 3 key heads .* 9 query heads cannot be divided over 2 .* expected 3 r"):
        local_heads(config, config.base_model_tp_plan, 2)
    assert local_heads(config, config.base_model_tp_plan, 3) == (3, 1)
    assert local_heads(config, {"lm_head": "colwise_gather_output"}, 2) == (9, 3)


def test_one_process_asks_nobody():
    ranks, tensors = Ranks(), (torch.tensor([1]),)
    assert ranks.agree(tensors) is tensors and ranks.first(lambda: 3) == 3 and ranks.least(4) == 4 and ranks.leads
    ranks.check_same({"anything": object()})


@pytest.fixture
def exhaustive(request):
    if not request.config.getoption("--exhaustive"):
        pytest.skip("without --exhaustive")


@pytest.mark.parametrize("size", [2, 4])
def test_more_families_and_ranks(exhaustive, tmp_path, size):
    families = MORE_FAMILIES
    write_models(tmp_path, (*families, "ties"), kv_heads=4)
    ranks = run_job(tmp_path, size, [*families, "stops", "last_bit", "sent"])
    check_sent(ranks, families, kv_heads=4)
    for family in families:
        check_family(ranks, family, kv_heads=4)


def test_a_pod_of_a_scheduler_is_no_job_of_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(LAUNCHED, raising=False)
    assert (launched_ranks(), launched_rank()) == (1, 0) and TrainingRanks.of_torchrun("cpu")[0].size == 1
