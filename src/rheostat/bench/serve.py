"""`rheostat bench serve`: 64 streaming clients on a server of its own process, beside the offline engine.

Lengths are uneven, one request in ten is dropped midway, one in twenty is malformed. The offline engine completes
requests of the same lengths, 64 at a time, before and after; nobody talks to the server meanwhile.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Engine, Request
from rheostat.engines.local import LocalEngine
from rheostat.environment import machine, versions
from rheostat.errors import ModelError
from rheostat.serving.server.models import open_engine
from rheostat.types import Prompt

_CLIENTS = 64
_SENTENCE = "The dial of a rheostat sets how much current flows. "
_MALFORMED = (b'{"model": ', b'{"messages": []}', b'{"model": "x", "prompt": "1", "n": -1}', b"\xff\xfe")


@dataclass
class _Load:
    """What the clients saw; of each first token, when it came and the seconds since it was asked for."""

    first_token: list[tuple[float, float]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)


def bench_serve(model: str, seconds: float, console: Console) -> dict[str, Any]:
    """Tokens per second served and offline, time to first token, errors, and what was left behind.

    Args:
        model: what is served.
        seconds: of load; a tenth of it warms up, and is left out of the rate.
        console: says how far it is.

    Raises:
        ModelError: the server did not start.
    """
    engine = open_engine(model)
    process, url = _start(model)
    try:
        offline = [_offline(engine, seconds / 8, 0)]
        console.say(f"offline: {offline[0]:.1f} tokens/s; {_CLIENTS} clients for {seconds:g} s")
        served = asyncio.run(_load(url, process.pid, seconds))
        offline.append(_offline(engine, seconds / 8, 1))
    finally:
        process.terminate()
        code = process.wait(60)
    peer = statistics.mean(offline)
    first = sorted(seconds for _, seconds in served["load"].first_token)
    later = sorted(seconds for came, seconds in served["load"].first_token if came > served["warm"])
    outcomes = served["load"].outcomes
    rows = [
        row("served", [served["rate"]], "tokens/s"),
        row("offline", offline, "tokens/s"),
        row("time to first token, p50", [first[len(first) // 2]], "s"),
        row("time to first token, p95", [first[int(0.95 * len(first))]], "s"),
        row("time to first token after the warm-up, p50", [later[len(later) // 2]], "s"),
        row("time to first token after the warm-up, p95", [later[int(0.95 * len(later))]], "s"),
        *(row(f"requests: {name}", [count], "requests") for name, count in sorted(outcomes.items())),
        *(row(name, [value], unit) for name, value, unit in served["left"]),
        row("exit code after SIGTERM", [code], ""),
    ]
    return {
        "bench": "serve",
        "machine": machine() | {"threads": engine.info.threads},
        "versions": versions() | {"model": f"{model} {engine.info.dtype}"},
        "rows": rows,
        "ratios": {"served/offline": round(served["rate"] / peer, 3)},
    }


def _asked(draw: random.Random) -> tuple[str, int]:
    """A prompt and its token budget: 15 to 130 tokens, and 8 to 160."""
    return f"{draw.randrange(10**6)}. " + _SENTENCE * draw.randint(1, 10), draw.randint(8, 160)


def _offline(engine: Engine, seconds: float, seed: int) -> float:
    """Tokens per second of whole batches."""
    draw, tokens, start = random.Random(seed), 0, time.perf_counter()
    while tokens == 0 or time.perf_counter() - start < seconds:
        asked = [_asked(draw) for _ in range(_CLIENTS)]
        requests = [Request(Prompt(text, text), Strategy(), 0, 0, budget) for text, budget in asked]
        if isinstance(engine, LocalEngine):
            engine.forget_prefixes()
        tokens += sum(len(completion.token_ids) for completion in engine.generate(requests))
    return tokens / (time.perf_counter() - start)


def _start(model: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "rheostat.cli", "serve", "--model", model, "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "RHEOSTAT_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    line = process.stderr.readline()
    if not line.startswith("serving"):
        process.kill()
        raise ModelError(f"the server did not start: {line.strip() or 'it said nothing'}")
    return process, line.split()[-1].removesuffix("/v1")


async def _load(url: str, pid: int, seconds: float) -> dict[str, Any]:
    """All clients at once, until the time is up."""
    model = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())["data"][0]["id"]
    load, start = _Load(), time.perf_counter()
    await asyncio.sleep(0.2)
    files_before = _open_files(pid)
    clients = [asyncio.create_task(_client(url, model, number, start + seconds, load)) for number in range(_CLIENTS)]
    await asyncio.sleep(seconds / 10)
    warm, tokens = time.perf_counter(), await asyncio.to_thread(_tokens, url)
    memory = _memory(pid)
    await asyncio.sleep(max(0.0, start + seconds / 2 - time.perf_counter()))
    half_memory = _memory(pid)
    await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
    rate = (await asyncio.to_thread(_tokens, url) - tokens) / (time.perf_counter() - warm)
    end_memory = _memory(pid)
    await asyncio.gather(*clients)
    await asyncio.sleep(1)
    files = _open_files(pid)
    health = json.loads(urllib.request.urlopen(f"{url}/health").read())
    left = [
        ("rows left", health["running"] + health["waiting"], "rows"),
        ("connections left", max(0, files - files_before), "files"),
        ("memory after warm-up", memory, "MiB"),
        ("memory halfway", half_memory, "MiB"),
        ("memory at the end", end_memory, "MiB"),
    ]
    return {"rate": rate, "load": load, "warm": warm, "left": left}


async def _client(url: str, model: str, number: int, until: float, load: _Load) -> None:
    """One request after another; what the server does wrong is counted, not raised."""
    draw = random.Random(number)
    while time.perf_counter() < until:
        kind = draw.choices(("whole", "dropped", "malformed"), (17, 2, 1))[0]
        text, budget = _asked(draw)
        body = {"model": model, "prompt": text, "max_tokens": budget, "stream": True, "seed": draw.randrange(1 << 30)}
        data = draw.choice(_MALFORMED) if kind == "malformed" else json.dumps(body).encode()
        try:
            load.outcomes[await _ask(url, data, kind, draw.randint(1, budget), load)] += 1
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            load.outcomes[f"failed ({type(error).__name__})"] += 1


async def _ask(url: str, data: bytes, kind: str, drop_after: int, load: _Load) -> str:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
    start = time.perf_counter()
    try:
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        pieces = 0
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return "answered"
            if b'"error"' in line[:20]:
                return "failed (error in the stream)"
            pieces += 1
            if pieces == 1:
                now = time.perf_counter()
                load.first_token.append((now, now - start))
            if kind == "dropped" and pieces > drop_after:
                return "dropped by the client"
    finally:
        writer.close()
    if kind == "malformed" and 400 <= status < 500:
        return "malformed, refused"
    return f"failed ({status})"


def _tokens(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    (line,) = (line for line in text.splitlines() if line.startswith("rheostat_tokens_total "))
    return float(line.split()[1])


def _memory(pid: int) -> float:
    """MiB of the process; 0 where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def _open_files(pid: int) -> int:
    folder = Path(f"/proc/{pid}/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0
