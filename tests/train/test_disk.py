"""A training run and a distillation on a machine that refuses files, kills them or runs two at once."""

import errno
import json
import os
import shutil
import subprocess

import firp
import numpy as np
import pytest
import torch
from firp.tools.files import locked
from firp.train import distill as module
from firp.train import run_files
from firp.train.config import TrainConfig
from firp.train.distill import DistillConfig, distill
from firp.train.trainer import CHECKPOINT, LOG, ROWS, Trainer
from models import tiny_model, tiny_predictor


@pytest.fixture
def config(tmp_path, monkeypatch):
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: (model, None))
    random = np.random.default_rng(0)
    lengths = random.integers(12, 30, 40)
    np.savez(
        tmp_path / "data.npz",
        tokens=random.integers(4, 11, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.full(40, 4, np.int32),
    )
    return lambda **changes: TrainConfig(
        **{"model": "tiny", "data": str(tmp_path / "data.npz"), "insertion_layer": 2, "num_offsets": 2, "steps": 3,
           "batch_size": 4, "anchors": 4, "max_length": 32, "held_out": 4, "ridge_tokens": 200,
           "transition_rank": 0, **changes}
    )  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk, left):
    """Leave `left` bytes of the disk free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - left)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_run_goes_on(config, disk, tmp_path):
    assert Trainer(config(), tmp_path / "whole", progress=False).run()
    trainer = Trainer(config(), disk / "run", progress=False)
    assert not trainer.run(time_limit_s=0.0)
    kept = (disk / "run" / CHECKPOINT).read_bytes()
    fill(disk, left=8192)
    with pytest.raises(
        OSError, match=f"cannot write .*{CHECKPOINT}: No space left on device; what was there before is unchanged"
    ):
        Trainer(config(), disk / "run", progress=False).run()
    assert (disk / "run" / CHECKPOINT).read_bytes() == kept
    (disk / "ballast").unlink()
    assert Trainer(config(), disk / "run", progress=False).run()
    assert torch.equal(firp.load_predictor(disk / "run").weight, firp.load_predictor(tmp_path / "whole").weight)
    assert not [name for name in os.listdir(disk / "run") if name.startswith(".")]


def test_a_full_disk_keeps_the_old_predictor(disk):
    first, second = (tiny_predictor(tiny_model(1, vocab=11), seed) for seed in (1, 2))
    run_files.write_predictor(disk, first)
    fill(disk, left=4096)
    with pytest.raises(OSError, match="No space left on device"):
        run_files.write_predictor(disk, second)
    (disk / "ballast").unlink()
    assert torch.equal(firp.load_predictor(disk).weight, first.weight.float())


def test_a_predictor_without_its_configuration_is_not_whole(tmp_path, monkeypatch):
    """A kill between two files of the first predictor."""
    move = os.replace

    def killed(source, target):
        if str(target).endswith("config.json"):
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run_files.write_predictor(tmp_path, tiny_predictor(tiny_model(1, vocab=11), 1))
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        firp.load_predictor(tmp_path)


def test_a_card_of_the_users_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    run_files.write_predictor(tmp_path, tiny_predictor(tiny_model(1, vocab=11), 1))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "README.md").stat().st_mode}


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("firp.train.trainer.load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is a file, expected a folder"):
        Trainer(config(), tmp_path / "file", progress=False)


def test_a_second_run_in_the_same_folder_is_refused(config, tmp_path):
    trainer = Trainer(config(), tmp_path / "run", progress=False)
    with locked(tmp_path / "run"), pytest.raises(BlockingIOError, match="run: another process is at work in it"):
        trainer.run()
    assert trainer.run()


def test_a_kill_in_the_first_line_of_the_log_does_not_stop_later_runs(config, tmp_path):
    log = tmp_path / "run" / LOG
    log.parent.mkdir()
    log.write_bytes(b'{"event": "st\xff')
    while not Trainer(config(), tmp_path / "run", progress=False).run(time_limit_s=0.0):
        pass
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 3]


def test_kept_rows_take_their_blocks_at_once(config, disk):
    fill(disk, left=40_000)
    with pytest.raises((OSError, ValueError), match=r"keep_rows|No space left"):
        Trainer(config(keep_rows=True), disk / "run", progress=False)


def test_a_disk_that_another_process_fills_meanwhile_is_an_error_not_a_crash(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError, match=f"cannot write .*{ROWS}: No space left on device"):
        Trainer(config(keep_rows=True), tmp_path / "run", progress=False)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A distillation of 8 prompts in batches of 2, whose answers are the prompts."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{4 + i % 7} 5 6"}}\n' for i in range(8)))
    model = tiny_model(1, vocab=11, dtype=torch.float32)
    monkeypatch.setattr(module, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(module, "encode", lambda _, messages: [int(word) for word in messages[0]["content"].split()])
    monkeypatch.setattr(module, "_answer", lambda engine, tokenizer, rows, greedy, config, batch: rows)
    config = DistillConfig("tiny", str(tmp_path / "prompts.jsonl"), batch_size=2)
    return lambda **changes: DistillConfig(**(vars(config) | changes))


def test_distillation_goes_on_after_a_full_disk(text, tmp_path, monkeypatch):
    output, write, written = tmp_path / "text.npz", module.save_arrays, []

    def filling(path, **arrays):
        written.append(path)
        if len(written) == 3:
            monkeypatch.setattr(
                np,
                "savez_compressed",
                lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
            )
        write(path, **arrays)

    with monkeypatch.context() as context:
        context.setattr(module, "save_arrays", filling)
        kept = np.savez_compressed
        with pytest.raises(OSError, match=r"cannot write .*000001.npz: No space left on device"):
            distill(text(), output, progress=False)
        monkeypatch.setattr(np, "savez_compressed", kept)
    assert sorted(os.listdir(tmp_path / "text.npz.parts")) == ["000002.npz", "000003.npz", "config.json"]
    assert distill(text(), output, progress=False) == output
    assert sorted(os.listdir(tmp_path)) == ["prompts.jsonl", "text.npz"]
    with np.load(output) as arrays:
        assert len(arrays["ids"]) == 8


def test_a_kill_while_parts_are_removed_leaves_none_to_be_taken(text, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        distill(text(), tmp_path / "text.npz", progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "text.npz.parts").exists()


def test_two_distillations_of_one_output_do_not_mix(text, tmp_path):
    (tmp_path / "text.npz.parts").mkdir()
    with locked(tmp_path / "text.npz.parts"), pytest.raises(BlockingIOError, match="another process is at work in it"):
        distill(text(), tmp_path / "text.npz", progress=False)
