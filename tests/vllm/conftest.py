"""vLLM's modules are stand-ins in a test that asks for `vllm`."""

import fake_vllm
import pytest


@pytest.fixture
def vllm(monkeypatch):
    return fake_vllm.installed(monkeypatch)
