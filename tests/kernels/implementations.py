"""Which implementations of an op a test can run here: (implementation, device) pairs, those that need a GPU marked."""

from __future__ import annotations

import pytest
import torch

from firp_kernels import registry

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees")


def on_devices(name: str) -> list:
    """The reference, and the extension on the devices that may have op `name`."""
    pairs = [pytest.param("reference", "cpu", id="reference")]
    if registry.owner(name, "cpu") == "extension":
        pairs.append(pytest.param("extension", "cpu", id="extension"))
    not_built = pytest.mark.skipif(registry.owner(name, "cuda") != "extension", reason="the extension has no CUDA part")
    pairs.append(pytest.param("extension", "cuda", id="extension-cuda", marks=(pytest.mark.gpu, NO_GPU, not_built)))
    return pairs
