"""What figures were measured on."""

from __future__ import annotations

import datetime
import platform

import torch
import transformers
from transformers import PreTrainedModel

from firp.tools.hardware import device_name
from firp.tools.ranks import launched_ranks
from firp_kernels import __version__, registry


def environment(model: PreTrainedModel) -> dict:
    """What the figures were measured on."""
    extension, _ = registry.load_extension()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "ranks": launched_ranks(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "firp_kernels": __version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "extension": None if extension is None else extension.build_info(),
    }
