"""`firp doctor --plan`: every figure is marked as computed, the memory is the doctor's own, bad input is one line."""

import re

import pytest

PAPER = "computed, not measured"


def rows(out, title):
    """Cells of the table of that title, by its first column."""
    body = out[out.index(title) :].split("└")[0]
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in body.splitlines() if line.startswith("│")
    ]
    return {name: rest for name, *rest in cells}


def test_a_plan_of_several_ranks(cli):
    code, out, err = cli("doctor", "--plan", "llama2-70b", "--tp", 8, "--batch", 16, "--context", 8192)
    assert code == 0, err
    titles = ("one step on each rank", "sent in one step", "memory of each rank", "training, a million tokens")
    for title in (*titles, "FIRP breaks even at tau", "Each training rank holds"):
        (line,) = [line for line in out.splitlines() if title in line]
        assert PAPER in line, line
    assert "meta-llama/Llama-2-70b-hf" in out and "NVIDIA's H100 SXM datasheet" in out and "latency: assumed" in out
    assert "8192 is past the 4096 of the model" in out and "implementation of each op" not in out
    assert rows(out, titles[0])["layers below t"][:2] == ["11.34", "181.4"]
    assert [rows(out, titles[1])[kind][0] for kind in ("all-reduce", "all-gather", "broadcast")] == ["161", "1", "1"]
    # 16 sequences, 10,240 slots, 80 layers, one key head of 128: 2 x 2 bytes each.
    assert rows(out, titles[2])["cache"] == ["6.25 GiB", "6.25 GiB"]
    assert rows(out, titles[2])["weights"][0] == "16.06 GiB"


def test_one_rank_sends_nothing(cli):
    code, out, _ = cli("doctor", "--plan", "qwen3-30b-a3b", "--context", 1000, "--device-rates", "h200", "--flops", 500)
    assert code == 0 and "sent in one step" not in out and "as given: flops" in out and "500.00 TFLOP/s" in out


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_is_that_of_the_doctor(cli, folder, tp):
    """Of a folder's model and predictor, on this machine's own rates."""
    shared = (
        "--predictor", folder / "predictor", "-N", 4, "-P", 2, "--dtype", "float32", "--device", "cpu", "--tp", tp,
        "--batch-size", 3,
    )  # fmt: skip
    _, doctor, _ = cli("doctor", "--model", folder / "model", "--max-len", 200, *shared)
    rates = ("--device-rates", "measured", "--bandwidth", 10, "--flops", 1, "--link-bandwidth", 1, "--latency", 9)
    code, plan, err = cli("doctor", "--plan", folder / "model", "--context", 200, *shared, *rates)
    assert code == 0, err
    told, planned = rows(doctor, str(folder / "model")), rows(plan, "memory of each rank")
    parts = ("weights", "predictor", "cache", "scores", "scratch", "graphs", "all")
    assert [told[part][0] for part in parts] == [planned[part][1] for part in parts]
    assert "as given: bandwidth, flops, link_bandwidth, latency" in plan
    assert re.search(r"N = 4, P = 2, k = 3: 10 rows a sequence", plan)


BAD = {
    "plan: model: got 'llama9-1b'": ("--plan", "llama9-1b"),
    "model: its 8 key heads (num_key_value_heads) and 64 query heads cannot be divided over 3": (
        "--plan", "llama2-70b", "--tp", 3,
    ),
    "context: got 0": ("--plan", "llama2-7b", "--context", 0),
    "context: given without a plan": ("--context", 100),
    "latency: given without a plan": ("--latency", 5),
    "insertion_layer: given without a plan": ("--insertion-layer", 5),
    "device_rates: given without a plan": ("--device-rates", "h100"),
    "num_offsets: got 0": ("--plan", "llama2-7b", "--num-offsets", 0),
    "num_offsets: got 300": ("--plan", "llama2-7b", "--num-offsets", 300),
    "insertion_layer: got 32": ("--plan", "llama2-7b", "--insertion-layer", 32),
    "num_lookahead: got 9": ("--plan", "llama2-7b", "-N", 4, "-P", 9),
    "nodes: got 1, which is plain decoding": ("--plan", "llama2-7b", "-N", 1),
    "max_len: given with a plan": ("--plan", "llama2-7b", "--max-len", 100),
    "model: given with a plan": ("--plan", "llama2-7b", "--model", "smollm2-135m"),
    "device: given with device_rates 'h100'": ("--plan", "llama2-7b", "--device", "cpu"),
    "device_rates: got 'abacus'": ("--plan", "llama2-7b", "--device-rates", "abacus"),
    "bandwidth: got -1": ("--plan", "llama2-7b", "--bandwidth", -1),
    "flops: not known of the device rates 'h100' in float32": ("--plan", "llama2-7b", "--dtype", "float32"),
    "dtype: got 'float12'": ("--plan", "llama2-7b", "--dtype", "float12"),
    "batch_size: got 0": ("--plan", "llama2-7b", "--batch", 0),
}  # fmt: skip


@pytest.mark.parametrize("told", BAD)
def test_bad_input_is_one_line(cli, told):
    code, out, err = cli("doctor", *BAD[told])
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {told}") and PAPER not in out, err


def test_a_predictor_of_another_model_is_refused(cli, folder):
    code, _, err = cli("doctor", "--plan", "llama2-7b", "--predictor", folder / "predictor")
    assert code == 2 and "error: predictor: hidden_size differs" in err
    code, _, err = cli("doctor", "--plan", folder / "model", "--predictor", folder / "predictor", "--num-offsets", 2)
    assert code == 2 and "error: num_offsets, insertion_layer: given with a predictor" in err


def test_a_model_that_cannot_be_decoded_is_refused(cli, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, err = cli("doctor", "--plan", tmp_path)
    assert code == 2 and "error: plan: got model_type 'gpt2', expected one that FIRP decodes" in err
