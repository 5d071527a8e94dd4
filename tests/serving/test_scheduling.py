"""Queues, clients that vanish, and what is left behind."""

import gc
import json
import socket
import threading
import time

import httpx2
import openai
import pytest

from conftest import Running, Serve, SlowFake  # type: ignore[import-not-found]
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.engines.continuous import ContinuousBatch
from rheostat.engines.fake import FakeEngine
from rheostat.engines.jobs import Failed, Job, PromptState, Written
from rheostat.errors import AdapterError
from rheostat.serving.server import limits
from rheostat.types import Prompt


def stream_of(running: Running, tokens: int = 4000, **fields: object) -> httpx2.Response:
    body = {"model": "fake", "prompt": "1", "max_tokens": tokens, "stream": True} | fields
    client = httpx2.Client(timeout=30)
    return client.send(client.build_request("POST", f"{running.url}/v1/completions", json=body), stream=True)


def wait_until(condition: object, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    running = serve(SlowFake(), rows=2, waiting=3)
    first = stream_of(running, n=2)
    wait_until(lambda: running.server.scheduler.running == 2)
    waiting = threading.Thread(target=lambda: running.complete(n=3))
    waiting.start()
    wait_until(lambda: running.server.scheduler.waiting == 3)
    with pytest.raises(openai.RateLimitError) as raised:
        running.client.completions.create(model="fake", prompt="1")
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
    assert raised.value.code == "queue_full"
    first.close()
    waiting.join(20)
    running.settle()
    assert running.complete().status_code == 200


def test_a_request_larger_than_the_queue_is_served_when_nobody_waits(serve: Serve) -> None:
    running = serve(rows=2, waiting=3)
    assert len(running.complete(n=9).json()["choices"]) == 9


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_row_of_a_vanished_client_is_gone_within_two_steps(serve: Serve, is_stream: bool) -> None:
    engine = SlowFake(0.1)
    running = serve(engine)
    body = json.dumps({"model": "fake", "prompt": "1", "max_tokens": 4000, "stream": is_stream}).encode()
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    wait_until(lambda: engine.steps > 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # as when a process is killed
    before = engine.steps
    connection.close()
    wait_until(lambda: running.server.scheduler.running == 0)
    time.sleep(0.3)
    assert engine.steps <= before + 2
    running.settle()


def test_a_client_that_reads_nothing_blocks_nobody(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    body = {"model": "fake", "prompt": "1", "max_tokens": 3000, "n": 64, "stream": True, "rheostat": {"trace": True}}
    sent = json.dumps(body).encode()
    host, port = running.url.removeprefix("http://").split(":")
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.5)
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + sent)
        wait_until(lambda: running.server.scheduler.running > 0)
        assert running.complete(max_tokens=50).status_code == 200
        running.settle(20)


def _jobs() -> int:
    """How many are still known to anyone."""
    gc.collect()
    return sum(type(thing) is Job for thing in gc.get_objects())


def test_many_requests_leave_nothing_behind(serve: Serve) -> None:
    running = serve(rows=8)
    for round_number in range(3):
        streams = [stream_of(running, tokens=20, seed=seed, n=3) for seed in range(20)]
        for number, stream in enumerate(streams):
            if number % 4 == 0:
                stream.close()
            else:
                stream.read()
        running.settle()
        assert running.server.scheduler._tickets == {}
        end = time.monotonic() + 5  # the engine's thread may still be handing out the last step
        while _jobs():
            assert time.monotonic() < end, f"{_jobs()} jobs are left after round {round_number}"
            time.sleep(0.01)
    threads = {thread.name for thread in threading.enumerate()}
    assert sum(name.startswith("rheostat-engine") for name in threads) <= 2  # its own, and the session's server


def test_a_failing_step_fails_its_requests_and_not_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    step = ContinuousBatch.step

    def broken(self: ContinuousBatch) -> object:
        step(self)
        raise RuntimeError("/secret/path exploded")

    monkeypatch.setattr(ContinuousBatch, "step", broken)
    response = running.complete()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    streamed = running.complete(stream=True)
    assert streamed.status_code == 200
    assert "server_error" in streamed.text
    assert "[DONE]" not in streamed.text
    monkeypatch.setattr(ContinuousBatch, "step", step)
    assert running.complete().status_code == 200
    running.settle()


def test_a_failing_adapter_fails_its_own_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AdapterError("weights at /secret/path are damaged")

    model = server.server.models.by_id["fake:demo"]
    monkeypatch.setattr(type(model.adapter), "probabilities", broken)
    response = server.complete(model="fake:demo")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "adapter_failed"
    assert "secret" not in response.text
    assert server.complete().status_code == 200


def test_a_failing_choice_leaves_its_neighbours_their_own_tokens() -> None:
    """All join in one pass; those behind the failed job move into its rows."""
    engine = FakeEngine()

    def refuse(state: PromptState) -> Strategy:
        raise AdapterError("damaged")

    texts = ("1", "22", "333", "4444")
    jobs = [Job(Prompt(text, text), engine.encode(text), 1, 0, 8, strategy=Strategy()) for text in texts]
    jobs[0].strategy, jobs[0].choose = None, refuse
    batch, done = ContinuousBatch(engine, 8), {}
    for job in jobs:
        batch.add(job)
    failed = [event for event in batch.step() if isinstance(event, Failed)]
    assert [event.job for event in failed] == jobs[:1]
    while batch.running:
        done |= {event.job: event.completion for event in batch.step() if isinstance(event, Written)}
    wanted = engine.generate([Request(job.prompt, Strategy(), 0, 0, 8) for job in jobs[1:]])
    assert [done[job] for job in jobs[1:]] == wanted


def test_draining_finishes_what_runs_and_takes_nothing_new(serve: Serve) -> None:
    running = serve(SlowFake())
    stream = stream_of(running, tokens=60)
    wait_until(lambda: running.server.scheduler.running == 1)
    running.server.drain()
    refused = running.complete()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert httpx2.get(f"{running.url}/health").json()["status"] == "draining"
    text = stream.read().decode()
    assert text.count('"finish_reason":"length"') == 1
    assert text.endswith("data: [DONE]\n\n")


def test_metrics(serve: Serve) -> None:
    running = serve(SlowFake(0.001))
    running.complete(n=2, max_tokens=5)
    running.complete(n=0)
    text = httpx2.get(f"{running.url}/metrics").text
    assert "rheostat_tokens_total 10.0" in text
    assert "rheostat_prompt_tokens_total 2.0" in text
    assert 'rheostat_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'rheostat_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert "rheostat_first_token_seconds_count 1.0" in text
    assert "rheostat_running 0.0" in text
