"""The patched runtime, built if it is not (minutes, once a machine)."""

from types import ModuleType

import pytest

from mone_edge import runtime


@pytest.fixture(scope="session")
def patched_runtime() -> runtime.RuntimeInfo:
    """What there is of the runtime, after a build."""
    return runtime.build()


@pytest.fixture(scope="session")
def llama(patched_runtime: runtime.RuntimeInfo) -> ModuleType:
    """The patched `llama_cpp`."""
    assert patched_runtime.installed
    return runtime.load()
