"""A tiny model with a chat template, and a server that a test scripts."""

import pytest
from api_server import Api, write_chat_model


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def api():
    with Api() as server:
        yield server
