"""For every test: no network, a cache folder of its own, and the demo's model where a test asks for it."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# read once, when transformers and huggingface_hub are first imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# read once, when torch is first imported: tiny models gain nothing from threads, and lose much on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = "smollm2"
PULL = "RHEOSTAT_TEST_MODEL"
_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes ``smollm2_path`` is a model test, marked or not."""
    for item in items:
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker("model")


@pytest.fixture(scope="session")
def smollm2_path(request: pytest.FixtureRequest) -> Path:
    """The folder of the demo's model, pulled first where RHEOSTAT_TEST_MODEL=1 asks for it; else skips."""
    from rheostat.engines import models
    from rheostat.errors import ModelError

    if os.environ.get(PULL, "0") not in ("", "0"):
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():  # a pull takes a minute or two: show its progress
            return models.pull(MODEL)
    try:
        return models.path(MODEL)
    except ModelError as error:
        pytest.skip(f"needs the demo's model ({error}; or run `make test-model`)")


@pytest.fixture(autouse=True)
def _surroundings(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Model tests get the model and the real cache; all others an empty cache. Nothing leaves this machine."""
    if request.node.get_closest_marker("model"):
        request.getfixturevalue("smollm2_path")
    else:
        monkeypatch.setenv("RHEOSTAT_CACHE", str(tmp_path_factory.mktemp("cache")))

    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            _require_loopback(address[0])
        connect(self, address)

    def look_up_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        _require_loopback(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)


@pytest.fixture
def forget_compiled() -> Iterator[Callable[[], None]]:
    """Forgets what the process has compiled and loaded; done before the test and after it, too."""

    def forget() -> None:
        from rheostat import compiled
        from rheostat.decoding import compiled_sampling
        from rheostat.engines.kernels import kernels

        for cached in (compiled.library, compiled._warn, compiled_sampling._functions, kernels):
            cached.cache_clear()

    forget()
    yield forget
    forget()


def _require_loopback(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name and not name.startswith(_LOOPBACK):
        raise OSError(f"a test tried to reach {name}: tests use this machine only")
