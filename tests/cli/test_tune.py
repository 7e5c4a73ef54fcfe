"""`firp tune` on a tiny model: what it measures, writes and refuses."""

import json
import shutil

import firp
import pytest
import torch
from firp.drafting.tuned import FILE_NAME, machine, own_tree
from firp.tune.tuner import Tuner


@pytest.fixture
def predictor(folder, tmp_path):
    """A copy that may be written to."""
    return shutil.copytree(folder / "predictor", tmp_path / "predictor")


@pytest.fixture
def arguments(folder, predictor):
    return (
        "tune", "--model", folder / "model", "--predictor", predictor, "--prompts", folder / "prompts.jsonl",
        "--limit", 4,
        "--max-new-tokens", 12, "--dtype", "float32", "--device", "cpu", "--steps", 2, "--repeats", 2,
    )  # fmt: skip


def test_tune_writes_its_choice_and_its_figures(cli, arguments, predictor, tmp_path):
    out, picture = tmp_path / "tune.json", tmp_path / "tune.png"
    code, text, err = cli(
        *arguments, "--batch-sizes", "1,3", "-N", "4,8", "-P", "1,2", "--json", out, "--plot", picture
    )
    assert code == 0 and "vs plain" in text, err
    document = json.loads(out.read_text())
    assert set(document["batch_sizes"]) == {"1", "3"} and 1 <= document["num_offsets"] <= 3
    for size, batch in document["batch_sizes"].items():
        for point in (*batch["grid"], *batch["finalists"]):
            rate = int(size) * point["tau"] / (point["step_ms"] / 1e3)
            assert point["tokens_per_second"] == pytest.approx(rate) and point["tau"] >= 1
        assert (
            batch["chosen"] in batch["finalists"]
            and batch["plain"] in batch["finalists"]
            and batch["own"] in batch["finalists"]
        )
        assert batch["plain"]["tau"] == 1 and batch["plain"]["rows"] == 1
        assert {point["num_nodes"] for point in batch["grid"]} <= {1, 4, 8}
    assert document["batch_sizes"]["3"]["chosen"]["rows"] <= document["batch_sizes"]["1"]["chosen"]["rows"]
    assert picture.stat().st_size > 10_000

    kept = json.loads((predictor / FILE_NAME).read_text())
    assert list(kept) == [machine("cpu", torch.float32)]
    assert kept[machine("cpu", torch.float32)]["head"] == document["head"]
    _, tree, _ = own_tree(firp.load_predictor(predictor), "cpu", torch.float32)
    for size in (1, 3):
        chosen = document["batch_sizes"][str(size)]["chosen"]
        assert tree.for_batch(size) == firp.TreeConfig(
            chosen["num_nodes"], chosen["num_lookahead"], chosen["tree_kind"]
        )


def test_an_interrupted_tune_writes_nothing(cli, arguments, predictor, tmp_path, monkeypatch):
    before = sorted(path.name for path in predictor.iterdir())

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "_measure_finalists", stop)
    assert (
        cli(*arguments, "-N", "4", "-P", "1", "--json", tmp_path / "tune.json", "--plot", tmp_path / "tune.png")[0]
        == 130
    )
    assert sorted(path.name for path in predictor.iterdir()) == before
    assert not (tmp_path / "tune.json").exists() and not (tmp_path / "tune.png").exists()


BAD = {
    "batch_sizes": ("--batch-sizes", "1,x"),
    "nodes": ("-N", "0"),
    "num_nodes": ("-N", "999"),
    "lookahead": ("-P", ""),
    "tree_kind": ("--kinds", "bush"),
    "offsets": ("--offsets", "-1"),
    "num_offsets": ("--offsets", "9"),
    "steps": ("--steps", "0"),
    "repeats": ("--repeats", "0"),
    "max_new_tokens": ("--max-new-tokens", "0"),
    "context": ("--context", "5000"),
    "limit": ("--limit", "0"),
    "prompts": ("--prompts", "/nowhere.jsonl"),
    "predictor": ("--predictor", "/nowhere/at/all"),
    "device": ("--device", "toaster"),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_input_is_one_line(cli, arguments, predictor, field):
    code, _, err = cli(*arguments, *BAD[field])
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {field}:"), err
    assert not (predictor / FILE_NAME).exists()
