"""Everything wrong that a client can send is a 4xx in OpenAI's shape."""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from conftest import Running, Serve  # type: ignore[import-not-found]
from rheostat.serving.server import limits

JSON = {"Content-Type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def check(response: httpx2.Response, status: int, says: str = "", param: str | None = None) -> dict[str, Any]:
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert not re.search(r"/(?!v1|models|chat|completions|json|nowhere)", error["message"]), "a path of this machine"
    if param is not None:
        assert error["param"] == param
    return error


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "fake", "messages": [USER]} | fields


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "fake", "prompt": "12"} | fields


IMAGE = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
WRONG = {
    "no messages": (chat(messages=[]), "messages"),
    "messages of a wrong type": (chat(messages="hi"), "messages"),
    "a message without role": (chat(messages=[{"content": "x"}]), "messages.0.role"),
    "an unknown role": (chat(messages=[{"role": "king", "content": "x"}]), "messages.0.role"),
    "an image part": (chat(messages=[{"role": "user", "content": IMAGE}]), "messages.0.content"),
    "content null": (chat(messages=[{"role": "user", "content": None}]), None),
    "model of a wrong type": (chat(model=3), "model"),
    "n zero": (chat(n=0), "n"),
    "n negative": (text(n=-1), "n"),
    "n a million": (chat(n=10**6), "n"),
    "n a text": (chat(n="2"), "n"),
    "n true": (chat(n=True), "n"),
    "n a fraction": (chat(n=1.5), "n"),
    "prompts times n": (text(prompt=["a"] * 32, n=5), "n"),
    "too many prompts": (text(prompt=["a"] * 33), "prompt"),
    "max_tokens zero": (text(max_tokens=0), "max_tokens"),
    "max_tokens negative": (chat(max_tokens=-5), "max_tokens"),
    "max_tokens huge": (chat(max_tokens=10**9), "max_tokens"),
    "max_completion_tokens negative": (chat(max_completion_tokens=-5), "max_completion_tokens"),
    "temperature negative": (chat(temperature=-0.1), "temperature"),
    "temperature a text": (chat(temperature="hot"), "temperature"),
    "top_p zero": (text(top_p=0), "top_p"),
    "top_p above one": (text(top_p=1.1), "top_p"),
    "top_k below -1": (text(top_k=-2), "top_k"),
    "min_p above one": (text(min_p=2), "min_p"),
    "seed a text": (text(seed="x"), "seed"),
    "seed too large": (text(seed=2**63), "seed"),
    "an empty stop string": (chat(stop=""), "stop"),
    "an empty stop string among others": (chat(stop=["a", ""]), "stop.1"),
    "a stop string too long": (chat(stop="x" * (limits.STOP_LENGTH + 1)), "stop"),
    "too many stop strings": (chat(stop=["a"] * (limits.STOPS + 1)), "stop"),
    "stop a number": (chat(stop=3), "stop"),
    "stream a text": (chat(stream="yes"), "stream"),
    "top_logprobs without logprobs": (chat(top_logprobs=2), None),
    "top_logprobs too many": (chat(logprobs=True, top_logprobs=99), "top_logprobs"),
    "a misspelt option": (chat(rheostat={"trase": True}), "rheostat.trase"),
    "an unknown mode": (chat(rheostat={"mode": "on"}), "rheostat.mode"),
    "options of a wrong type": (chat(rheostat=True), "rheostat"),
    "an adapter's folder": (chat(rheostat={"adapter": "runs"}), "rheostat.adapter"),
    "an empty prompt": (text(prompt=""), "prompt"),
    "no prompts": (text(prompt=[]), "prompt"),
    "mixed prompts": (text(prompt=["a", 3]), None),
    "a negative token": (text(prompt=[-1]), None),
    "a token beyond the vocabulary": (text(prompt=[10**6]), "prompt"),
    "a prompt beyond the context": (text(prompt="1" * 4096), "prompt"),
    "a prompt and budget beyond the context": (text(prompt="1" * 4000, max_tokens=97), "max_tokens"),
    "token ids beyond the context": (text(prompt=[3] * 5000), "prompt"),
    "penalties": (chat(frequency_penalty=0.5), "frequency_penalty"),
    "logit_bias": (chat(logit_bias={"3": 1.0}), "logit_bias"),
    "tools": (chat(tools=[{"type": "function"}]), "tools"),
    "JSON mode": (chat(response_format={"type": "json_object"}), None),
    "echo": (text(echo=True), "echo"),
    "suffix": (text(suffix="x"), "suffix"),
    "best_of": (text(best_of=3), None),
    "a list": ((CHAT, []), None),
    "a number": ((CHAT, 3), None),
    "null": ((TEXT, None), None),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields(server: Running, name: str) -> None:
    (path, body), param = WRONG[name]
    check(server.post(path, body), 400, param=param)


RAW = {
    "invalid JSON": b'{"model": "fake"',
    "nothing": b"",
    "invalid UTF-8": b'{"model": "fa\xffke"}',
    "NaN": b'{"model": "fake", "prompt": "1", "temperature": NaN}',
    "Infinity": b'{"model": "fake", "prompt": "1", "top_p": Infinity}',
    "a number of 5,000 digits": b'{"model": "fake", "prompt": "1", "seed": ' + b"9" * 5000 + b"}",
    "nested deeply": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate pair": b'{"model": "fake", "prompt": "\\ud800"}',
    "a null character in the model's name": b'{"model": "\\u0000", "prompt": "1"}',
}


@pytest.mark.parametrize("name", RAW)
def test_wrong_bodies(server: Running, name: str) -> None:
    response = httpx2.post(f"{server.url}{TEXT}", content=RAW[name], headers=JSON)
    check(response, 404 if "model's name" in name else 400)


def test_unknown_fields_are_ignored(server: Running) -> None:
    assert server.chat(user="me", store=True, whatever={"a": [1]}).status_code == 200


def test_not_json(server: Running) -> None:
    """What a form on another site can send without asking is no request."""
    body = json.dumps(text()[1]).encode()
    check(httpx2.post(f"{server.url}{TEXT}", content=body, headers={"Content-Type": "text/plain"}), 400)


def test_unknown_models_paths_and_methods(server: Running) -> None:
    check(server.chat(model="gpt"), 404, "no such model", "model")
    check(httpx2.get(f"{server.url}/nowhere"), 404)
    check(httpx2.get(f"{server.url}/v1/models/../../etc/passwd"), 404)
    check(httpx2.get(f"{server.url}{CHAT}"), 405)
    check(httpx2.delete(f"{server.url}/v1/models"), 405)


def test_a_name_that_is_not_this_machines(server: Running) -> None:
    check(httpx2.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}), 403, "localhost")
    assert httpx2.get(f"{server.url}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    assert httpx2.get(f"{server.url}/v1/models", headers={"Host": "[::1]:1"}).status_code == 200


def test_keys(serve: Serve) -> None:
    running = serve(key="secret é")
    models = f"{running.url}/v1/models"
    good = {"Authorization": "Bearer secret é".encode(), "Host": b"any.example"}
    assert httpx2.get(models, headers=good).status_code == 200
    for wrong in ("", "Bearer", "Bearer secret", "Bearer secret éé", "Basic secret é", "secret é"):
        response = httpx2.get(models, headers={"Authorization": wrong.encode()})
        assert check(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    check(httpx2.get(f"{running.url}/metrics"), 401)
    check(httpx2.get(f"{running.url}/v1/nowhere"), 401)
    assert httpx2.get(f"{running.url}/health").status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_100_megabytes(server: Running, is_chunked: bool) -> None:
    piece = b" " * (1 << 20)

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield piece

    headers = JSON if is_chunked else JSON | {"Content-Length": str(100 << 20)}
    response = httpx2.post(f"{server.url}{CHAT}", content=pieces(), headers=headers, timeout=30)
    assert check(response, 413)["code"] == "body_too_large"


def raw(server: Running, data: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def received(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def test_a_body_that_is_announced_is_refused_before_it_is_sent(server: Running) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {100 << 20}\r\n\r\n"
    answer = received(raw(server, head.encode()))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer


def test_a_body_that_drips(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    connection = raw(server, f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode())
    for _ in range(10):
        time.sleep(0.05)
        try:
            connection.sendall(b" ")
        except OSError:
            break
    answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_too_slow" in answer


def test_a_head_that_drips(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.4)
    running = serve()
    connection = raw(running, b"GET /health HTTP/1.1\r\nHost: ")
    start = time.monotonic()
    assert received(connection) == b""
    assert time.monotonic() - start < 5
    again = raw(running, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")  # the second request drips
    assert received(again).startswith(b"HTTP/1.1 200")
