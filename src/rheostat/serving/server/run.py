"""Serving until somebody says stop: sockets, signals, and an orderly end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from rheostat.errors import ConfigError
from rheostat.serving.server import limits
from rheostat.serving.server.app import Server
from rheostat.serving.server.guard import is_loopback

_FLUSH_SECONDS = 2.0  # for the last words of answers that were cut short


def bind(host: str, port: int, key: str | None) -> socket.socket:
    """The listening socket; port 0 takes a free one.

    Raises:
        ConfigError: an address that others can reach without a key, or one that cannot be had.
    """
    if key is not None and not key.strip():
        raise ConfigError("--api-key is empty: give it some characters")
    if key is None and not is_loopback(host):
        raise ConfigError(f"--host {host} can be reached by others: give the server an --api-key as well")
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port} ({reason}): choose another with --host or --port"
        ) from None
    listening.set_inheritable(True)
    return listening


def address(listening: socket.socket) -> str:
    """Where it listens, as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """Closes connections whose head of a request does not come."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen: object = None
        self._look()

    def _look(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing():
            return
        if is_idle and self._seen == (self.cycle,):
            self.transport.close()
            return
        self._seen = (self.cycle,) if is_idle else None
        self.loop.call_later(limits.HEADER_SECONDS / 2, self._look)


class _Uvicorn(uvicorn.Server):
    """Without uvicorn's own signals: its way out leaves no time to answer 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(server: Server, listening: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then new requests get 503, and running ones ``grace`` seconds to finish.

    Args:
        server: the app.
        listening: from :func:`bind`.
        grace: after it, or after a second signal, what still runs is cut short.
        ready: called once connections are accepted.
    """
    asyncio.run(_run(server, listening, grace, ready))


def web_server(app: ASGIApp) -> uvicorn.Server:
    """An HTTP server that leaves signals alone."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        backlog=1024,
    )
    return _Uvicorn(config)


async def _run(server: Server, listening: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    web = web_server(server.app)
    stop, at_once = asyncio.Event(), asyncio.Event()

    def asked_to_stop() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop)
    serving = asyncio.create_task(web.serve(sockets=[listening]))
    while not (web.started or serving.done()):
        await asyncio.sleep(0.01)
    ready()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    server.drain()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace):
            while server.app.answering and not at_once.is_set():
                await asyncio.sleep(0.05)
    await asyncio.to_thread(server.close)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FLUSH_SECONDS):
            while server.app.answering:
                await asyncio.sleep(0.02)
    web.should_exit = True
    stopping.cancel()
    await serving
