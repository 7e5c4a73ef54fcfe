"""`firp tune` on a tiny model: what it measures, writes and refuses."""

import json
import shutil

import firp
import pytest
import torch
from firp.drafting.choices import PAYS, choice_file, find_profile, load_choice
from firp.drafting.profile import load_profile
from firp.tools.hardware import machine_name
from firp.tune.tuner import Tuner


@pytest.fixture
def predictor(folder, tmp_path, monkeypatch):
    """A copy, and a cache folder of its own."""
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
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

    loaded = firp.load_predictor(predictor)
    kept = load_choice(choice_file(loaded), machine_name("cpu", torch.float32))
    assert kept.head == document["head"] and kept.num_offsets == document["num_offsets"]
    for size in (1, 3):
        batch = document["batch_sizes"][str(size)]
        figures = {
            (p["num_nodes"], p["num_lookahead"], p["tree_kind"]): p
            for p in batch["finalists"]
            if p["num_offsets"] == kept.num_offsets or p["rows"] == 1
        }
        for rung in kept.batches[size]:
            point = figures[rung.tree.num_nodes, rung.tree.num_lookahead, rung.tree.kind]
            assert 1e3 * rung.seconds == pytest.approx(point["step_ms"])
            # A batch is done when its slowest answer is: its figures are of that one, a rung's tau is of each sequence.
            assert rung.tau == point["tau"] if size == 1 else rung.tau >= point["tau"]
        trees = {(rung.tree.num_nodes, rung.tree.num_lookahead, rung.tree.kind) for rung in kept.batches[size]}
        least = 0 if size == 1 else PAYS * batch["plain"]["tokens_per_second"]
        paying = {key for key, p in figures.items() if p["tokens_per_second"] >= least or p["rows"] == 1}
        assert trees == paying
    profile = load_profile(find_profile(loaded))
    assert profile.lengths.sum() > 0 and profile.num_offsets == 3


def test_an_interrupted_tune_writes_nothing(cli, arguments, predictor, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "_measure_finalists", stop)
    assert (
        cli(*arguments, "-N", "4", "-P", "1", "--json", tmp_path / "tune.json", "--plot", tmp_path / "tune.png")[0]
        == 130
    )
    assert not list((tmp_path / "cache").rglob("*.*"))
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
    assert not choice_file(firp.load_predictor(predictor)).exists()
