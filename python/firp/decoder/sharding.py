"""A model that transformers sharded over ranks: whose forwards were replaced, and what a rank holds of it.

transformers puts a function of its own before and after the forward of a linear or an embedding. It calls the module's
own forward on this rank's part of the weight, and reduces or gathers what comes out. FIRP calls the modules as they
are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from firp.decoder.originals import is_own, library_of
from firp.tools.ranks import ALONE, Ranks, check_version

if distributed.is_available():
    from torch.distributed.tensor import DTensor
else:
    DTensor = None  # type: ignore[assignment, misc]

# Styles of transformers' plans after which every rank holds whole rows, or its own heads of them.
STYLES = frozenset(
    ["ColwiseParallel", "RowwiseParallel", "EmbeddingParallel", "PackedColwiseParallel", "PackedRowwiseParallel",
     "ReplicatedWithGradAllReduce", "AllReduceParallel", "MoeExpertsParallel"]
)  # fmt: skip
# Other ways of spreading a model over processes, in transformers' `DistributedConfig`.
OTHER_SIZES = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a part of a tensor that several ranks hold together."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def runs_shard(module: nn.Module) -> bool:
    """Whether the module's forward is the one that transformers laid around its own, in a style that is known."""
    forward = module.__dict__.get("forward")
    home, name = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
    if not name.endswith("tp_forward") or library_of(home) != "transformers" or not is_own(forward, home, name):
        return False
    held = inspect.getclosurevars(forward).nonlocals  # type: ignore[arg-type]
    original, style = held.get("original_forward"), type(held["self"]) if "self" in held else None
    # Styles without inputs or outputs to change define the function in their own class.
    kind = name.partition(".")[0] if style is None else style.__name__
    return (
        getattr(original, "__self__", None) is module
        and getattr(original, "__func__", None) is getattr(type(module), "forward", None)
        and kind in STYLES
        and (style is None or library_of(style.__module__) == "transformers")
    )


def check_distribution(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that is spread over processes in another way than by tensor parallelism."""
    check_version(getattr(model, "tp_size", None) or 1)
    asked = getattr(model.config, "distributed_config", None)
    for name in OTHER_SIZES:
        size = getattr(asked, name, None) or 1
        if size > 1:
            raise ValueError(
                f"model: got {name} {size} (DistributedConfig), expected 1: FIRP decodes over tensor parallel ranks"
            )


def ranks_of(meshes: Iterable) -> Ranks:
    """The ranks over which the device meshes of a model's parameters lie.

    Raises:
        ValueError: several meshes, or one of more than one dimension.
    """
    meshes = set(meshes)
    if not meshes:
        return ALONE
    mesh = meshes.pop()
    if meshes or mesh.ndim != 1:
        raise ValueError(
            f"model: its parameters lie on a device mesh of shape {tuple(mesh.shape)}"
            f"{' and on others' if meshes else ''}, expected one dimension of tensor parallel ranks"
        )
    return Ranks(mesh.get_group())
