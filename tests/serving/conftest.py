"""Servers of the fake model, on a free port of this machine."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from rheostat.adapters.files import BaseModel, save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import TokenAdapter, TokenConfig
from rheostat.decoding.spaces import TABLE_14
from rheostat.engines.fake import FakeEngine
from rheostat.serving.server.app import Server
from rheostat.serving.server.models import Models, open_engine
from rheostat.serving.server.run import bind, web_server


@dataclass
class Running:
    """A server that answers at ``url``."""

    server: Server
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=30)

    def complete(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"model": "fake", "prompt": "12", "max_tokens": 4} | fields)

    def chat(self, **fields: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "12"}]
        return self.post("/v1/chat/completions", {"model": "fake", "messages": messages, "max_tokens": 4} | fields)

    def settle(self, seconds: float = 5) -> None:
        """Wait until nothing runs and nobody is being answered."""
        end = time.monotonic() + seconds
        while self.server.scheduler.running or self.server.scheduler.waiting or self.server.app.answering:
            assert time.monotonic() < end, "something is left running"
            time.sleep(0.005)


class SlowFake(FakeEngine):
    """Never ends by itself, and takes its time for every step."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds
        self.steps = 0
        super().__init__(logits=self._slow, chat_template="{{ messages[0].content }}")

    def _slow(self, text: str, tokens: tuple[int, ...]) -> list[float]:
        self.steps += 1
        time.sleep(self.seconds)
        return [-100.0, *([0.0] * 11)]


Serve = Callable[..., Running]


def serving(server: Server, key: str | None = None) -> Iterator[Running]:
    listening = bind("127.0.0.1", 0, key)
    web = web_server(server.app)
    thread = threading.Thread(target=lambda: asyncio.run(web.serve(sockets=[listening])), daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.002)
    yield Running(server, f"http://127.0.0.1:{listening.getsockname()[1]}")
    server.close()
    web.should_exit = True
    thread.join(10)
    listening.close()
    assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers that end with the test."""
    started: list[Iterator[Running]] = []

    def start(engine: FakeEngine | None = None, key: str | None = None, **limits: int) -> Running:
        models = Models(engine or open_engine("fake"))
        started.append(serving(Server(models, key, **limits), key))
        return next(started[-1])

    yield start
    for generator in started:
        next(generator, None)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each level for the fake model, whose choice depends on what it reads."""
    engine, root = FakeEngine(), tmp_path_factory.mktemp("adapters")
    size = engine.info.hidden_size
    base = BaseModel("fake", None, size, engine.info.fingerprint)
    made = {
        "demo": SequenceAdapter(SequenceConfig(size), TABLE_14),
        "token": TokenAdapter(TokenConfig(size, budgets=(1, 2, 4)), TABLE_14),
    }
    for name, adapter in made.items():
        torch.nn.init.normal_(adapter.output.weight, generator=torch.Generator().manual_seed(4))
        save_adapter(root / name / "adapter", adapter, base, {}, {})
    return {name: root / name / "adapter" for name in made}


@pytest.fixture(scope="session")
def server(adapter_folders: dict[str, Path]) -> Iterator[Running]:
    """The fake model with an adapter of each level, for tests that leave it as they found it."""
    models = Models(open_engine("fake"), [str(folder) for folder in adapter_folders.values()])
    yield from serving(Server(models))
