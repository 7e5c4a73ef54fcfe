"""The command line on a tiny model: what it writes, and one line for every bad input."""

import json

import firp
import numpy as np
import pytest
import torch
from firp.drafting.choices import Choice, Rung, choice_file, save_choice
from firp.drafting.trees import TreeConfig
from firp.tools.hardware import machine_name


def base(folder):
    return ("--model", folder / "model", "--predictor", folder / "predictor", "--device", "cpu")


def test_generate_compares(cli, folder):
    code, out, _ = cli("generate", "w1 w2", *base(folder), "--dtype", "float32", "--compare", "--max-new-tokens", 12)
    assert code == 0 and "identical output: yes" in out and "tau" in out and "median of 3 answers in turns" in out


def test_answers_that_take_long_are_not_repeated(cli, folder, monkeypatch):
    monkeypatch.setattr("firp.cli.generate.LONG", 0.0)
    code, out, _ = cli("generate", "w1 w2", *base(folder), "--dtype", "float32", "--compare", "--max-new-tokens", 3)
    assert code == 0 and "identical output: yes" in out and "in turns" not in out


def test_generate_samples_the_same_text_with_and_without_drafting(cli, folder):
    common = ("--dtype", "float32", "--temperature", 1.0, "--seed", 5, "--max-new-tokens", 20)
    code, out, _ = cli("generate", "w1 w2", *base(folder), *common, "--compare")
    assert code == 0 and "identical output: yes" in out


def test_bench_writes_its_figures(cli, folder, tmp_path):
    out = tmp_path / "bench.json"
    code, table, _ = cli(
        "bench", *base(folder), "--prompts", folder / "prompts.jsonl", "--limit", 4, "--max-new-tokens", 8,
        "--dtype", "float32", "--repeats", 2, "--json", out, "--plot", tmp_path / "bench.png",
    )  # fmt: skip
    assert code == 0 and "firp" in table
    document = json.loads(out.read_text())
    assert set(document["methods"]) == {"ar", "firp", "hf", "prompt-lookup"}
    for part in (document, *document["categories"].values()):
        for entry in part["methods"].values():
            assert isinstance(entry["tau"], float) and set(entry["tokens_per_second"]) == {"median", "min", "max"}
            assert set(entry["speedup_vs_ar"]) == set(entry["speedup_vs_hf"]) == {"median", "min", "max"}
            assert entry["identical_to_hf"]["identical"] == entry["identical_to_hf"]["total"]
            assert entry["identical_to_hf"]["differences"] == []
    assert document["methods"]["ar"]["tau"] == 1.0 and (tmp_path / "bench.png").stat().st_size > 1000


def test_bench_serves_conversations(cli, folder, tmp_path):
    prompts = tmp_path / "turns.jsonl"
    prompts.write_text('{"question_id": 81, "category": "writing", "turns": ["w1 w2", "w3 w4"]}\n')
    common = (
        "bench",
        *base(folder),
        "--prompts",
        prompts,
        "--methods",
        "ar,firp,hf",
        "--dtype",
        "float32",
        "--repeats",
        1,
        "--max-new-tokens",
        8,
    )
    assert cli(*common, "--json", tmp_path / "one.json")[0] == 0
    assert cli(*common, "--all-turns", "--json", tmp_path / "all.json")[0] == 0
    totals = [
        json.loads((tmp_path / name).read_text())["methods"]["hf"]["identical_to_hf"]["total"]
        for name in ("one.json", "all.json")
    ]
    assert totals == [1, 2]


def test_distill_then_train(cli, folder, tmp_path):
    data, output = tmp_path / "text.npz", tmp_path / "predictor"
    common = ("--model", folder / "model", "--device", "cpu")
    assert (
        cli(
            "distill",
            "--prompts",
            folder / "prompts.jsonl",
            "--output",
            data,
            *common,
            "--max-new-tokens",
            12,
            "--batch-size",
            4,
        )[0]
        == 0
    )
    with np.load(data) as arrays:
        assert len(arrays["prompt_lengths"]) == 20 and arrays["offsets"][-1] == len(arrays["tokens"])
        assert set(arrays["greedy"].tolist()) == {True, False}
    train = (
        "train",
        "--data",
        data,
        "--output",
        output,
        *common,
        "--insertion-layer",
        2,
        "--steps",
        3,
        "--batch-size",
        4,
        "--held-out",
        4,
        "--anchors",
        4,
        "--max-length",
        32,
        "--transition-rank",
        4,
    )
    code, out, err = cli(*train)
    assert code == 0, err
    assert (output / "model.safetensors").is_file()
    code, out, _ = cli(
        "generate",
        "w1",
        "--model",
        folder / "model",
        "--predictor",
        output,
        "--dtype",
        "float32",
        "--compare",
        "--max-new-tokens",
        6,
    )
    assert code == 0 and "identical output: yes" in out


