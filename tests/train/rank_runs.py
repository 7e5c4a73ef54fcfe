"""What `test_ranks.py` runs under torchrun: training runs, each with its arguments, of a list in a JSON file."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from firp.train import trainer as module
from firp.train.config import TrainConfig
from firp.train.ranks import TrainingRanks
from firp.train.trainer import Trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    module.write_profile = lambda *_: None  # what drafts are worth is not tested here
    ranks, device = TrainingRanks.of_torchrun("cpu")
    config = TrainConfig(**json.loads((folder / "config.json").read_text()))
    for name, how in json.loads((folder / "runs.json").read_text()):

        def make(name: str = name) -> Trainer:
            return Trainer(config, folder / name, device, progress=False, ranks=ranks)

        if how == "parts":
            while not make().run(time_limit_s=0.0):
                pass
            continue
        if how == "refused":
            try:
                make().run()
            except Exception as error:
                (folder / f"{name}-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")
            continue
        trainer = make()
        if how == "kill":
            step = trainer.train_step

            def killed(step=step, trainer=trainer):
                if trainer.step == 4 and ranks.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step()

            trainer.train_step = killed  # type: ignore[method-assign]
        assert trainer.run(checkpoint_every=3)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
