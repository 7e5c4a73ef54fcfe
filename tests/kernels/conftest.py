import pytest
import torch


@pytest.fixture
def triton_device() -> torch.device:
    """Where Triton kernels run in these tests: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_outputs():
    """Fresh tensors hold NaN or the largest integer: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
