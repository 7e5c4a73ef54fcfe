"""Adapters of pseudo rows: node rows never see them, they learn alone, and a command goes on."""

import json

import pytest
import torch
from firp.decoder.passes import pseudo_rows, real_rows
from firp.decoder.view import DecoderView
from firp.train.trainer import CHECKPOINT
from models import tiny_model, tiny_predictor

from benchmarks.ablations import adapters


class Tokenizer:
    chat_template = None

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [4 + (len(text) * i) % 25 for i in range(len(text))]})


def rows_of(view, weight):
    tokens = torch.arange(4, 16)[None]
    real = real_rows(view, tokens, 2)
    return real, pseudo_rows(view, weight, real, torch.tensor([[3, 8]]), 2)


@torch.no_grad()
def test_adapters_change_pseudo_rows_alone():
    model = tiny_model(1, vocab=31, dtype=torch.float32)
    weight = tiny_predictor(model, 1).weight
    plain, before = rows_of(DecoderView(model), weight)
    view = adapters.AdaptedView(model, 2, 3, 0)
    _, as_before = rows_of(view, weight)
    assert torch.equal(as_before, before)
    for outer in view.adapters[1::2]:
        outer.normal_(generator=torch.Generator().manual_seed(0))
    real, changed = rows_of(view, weight)
    assert torch.equal(real.final, plain.final)
    assert not torch.allclose(changed, before)


@torch.no_grad()
def test_an_adapter_adds_a_product_of_its_rank():
    model = tiny_model(1, vocab=31, dtype=torch.float32)
    view = adapters.AdaptedView(model, 2, 3, 0)
    assert len(view.adapters) == 2 * 7 * (view.num_layers - 2)
    linear = view.layers[2].mlp.down_proj
    linear.outer.normal_()
    rows = torch.randn(5, linear.inner.shape[0])
    used = linear.used
    used[0] = False
    own = model.model.layers[2].mlp.down_proj(rows)
    assert torch.equal(linear(rows), own)
    used[0] = True
    torch.testing.assert_close(linear(rows), own + rows @ (linear.inner @ linear.outer), rtol=1e-4, atol=1e-4)


@pytest.fixture
def command(tmp_path, monkeypatch, random_text):
    """The command on a tiny model; its parts, and the trainers that ran."""
    model = tiny_model(1, vocab=31, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    start = tiny_predictor(model, 1, num_offsets=2)
    start.save_pretrained(tmp_path / "start")
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: (model, Tokenizer()))
    monkeypatch.setattr("firp.load_model", lambda *_: (model, Tokenizer()))
    monkeypatch.setattr(adapters, "TREES", ((2, 2, 1), (4, 2, 2)))
    monkeypatch.setattr(adapters, "VARIANTS", {"adapters": 1e-1, "maps": 1e-2})
    trained, run = [], adapters.AdapterTrainer.run
    monkeypatch.setattr(adapters.AdapterTrainer, "run", lambda self, **_: (trained.append(self), run(self))[1])
    lines = [json.dumps({"id": str(i), "category": "ab"[i % 2], "prompt": "x" * (5 + i)}) + "\n" for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    data = random_text(40)

    def once() -> dict:
        adapters.main(
            data, tmp_path / "runs", tmp_path / "prompts.jsonl", tmp_path / "adapters.json", "tiny",
            str(tmp_path / "start"), rank=3, steps=4, batch_size=4, anchors=4, held_out=4, limit=4, max_new_tokens=8,
            seed=0, dtype="float32", device="cpu",
        )  # fmt: skip
        return json.loads((tmp_path / "adapters.json").read_text())["parts"]

    return once, trained, start


def test_maps_or_adapters_learn_alone(command):
    once, trained, start = command
    figures = {name: part["figures"] for name, part in once().items()}
    assert list(figures) == ["start", "adapters", "maps"]
    adapted, maps = (trainer.predictor for trainer in trained)
    for name, tensor in start.state_dict().items():
        assert torch.equal(adapted.state_dict()[name], tensor), name
        assert torch.equal(maps.state_dict()[name], tensor) == (name != "weight"), name
    assert all(outer.abs().sum() > 0 for outer in adapted.adapters[1::2])
    first, second = (figures[name]["curve"][0]["kl"] for name in ("maps", "adapters"))
    assert first == second
    assert figures["maps"]["learned"] == start.weight.numel()
    assert set(figures["adapters"]["tau"]["4, 2, 2"]) == {"all", "a", "b"}


def test_a_cut_run_goes_on_and_a_whole_one_is_kept(command, tmp_path):
    once, trained, _ = command
    whole = once()
    document = json.loads((tmp_path / "adapters.json").read_text())
    del document["parts"]["adapters"]
    (tmp_path / "adapters.json").write_text(json.dumps(document))
    trained.clear()
    again = once()
    assert [trainer.rank for trainer in trained] == [3]
    assert (trained[0].output / CHECKPOINT).exists() and trained[0].step == 4
    assert again["adapters"]["figures"]["tau"] == whole["adapters"]["figures"]["tau"]


@pytest.mark.parametrize("rank", [-1, 0, 99999999999])
def test_a_rank_that_no_adapter_has_is_refused(command, tmp_path, rank):
    command[0]()
    with pytest.raises(ValueError, match=f"rank: got {rank}, expected 1..32"):
        adapters.main(tmp_path / "data.npz", tmp_path / "runs", start_from=str(tmp_path / "start"), rank=rank)