def test_doctor(cli):
    code, out, _ = cli("doctor")
    assert code == 0 and "tree_attention" in out and "memory:" not in out


def test_doctor_prints_the_timed_steps(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path))
    arguments = ("doctor", "--model", folder / "model", "--predictor", folder / "predictor", "--dtype", "float32")
    code, out, _ = cli(*arguments, "--device", "cpu")
    assert code == 0 and "no steps were timed yet" in out
    rungs = (Rung(TreeConfig(1, 1), 2e-3, 1.0), Rung(TreeConfig(7, 3), 3e-3, 1.25))
    path = choice_file(firp.load_predictor(folder / "predictor"))
    save_choice(path, machine_name("cpu", torch.float32), Choice(2, None, {4: rungs}, "first use"))
    code, out, _ = cli(*arguments, "--device", "cpu")
    assert (
        code == 0 and "3.00 ms" in out and "1.250" in out and "first use" in out and str(path) in out.replace("\n", "")
    )


def test_doctor_plans_memory(cli, folder):
    arguments = ("doctor", "--model", folder / "model", "--max-len", 100, "--dtype", "float32", "--device", "cpu")
    code, out, _ = cli(*arguments)
    assert code == 0 and "plain decoding" in out and "it fits" in out
    code, out, _ = cli(*arguments, "--predictor", folder / "predictor", "-N", 4, "-P", 2)
    assert code == 0 and "N = 4, P = 2, k = 3" in out and "free on cpu" in out
    for wrong in (("--max-len", 257), ("--batch-size", 0), ("-N", 4)):
        code, _, err = cli(*arguments, *wrong)
        assert code == 2 and wrong[0].strip("-N").replace("-", "_") in err
    for option, name in (("--max-len", "max_len"), ("--batch-size", "batch_size"), ("-N", "nodes"), ("--tp", "tp")):
        code, _, err = cli("doctor", option, 100)
        assert code == 2 and f"{name}: given without a model" in err
    code, _, err = cli("doctor", "--predictor", folder / "predictor")
    assert code == 2 and "predictor: given without a model" in err


BAD = {
    "dtype": ("generate", "w1", "--dtype", "float12"),
    "predictor": ("generate", "w1", "--predictor", "/nowhere/at/all"),
    "model": ("generate", "w1", "--model", "/nowhere/at/all"),
    "prompt": ("generate", ""),
    "num_nodes": ("generate", "w1", "-N", 1000),
    "num_lookahead": ("generate", "w1", "-N", 4, "-P", 9),
    "tree_kind": ("generate", "w1", "--tree-kind", "bush"),
    "max_new_tokens": ("generate", "w1", "--max-new-tokens", 5000),
    "temperature": ("generate", "w1", "--temperature", -1),
    "methods": ("bench", "--methods", "ar,magic"),
    "limit": ("bench", "--limit", 0),
    "repeats": ("bench", "--repeats", 0),
    "prompts": ("bench", "--prompts", "/nowhere.jsonl"),
    "data": ("train", "--data", "/nowhere.npz", "--output", "/tmp/firp-none"),
    "device": ("generate", "w1", "--device", "toaster"),
}  # fmt: skip


@pytest.mark.parametrize("field", BAD)
def test_bad_input_is_one_line(cli, folder, field):
    command, *rest = BAD[field]
    given = {str(argument) for argument in rest}
    arguments = [command, *rest]
    if "--model" not in given:
        arguments += ["--model", folder / "model"]
    if command != "train" and "--predictor" not in given:
        arguments += ["--predictor", folder / "predictor"]
    if command == "bench" and "--prompts" not in given:
        arguments += ["--prompts", folder / "prompts.jsonl"]
    code, _, err = cli(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {field}"), err


@pytest.mark.parametrize(
    "line", ["{broken", '{"prompt": 3}', '{"text": "x"}', "[1]", '{"turns": []}', '{"prompt": ""}']
)
def test_a_malformed_line_is_named(cli, folder, tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1"}\n' + line + "\n")
    code, _, err = cli("bench", *base(folder), "--prompts", path)
    assert code == 2 and "line 2" in err
