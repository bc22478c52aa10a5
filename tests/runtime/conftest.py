"""The patched `llama_cpp`, for the tests that call it."""

from types import ModuleType

import pytest

from mone_edge import runtime


@pytest.fixture(scope="session")
def llama(built_runtime: runtime.RuntimeInfo) -> ModuleType:
    """The patched `llama_cpp`."""
    assert built_runtime.installed
    return runtime.load()
