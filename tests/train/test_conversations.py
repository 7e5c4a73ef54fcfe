"""Conversations as training text: the model's own template, and anchors in the assistant's turns alone."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from api_server import TEMPLATE
from firp.tools.prompt_files import encode
from firp.train.config import TrainConfig
from firp.train.conversations import read_conversations
from firp.train.data import make_batch
from firp.train.objective import sample_anchors
from firp.train.reporting import Reporter
from firp.train.trainer import LOG, Trainer
from transformers import AutoTokenizer

EOS = 3
TURNS = [("user", "w1 w2"), ("assistant", "w3 w4"), ("user", "w5"), ("assistant", "w6 w7 w8")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture
def tokenizer(chat_model):
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def read(tmp_path, tokenizer):
    def go(*records):
        path = tmp_path / "text.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return read_conversations(path, tokenizer, {EOS})

    return go


def test_answers_are_the_assistants_turns_up_to_their_stop_token(read, tokenizer):
    dataset = read({"messages": MESSAGES, "other": 1}, "", {"prompt": "w1", "response": "w2 w3", "id": "a"})
    words = [tokenizer.convert_ids_to_tokens(dataset.sequence(i).tolist()) for i in range(2)]
    assert words[0] == [
        "w20",
        "w1",
        "w2",
        "[EOS]",
        "w21",
        "w3",
        "w4",
        "[EOS]",
        "w20",
        "w5",
        "[EOS]",
        "w21",
        "w6",
        "w7",
        "w8",
        "[EOS]",
    ]
    answers = [word for word, kept in zip(words[0], dataset.answer_mask(0).tolist(), strict=True) if kept]
    assert answers == ["w3", "w4", "[EOS]", "w6", "w7", "w8", "[EOS]"]
    assert words[1] == ["w20", "w1", "[EOS]", "w21", "w2", "w3", "[EOS]"] and dataset.prompt_lengths.tolist() == [5, 4]
    for i, messages in ((0, MESSAGES[:1]), (1, [{"role": "user", "content": "w1"}])):
        prompt = dataset.sequence(i)[: dataset.prompt_lengths[i]].tolist()
        assert prompt == encode(tokenizer, messages)  # as the model is asked


def test_all_targets_of_an_anchor_are_of_one_answer(read):
    dataset = read({"messages": MESSAGES})
    batch = make_batch(dataset, np.array([0]), 64)
    for offsets, expected in ((1, [4, 5, 6, 11, 12, 13, 14]), (2, [4, 5, 11, 12, 13]), (4, [11]), (5, [])):
        anchors, valid = sample_anchors(batch, offsets, 16, torch.Generator().manual_seed(0))
        assert sorted(anchors[valid].tolist()) == expected
    cut = make_batch(dataset, np.array([0]), 13)
    anchors, valid = sample_anchors(cut, 1, 16, torch.Generator().manual_seed(0))
    assert sorted(anchors[valid].tolist()) == [4, 5, 6, 11]


def test_a_template_that_rewrites_earlier_turns_makes_a_sequence_of_each_answer(read, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'w9' }}"
    )
    dataset = read({"messages": MESSAGES})
    words = [" ".join(tokenizer.convert_ids_to_tokens(dataset.sequence(i).tolist())) for i in range(len(dataset))]
    first = "w20 w1 w2 [EOS] w21"
    assert words == [f"{first} w3 w4 [EOS]", f"{first} w9 [EOS] w20 w5 [EOS] w21 w6 w7 w8 [EOS]"]
    assert [int(dataset.answer_mask(i).sum()) for i in range(2)] == [3, 4]


def test_a_model_without_a_template_takes_prompt_and_response_as_they_are(read, tokenizer):
    tokenizer.chat_template = None
    dataset = read({"prompt": "w1 w2", "response": "w3"})
    assert dataset.sequence(0).tolist() == [5, 6, 7, EOS] and dataset.prompt_lengths.tolist() == [2]
    with pytest.raises(ValueError, match="no chat template, expected prompt and response"):
        read({"messages": MESSAGES})


@pytest.mark.parametrize("record, said", [
    ("{", "line 2: not JSON"), ({"text": "w1"}, "line 2: has neither 'messages' nor 'prompt' and 'response'"),
    ({"prompt": "w1"}, "has neither"), ({"prompt": "w1", "response": None}, r"messages[1].content: got None"),
    ({"messages": "w1"}, "messages: got 'w1', expected a list"), ({"messages": []}, "no turn of the assistant's"),
    ({"messages": MESSAGES[:1]}, "no turn of the assistant's"),
    ({"messages": MESSAGES[1:2]}, "no turn of the assistant's"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content: got [{'type': 'text'}]"),
    ({"messages": [{"role": "tool", "content": "w1"}, *MESSAGES[:2]]}, "the chat template refuses them"),
    ({"messages": [{"content": "w1"}]}, "messages[0].role: got None"), ([1], "got list, expected an object"),
])  # fmt: skip
def test_a_record_that_is_no_conversation_is_named(read, record, said):
    with pytest.raises(ValueError, match=r"^data: .*text.jsonl, " + ".*" + re.escape(said)):
        read({"messages": MESSAGES}, record)


def test_no_conversations_are_named(read):
    with pytest.raises(ValueError, match="holds no conversations"):
        read("")


def test_a_folder_needs_the_library_datasets(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"is a folder, which the library `datasets` reads: pip install datasets"):
        read_conversations(tmp_path, tokenizer, {EOS})


def test_a_folder_of_the_library_datasets_is_read(tmp_path, tokenizer, read):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES[:2]}]
    expected = read(*rows)
    found = datasets.Dataset.from_list(rows)
    found.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": found, "test": found}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("saved", "splits", "files"):
        dataset = read_conversations(tmp_path / name, tokenizer, {EOS})
        assert all(np.array_equal(getattr(dataset, field), value) for field, value in vars(expected).items())
    datasets.DatasetDict({"a": found, "b": found}).save_to_disk(tmp_path / "unclear")
    with pytest.raises(ValueError, match="has the splits a, b, expected one, or one named train"):
        read_conversations(tmp_path / "unclear", tokenizer, {EOS})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`datasets` cannot read"):
        read_conversations(tmp_path / "empty", tokenizer, {EOS})


class FakeRun(list):
    finished = False

    def log(self, figures, step):
        self.append((step, figures))

    def add_scalar(self, name, value, step):
        self.append((step, {name: value}))

    def finish(self):
        self.finished = True

    close = finish


def config(chat_model, tmp_path, **changes):
    path = tmp_path / "text.jsonl"
    records = [{"messages": [{**m, "content": f"{m['content']} w{i}"} for m in MESSAGES]} for i in range(10)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"model": str(chat_model), "data": str(path), "insertion_layer": 2, "num_offsets": 2, "steps": 3,
                "batch_size": 4, "anchors": 4, "max_length": 32, "held_out": 2, "ridge_tokens": 50,
                "transition_rank": 3}  # fmt: skip
    return TrainConfig(**settings | changes)


def test_training_on_conversations_reports_every_line_of_its_log(chat_model, tmp_path, monkeypatch):
    made, runs = [], []
    fake = types.SimpleNamespace(init=lambda **options: made.append(options) or runs.append(FakeRun()) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    output = tmp_path / "run"
    while not Trainer(config(chat_model, tmp_path), output, progress=False, report_to="wandb").run(time_limit_s=0.0):
        pass
    logged = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    reported = [(step, figures) for run in runs for step, figures in run]
    assert [step for step, _ in reported] == [record["step"] for record in logged]
    for (_, figures), record in zip(reported, logged, strict=True):
        assert figures[f"{record['event']}/kl_2"] == record["kl"][1]
    assert all(run.finished for run in runs) and len({options["id"] for options in made}) == 1


def test_tensorboard_gets_the_same_figures(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    writer = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: run)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    reporter = Reporter("tensorboard", tmp_path, {})
    reporter.start(0)
    reporter.report({"event": "train", "step": 2, "kl": [0.5, 0.25]})
    reporter.end()
    assert run == [(2, {"train/kl_1": 0.5}), (2, {"train/kl_2": 0.25})] and run.finished


@pytest.mark.parametrize("name, said", [("mlflow", "expected one of none"), ("wandb", "pip install wandb")])
def test_what_cannot_be_reported_to_is_named(tmp_path, monkeypatch, name, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=rf"^report_to: .*{said}"):
        Reporter(name, tmp_path, {})
