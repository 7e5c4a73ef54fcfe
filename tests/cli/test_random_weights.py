"""`firp bench --random-weights`: step cost at a shape, marked as such, refused where it cannot fit."""

import json

import firp.bench.random_weights as random_weights
import firp.tools.hardware
import pytest
import torch
from firp.bench.random_weights import build, cache_bytes, shape_config
from firp.bench.step_cost import step_bytes


def test_step_cost_is_measured_and_marked(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(firp.tools.hardware.COPY_BYTES, "cpu", 1 << 20)
    out = tmp_path / "cost.json"
    code, text, err = cli(
        "bench",
        "--random-weights",
        "tiny",
        "--device",
        "cpu",
        "--contexts",
        "20,40",
        "-N",
        4,
        "-P",
        2,
        "--repeats",
        2,
        "--json",
        out,
    )
    assert code == 0 and "random weights" in text, err
    document = json.loads(out.read_text())
    assert document["random_weights"] == "tiny" and "random weights" in document["note"]
    found = [(e["context"], e["method"], e["num_nodes"], e["num_lookahead"], e["rows"]) for e in document["steps"]]
    assert found == [(c, *rest) for c in (20, 40) for rest in (("plain", 1, 0, 1), ("firp", 4, 2, 10))]
    bandwidth = document["copy_bandwidth_bytes_per_second"]
    for entry in document["steps"]:
        assert entry["bandwidth_share"] == pytest.approx(
            entry["bytes"] / (entry["step_ms"]["median"] / 1e3) / bandwidth
        )
        assert set(entry["break_even_tau"]) == {"median", "min", "max"}
        if entry["method"] == "plain":
            assert entry["break_even_tau"]["median"] == 1


def test_the_bytes_of_a_step_by_hand():
    model, predictor = build("tiny", torch.bfloat16, "cpu", 3, 0)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    weights = 2 * (4 * layer + 64 + 64 * 128)
    assert step_bytes(model, None, 0) == weights
    assert step_bytes(model, predictor, 100, 2) == weights + 2 * 3 * 64 * 64 + 2 * (2 * 4 * 2 * 16 * 100 * 2)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320), ("llama3-8b", 8_030_261_248)],
)
def test_shapes_are_those_of_the_published_models(shape, parameters):
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(shape_config(shape))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_random_weights_are_finite_and_repeatable():
    first, second = (build("tiny", torch.float32, "cpu", 2, 0) for _ in range(2))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        scores = [model(ids).logits for model, _ in (first, second)]
    assert torch.equal(*scores) and bool(scores[0].isfinite().all())
    assert torch.equal(first[1].weight, second[1].weight) and first[1].insertion_layer == 2
    assert first[0].model.rotary_emb.inv_freq.dtype == torch.float32


def test_too_little_memory_is_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(random_weights, "available_memory", lambda _: 10_000_000_000)
    with pytest.raises(
        ValueError, match=r"'llama2-7b' in bfloat16 needs 15\.7 GB on cpu \(weights 13\.6 GB.*10\.0 GB are free"
    ):
        build("llama2-7b", torch.bfloat16, "cpu", 3, 4096)
    assert cache_bytes(shape_config("llama3-8b"), 1, torch.bfloat16) == 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("random_weights", ("--random-weights", "llama9-1b")),
        ("contexts", ("--random-weights", "tiny", "--contexts", "1k")),
        ("context", ("--random-weights", "tiny", "--contexts", "100000")),
        ("num_lookahead", ("--random-weights", "tiny", "-N", "2", "-P", "5")),
        ("plot", ("--random-weights", "tiny", "--plot", "cost.png")),
        ("repeats", ("--random-weights", "tiny", "--repeats", "0")),
    ],
)
def test_bad_input_is_one_line(cli, monkeypatch, field, arguments):
    monkeypatch.setitem(firp.tools.hardware.COPY_BYTES, "cpu", 1 << 20)
    code, _, err = cli("bench", "--device", "cpu", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {field}:"), err
