"""The processes of a training run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from firp.tools.ranks import Ranks, launched_ranks
from firp.train.config import TrainConfig


class TrainingRanks(Ranks):
    """This process among `size` that train together: all of a job, joined by torch's default group. Rank 0 writes
    files."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.group, self.rank, self.size = None, rank, size

    @classmethod
    def of_torchrun(cls, device: str) -> tuple[TrainingRanks, str]:
        """The ranks that torchrun tells of, joined by gloo on CPUs and NCCL on GPUs, and the device of this one.

        Raises:
            ValueError: more ranks on this machine than GPUs.
        """
        if launched_ranks() == 1:
            return cls(), device
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= count:
                raise ValueError(f"device: got rank {place} of this machine with {count} GPUs, expected a GPU for each")
            device = f"cuda:{place}"
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if on_gpu else "gloo")
        return cls(dist.get_rank(), dist.get_world_size()), device

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError for settings that these ranks cannot share."""
        if config.keep_rows and self.size > 1:
            raise ValueError(
                f"keep_rows: got it with {self.size} ranks, expected one: every epoch gives a sequence to another "
                "rank, so each would keep the rows of all; leave it off"
            )
        if config.batch_size < self.size:
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected at least {self.size}: a sequence for each rank"
            )

    def share(self, indices: np.ndarray | list) -> Any:
        """This rank's part of a batch, in which neighbours are of like length."""
        return indices[self.rank :: self.size]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add each tensor up over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the values of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def leave(self) -> None:
        """Take no more part; ranks that have nothing left to do may end."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
