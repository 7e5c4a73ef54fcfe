import pytest
import torch


@pytest.fixture
def triton_device() -> torch.device:
    """Where Triton kernels run in these tests: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
