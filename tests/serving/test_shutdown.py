"""The command itself: how it starts, what it refuses, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from rheostat.cli import main

Capture = pytest.CaptureFixture[str]


class Process:
    """``rheostat serve`` in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-c", SLOW, "serve", "--model", "fake", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("serving fake"), line
        self.url = line.split()[-1].removesuffix("/v1")

    def stream(self, tokens: int, **headers: str) -> httpx2.Response:
        body = {"model": "fake", "prompt": "1", "max_tokens": tokens, "stream": True, "seed": 0}
        client = httpx2.Client(timeout=60, headers=headers)
        return client.send(client.build_request("POST", f"{self.url}/v1/completions", json=body), stream=True)


# The command, with a fake model that takes 2 ms for a token and never ends by itself.
SLOW = """
import sys, time
from rheostat.engines import fake
def slow(self, text, tokens=()):
    time.sleep(0.002)
    return fake.torch.tensor([-100.0] + 11 * [0.0])
fake.FakeEngine.logits = slow
from rheostat.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for item in started:
        item.process.kill()
        item.process.communicate()


def test_running_answers_finish_and_new_ones_get_503(processes: list[Process]) -> None:
    served = Process("--grace", "30")
    processes.append(served)
    streams = [served.stream(80) for _ in range(8)]
    texts: list[str] = []
    readers = [threading.Thread(target=lambda s=s: texts.append(s.read().decode())) for s in streams]
    for reader in readers:
        reader.start()
    time.sleep(0.2)
    served.process.terminate()
    time.sleep(0.2)
    refused = httpx2.post(f"{served.url}/v1/completions", json={"model": "fake", "prompt": "1"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    for reader in readers:
        reader.join(30)
    assert len(texts) == 8
    for text in texts:
        assert text.count('"finish_reason":"length"') == 1
        assert text.endswith("data: [DONE]\n\n")
    assert served.process.wait(10) == 0
    assert served.process.stderr is not None
    assert served.process.stderr.read() == ""


def test_what_is_not_finished_in_time_is_cut_short(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOSTAT_API_KEY", "hidden")
    served = Process("--grace", "0.5")
    processes.append(served)
    assert httpx2.get(f"{served.url}/v1/models").status_code == 401
    stream = served.stream(4000, Authorization="Bearer hidden")
    time.sleep(0.2)
    start = time.monotonic()
    served.process.terminate()
    text = stream.read().decode()
    assert '"code":"shutting_down"' in text
    assert "[DONE]" not in text
    assert served.process.wait(10) == 0
    assert time.monotonic() - start < 6


def test_a_second_signal_does_not_wait(processes: list[Process]) -> None:
    served = Process("--grace", "600")
    processes.append(served)
    stream = served.stream(4000)
    time.sleep(0.2)
    served.process.terminate()
    time.sleep(0.3)
    assert served.process.poll() is None
    served.process.send_signal(signal.SIGINT)
    assert "shutting_down" in stream.read().decode()
    assert served.process.wait(10) == 0


def refusal(capsys: Capture, *options: str) -> str:
    assert main(["serve", "--model", "fake", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_cannot_be_served_is_one_line(
    capsys: Capture, tmp_path: Path, adapter_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RHEOSTAT_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in refusal(capsys, "--port", port)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert "--api-key" in refusal(capsys, "--host", host)
    assert "--api-key is empty" in refusal(capsys, "--api-key", " ")
    assert "no such folder" in refusal(capsys, "--port", "0", "--adapter", str(tmp_path / "nowhere"))
    same = str(adapter_folders["demo"])
    assert "two adapters are called 'demo'" in refusal(capsys, "--port", "0", "--adapter", same, same)
    assert "two adapters are called 'x'" in refusal(capsys, "--port", "0", "--adapter", f"x={same}", f"x={same}")
    assert "vllm" in refusal(capsys, "--port", "0", "--engine", "vllm")
    assert "--port" in refusal(capsys, "--port", "70000")
    text = (adapter_folders["demo"] / "adapter.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter.json").write_text(text.replace('"fingerprint": "', '"fingerprint": "f'))
    os.link(adapter_folders["demo"] / "adapter.safetensors", other / "adapter.safetensors")
    assert "was trained for" in refusal(capsys, "--port", "0", "--adapter", str(other))
