"""Processes that hold one model together: which one this is, and how all of them take one decision."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, distributed
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

R = TypeVar("R")
# Projections whose rows are the heads that a rank keeps, where a plan splits them and gathers nothing.
KEY_PROJECTIONS = ("k_proj", "qkv_proj")


class Ranks:
    """The ranks of one tensor parallel group. Every rank calls every method, in the same order.

    What ranks compute alike may differ in the last bit, so what decides the next forward is taken from rank 0.

    Args:
        group: of `torch.distributed`; None is one process alone, whose calls cost nothing.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.rank = 0 if group is None else distributed.get_rank(group)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, whose decisions count and which alone prints."""
        return self.rank == 0

    def agree(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rank 0's values of integer tensors, which have the same shapes on every rank: one broadcast."""
        if self.size == 1:
            return tensors
        packed = torch.cat([tensor.flatten().to(torch.int64) for tensor in tensors])
        distributed.broadcast(packed, group=self.group, group_src=0)
        parts = packed.split([tensor.numel() for tensor in tensors])
        return tuple(part.view_as(own).to(own.dtype) for part, own in zip(parts, tensors, strict=True))

    def first(self, function: Callable[[], R]) -> R:
        """What `function` returns, or raises, on rank 0; the others do not call it."""
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.leads:
            try:
                told = [function(), None]
            except Exception as raised:
                told = [None, raised]
        distributed.broadcast_object_list(told, group=self.group, group_src=0)
        value, error = told
        if error is not None:
            raise error
        return value

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return min(self._gathered(number))

    def check_same(self, fields: Mapping[str, object]) -> None:
        """Raise ValueError, on every rank, for the first field whose value is not the same on all of them."""
        if self.size == 1:
            return
        own = {name: hashlib.blake2b(repr(value).encode()).hexdigest() for name, value in fields.items()}
        for rank, other in enumerate(gathered := self._gathered(own)):
            for name, digest in gathered[0].items():
                if other.get(name) != digest:
                    raise ValueError(
                        f"{name}: rank {rank} got another value than rank 0, expected the same on all {self.size} ranks"
                    )

    def _gathered(self, value: R) -> list[R]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values


ALONE = Ranks()
LAUNCHED = "TORCHELASTIC_RUN_ID"  # which torchrun alone sets


def launched_ranks() -> int:
    """Processes that torchrun started for this job; 1 without it, also in a pod of a scheduler."""
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED in os.environ else 1


def launched_rank() -> int:
    """The number of this process among them."""
    return int(os.environ["RANK"]) if LAUNCHED in os.environ else 0


def leave() -> None:
    """End this process's part in a job, at the end of its work."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def check_version(size: int) -> None:
    """Raise ValueError where transformers shards models in a way that FIRP does not follow."""
    if size > 1 and not hasattr(DistributedConfig(), "tp_size"):
        raise ValueError(
            f"tp_size: got {size} with transformers {transformers.__version__}, expected transformers 5.17 or later"
        )


def planned_heads(config: PreTrainedConfig, size: int) -> tuple[int, int]:
    """Query heads and key heads of a rank under the plan that transformers has for a model.

    Raises:
        ValueError: there is no plan, or the heads cannot be divided.
    """
    plan = getattr(config, "base_model_tp_plan", None)
    if size > 1 and not plan:
        raise ValueError(
            f"tp_size: got {size}, expected 1: transformers has no tensor parallel plan for the model_type "
            f"{config.model_type!r}"
        )
    return local_heads(config, plan, size)


def local_heads(config: PreTrainedConfig, plan: Mapping[str, str] | None, size: int) -> tuple[int, int]:
    """Query heads and key heads that each of `size` ranks holds under a tensor parallel plan.

    Raises:
        ValueError: they cannot be divided; gives the numbers.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    names = {name.rpartition(".")[2]: style for name, style in (plan or {}).items()}
    if not any(names.get(name) == "colwise" for name in KEY_PROJECTIONS):
        return heads, kv_heads
    if kv_heads % size or heads % size:
        fitting = [n for n in range(2, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        raise ValueError(
            f"model: its {kv_heads} key heads (num_key_value_heads) and {heads} query heads cannot be divided over "
            f"{size} tensor parallel ranks (tp_size), expected "
            + (f"{' or '.join(map(str, fitting))} ranks" if fitting else "one process")
        )
    return heads // size, kv_heads // size
