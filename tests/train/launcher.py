"""Starts jobs of ranks as torchrun does, by its own agent, but from a server that has imported what they need.

    python tests/train/launcher.py SIZE FOLDER

Each line of stdin is the JSON of a job's runs (`rank_runs.py`). How it ended comes back as a line of stdout.
"""

import json
import multiprocessing
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ENDED = "ended: "


def rank(folder: Path) -> None:
    import rank_runs

    rank_runs.main(folder)


def main(size: int, folder: Path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["rank_runs"])
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="forkserver",
    )  # fmt: skip
    for line in sys.stdin:
        (folder / "runs.json").write_text(line)
        try:
            elastic_launch(config, rank)(folder)
            failure = None
        except ChildFailedError as error:
            failure = str(error)
        print(f"\n{ENDED}{json.dumps(failure)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
