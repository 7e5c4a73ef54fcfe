"""`--methods hf-compiled`: Hugging Face's static cache and torch.compile, warmed up before it is timed."""

import json

import firp.bench.compiled as compiled
import pytest
import torch
import torch._inductor.config
from firp.bench.compiled import CompiledGenerate, check_compilable
from transformers import LlamaConfig, LlamaForCausalLM


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_compiled_output_and_one_compilation_a_cache_size(monkeypatch):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = small_model()
    generate = CompiledGenerate(model)
    generate.config.backend, generate.config.mode = backend, None
    monkeypatch.setattr(compiled, "CACHE_STEP", 32)
    for length, new_tokens, expected in ((3, 10, 1), (7, 12, 1), (2, 2, 1), (30, 20, 2), (9, 30, 2)):
        ids = torch.randint(1, 32, (1, length))
        generate.prepare(ids, new_tokens)
        before = len(compilations)
        out = generate(ids, new_tokens)
        assert len(compilations) == before == expected, "compiled while timed"
        assert torch.equal(
            out, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        )


def test_bench_runs_it(cli, folder, tmp_path):
    try:
        check_compilable(small_model())
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "bench.json"
    code, _, err = cli(
        "bench", "--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--limit", 2, "--max-new-tokens",
        6,
        "--dtype", "float32", "--device", "cpu", "--repeats", 1, "--methods", "hf,hf-compiled", "--json", out,
    )  # fmt: skip
    assert code == 0, err
    entry = json.loads(out.read_text())["methods"]["hf-compiled"]
    assert entry["tau"] == 1 and entry["identical_to_hf"]["identical"] == 2


def test_it_is_refused_where_it_cannot_work(monkeypatch):
    model = small_model()
    # Not by monkeypatch: older versions of torch forget an option that it has put back.
    without = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/c++",)})
    with without, pytest.raises(ValueError, match=r"methods: 'hf-compiled' cannot run here: no C\+\+ compiler"):
        check_compilable(model)
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ValueError, match="methods: 'hf-compiled' cannot run here: LlamaForCausalLM"):
        check_compilable(model)
