"""How the vLLM plug-in enters vLLM's classes, what it takes and what it refuses, without vLLM."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import firp
import pytest
from fake_vllm import BLOCK, make_runner, written
from firp.integrations import vllm_checkpoint
from models import tiny_model, tiny_predictor

ROOT = Path(__file__).parents[2]


def test_a_version_that_was_not_tested_is_refused_by_name(monkeypatch, tmp_path):
    vllm = fake_vllm.installed(monkeypatch, "0.33.1")
    model = tiny_model(1)
    folder = written(tmp_path, model, tiny_predictor(model, 1))
    with pytest.raises(ValueError, match=r"vllm: got version 0\.33\.1, expected 0\.32\.0"):
        make_runner(vllm, model, folder)
    runner = make_runner(vllm, model, tmp_path)
    assert runner.drafter == "vLLM's own" and runner.speculative_config.method == "draft_model"


def test_a_vllm_without_firp_stays_as_it_is(vllm, tmp_path):
    runner = make_runner(vllm, tiny_model(1), tmp_path)
    assert runner.drafter == "vLLM's own"
    assert runner.speculative_config.method == "draft_model" and not runner.speculative_config.disable_eagle_block_drop
    assert runner.vllm_config._get_v2_model_runner_unsupported_features() == []
    assert not hasattr(vllm["vllm.v1.worker.gpu_model_runner"].GPUModelRunner.__init__, "firp")
    assert "firp_vllm.proposer" not in sys.modules and vllm["vllm"].ModelRegistry.models == {}


def test_registering_twice_wraps_once(vllm, tmp_path):
    model = tiny_model(1)
    folder = written(tmp_path, model, tiny_predictor(model, 1))
    for _ in range(2):
        runner = make_runner(vllm, model, folder)
    assert runner.speculative_config.method == "eagle3" and runner.speculative_config.disable_eagle_block_drop
    assert runner.vllm_config._get_v2_model_runner_unsupported_features() == ["FIRP speculative decoding"]
    assert list(vllm["vllm"].ModelRegistry.models) == [vllm_checkpoint.ARCHITECTURE]


GIVEN = {
    "tensor_parallel_size": 2, "quantization": "fp8", "moe_backend": "triton", "attention_backend": "FLASH_ATTN",
    "kv_cache_dtype": "fp8", "code_revision": "main", "draft_load_config": {"load_format": "dummy"},
    "index_share_for_mtp_iteration": True, "use_local_argmax_reduction": True, "use_heterogeneous_vocab": True,
    "prompt_lookup_max": 4, "prompt_lookup_min": 2, "parallel_drafting": True, "suffix_decoding_max_tree_depth": 8,
    "suffix_decoding_max_cached_requests": 0, "suffix_decoding_max_spec_factor": 2.0,
    "suffix_decoding_min_token_prob": 0.5, "rejection_sample_method": "block", "synthetic_acceptance_rates": [0.5],
    "synthetic_acceptance_length": 2.0, "enable_adaptive_verification": True, "draft_sample_method": "probabilistic",
    "dspark_draft_topk": 8, "draft_tensor_parallel_size": 2, "enforce_eager": False, "method": "eagle",
    "draft_model_config": {"model": "x"}, "draft_parallel_config": {"rank": 1},
}  # fmt: skip


@pytest.mark.parametrize("field", GIVEN)
def test_an_option_without_effect_is_refused(vllm, tmp_path, field):
    model = tiny_model(1)
    folder = written(tmp_path, model, tiny_predictor(model, 1))
    with pytest.raises(ValueError, match=re.escape(f"speculative_config: {field}: got {GIVEN[field]!r}, expected")):
        make_runner(vllm, model, folder, **{field: GIVEN[field]})
    assert make_runner(vllm, model, tmp_path, **{field: GIVEN[field]}).drafter == "vLLM's own"


@pytest.mark.parametrize(
    "options",
    [{"method": "eagle3"}, {"enforce_eager": True}, {"draft_tensor_parallel_size": 1}, {"max_model_len": 9},
     {"disable_padded_drafter_batch": True}, {"num_speculative_tokens_per_batch_size": [(1, 8, 2)]},
     {"prompt_lookup_max": 0, "prompt_lookup_min": 0}],
)  # fmt: skip
def test_an_option_with_a_meaning_is_taken(vllm, tmp_path, options):
    model = tiny_model(1)
    runner = make_runner(vllm, model, written(tmp_path, model, tiny_predictor(model, 1)), **options)
    assert runner.speculative_config.method == "eagle3" and runner.drafter != "vLLM's own"


def test_every_field_of_vllms_speculative_config_is_classified(vllm):
    from firp_vllm.options import FILLED_IN, HONOURED, UNUSED

    fields = [name for name in vars(fake_vllm.SpeculativeConfig) if name[0] != "_"]
    assert sorted(fields) == sorted([*HONOURED, *FILLED_IN, *UNUSED])
    assert GIVEN.keys() >= UNUSED.keys()


def test_more_drafts_than_offsets_are_refused(vllm, tmp_path):
    model = tiny_model(1)
    folder = written(tmp_path, model, tiny_predictor(model, 1))
    with pytest.raises(ValueError, match=r"num_speculative_tokens: got 4, expected 1\.\.3"):
        make_runner(vllm, model, folder, num_speculative_tokens=4)


def test_another_model_is_refused(vllm, tmp_path):
    model = tiny_model(1)
    folder = written(tmp_path, model, tiny_predictor(model, 1))
    with pytest.raises(firp.PredictorMismatch, match="vocab_size differs"):
        make_runner(vllm, tiny_model(1, vocab=9), folder)
    with pytest.raises(ValueError, match="model: got CohereForCausalLM, expected one of Llama"):
        make_runner(vllm, tiny_model(1, "cohere"), folder)


def test_a_runner_that_decodes_nothing_is_refused(vllm, tmp_path):
    model = tiny_model(1)
    runner = make_runner(vllm, model, written(tmp_path, model, tiny_predictor(model, 1)))
    runner.vllm_config.model_config.runner_type = "pooling"
    with pytest.raises(ValueError, match="runner: got 'pooling', expected 'generate' with FIRP"):
        type(runner.drafter)(runner.vllm_config, runner.device, runner)


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"])
def test_a_parallel_size_that_is_not_supported_is_refused(vllm, tmp_path, name):
    model = tiny_model(1)
    runner = make_runner(vllm, model, written(tmp_path, model, tiny_predictor(model, 1)))
    setattr(runner.vllm_config.parallel_config, name, 2)
    with pytest.raises(ValueError, match=f"{name}: got 2, expected 1 with FIRP"):
        type(runner.drafter)(runner.vllm_config, runner.device, runner)


def test_layers_of_two_cache_groups_are_refused(vllm, tmp_path):
    model = tiny_model(1)
    runner = make_runner(vllm, model, written(tmp_path, model, tiny_predictor(model, 1)))
    groups = [SimpleNamespace(layer_names=["layers.0", "layers.2"]), SimpleNamespace(layer_names=["layers.3"])]
    with pytest.raises(ValueError, match="are in 2 groups of the KV cache, expected 1"):
        runner.drafter.initialize_attn_backend(SimpleNamespace(kv_cache_groups=groups), [BLOCK])


def test_a_checkpoint_is_not_loaded_as_a_model(vllm):
    from firp_vllm.draft import FirpDraft

    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        FirpDraft(vllm_config=None)


def test_registering_imports_nothing_heavy_and_forgives_a_vllm_that_it_does_not_know():
    code = (
        "import sys, firp_vllm; firp_vllm.register();"
        "print(sorted({'torch', 'firp', 'vllm', 'transformers'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT / "python", capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n" and "the plug-in is not active in this vLLM" in done.stderr


def test_an_existing_folder_is_not_overwritten(tmp_path):
    model = tiny_model(1)
    folder = written(tmp_path, model, tiny_predictor(model, 1))
    with pytest.raises(FileExistsError):
        written(tmp_path, model, tiny_predictor(model, 1))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "predictor"]
