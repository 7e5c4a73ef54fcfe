"""Training with several processes is training with one: same batches and anchors, sums in another order."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import firp
import numpy as np
import pytest
import torch
from firp.tools.files import locked
from firp.train import trainer as module
from firp.train.config import TrainConfig
from firp.train.ranks import TrainingRanks
from firp.train.trainer import CHECKPOINT, LOG, Trainer
from launcher import ENDED

STEPS = 8
# What rank 0 alone finds in an output folder, and all ranks raise.
REFUSED = {
    "checkpoint": "ValueError: output: cannot read the checkpoint {}",
    "log": "ValueError: output: {}",
    "held": "BlockingIOError: {}: another process is at work in it",
    "file": "FileExistsError: cannot write {}",
}


@contextlib.contextmanager
def torchrun(folder, size):
    """Runs the runs with `size` processes; what a job failed of, or None. Two ranks are started by torchrun's agent in
    a process that outlives a job, more of them by torchrun itself.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script, pipes = Path(__file__).with_name("rank_runs.py"), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    def whole(runs):
        (folder / "runs.json").write_text(json.dumps(runs))
        job = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(script), str(folder))
        ended = subprocess.run([sys.executable, *job], capture_output=True, text=True, env=environment)
        return ended.stderr if ended.returncode else None

    if size > 2:
        yield whole
        return
    command = [sys.executable, script.with_name("launcher.py"), str(size), folder]
    with subprocess.Popen(command, **pipes, text=True, env=environment) as launcher:

        def shared(runs):
            launcher.stdin.write(json.dumps(runs) + "\n")
            launcher.stdin.flush()
            return json.loads(next(line for line in launcher.stdout if line.startswith(ENDED)).removeprefix(ENDED))

        yield shared
        launcher.stdin.close()


def log_of(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def weights_of(folder):
    return dict(firp.load_predictor(folder).named_parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_as_one_process_does(size, request, chat_model, tmp_path, monkeypatch):
    """In float32: every logged KL within 2e-4 of one process's, weights within 2e-4 after 8 steps of AdamW."""
    if size > 2 and not request.config.getoption("--exhaustive"):
        pytest.skip("--exhaustive")
    random = np.random.default_rng(0)
    lengths = random.integers(8, 30, 42)  # an epoch ends with a batch of fewer sequences than ranks
    np.savez(
        tmp_path / "data.npz",
        tokens=random.integers(4, 32, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        prompt_lengths=np.full(42, 4, np.int32),
    )
    config = TrainConfig(
        model=str(chat_model), data=str(tmp_path / "data.npz"), insertion_layer=2, num_offsets=2, steps=STEPS,
        batch_size=8, anchors=4, max_length=32, held_out=1, ridge_tokens=200, transition_rank=3,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    monkeypatch.setattr(module, "write_profile", lambda *_: None)
    assert Trainer(config, tmp_path / "one", progress=False).run()
    assert not Trainer(config, tmp_path / "mixed", progress=False).run(time_limit_s=0.0)

    with torchrun(tmp_path, size) as job:
        check_jobs(job, size, tmp_path)


def check_jobs(job, size, tmp_path):
    # The agent tells of the rank whose end it sees first: the killed one, or the other, which lost its connection.
    assert job([("killed", "kill")]) is not None
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if not path.name.startswith("."))
    assert left == [CHECKPOINT, LOG]
    assert torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)["step"] == 3

    for name, file in (("checkpoint", CHECKPOINT), ("log", LOG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("damaged\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "file").touch()
    refused = [(name, "refused") for name in REFUSED]
    runs = [("whole", "run"), ("parts", "parts"), ("mixed", "run"), ("killed", "run")]
    with locked(tmp_path / "held"):
        assert job([*refused, *runs]) is None
    for name, told in REFUSED.items():
        found = [(tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(size)]
        assert found[0].startswith(told.format(tmp_path / name)) and found == found[:1] * size, name
    one, whole = log_of(tmp_path / "one"), log_of(tmp_path / "whole")
    assert [(record["event"], record["step"]) for record in whole] == [(r["event"], r["step"]) for r in one]
    for record, expected in zip(whole, one, strict=True):
        torch.testing.assert_close(record["kl"], expected["kl"], rtol=0, atol=2e-4)
    for name, expected in weights_of(tmp_path / "whole").items():
        for other in ("parts", "killed"):
            assert torch.equal(weights_of(tmp_path / other)[name], expected), (other, name)
        for other in ("one", "mixed"):
            torch.testing.assert_close(weights_of(tmp_path / other)[name], expected, rtol=0, atol=2e-4)
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]


def test_what_ranks_cannot_share_is_refused(tmp_path):
    config = {"model": "tiny", "data": "none.npz", "insertion_layer": 2}
    with pytest.raises(ValueError, match=r"^keep_rows: got it with 2 ranks, expected one: every epoch"):
        Trainer(TrainConfig(**config, keep_rows=True), tmp_path, ranks=TrainingRanks(0, 2))
    with pytest.raises(ValueError, match=r"^batch_size: got 3, expected at least 4"):
        Trainer(TrainConfig(**config, batch_size=3), tmp_path, ranks=TrainingRanks(0, 4))
