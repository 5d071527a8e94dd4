"""What stands before the app: keys, names of hosts, and bodies that are too large or too slow."""

import asyncio
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rheostat.serving.server import limits
from rheostat.serving.server.errors import ApiError, internal
from rheostat.serving.server.metrics import Metrics
from rheostat.serving.server.scheduler import shutting_down

_GUARDED = ("/v1", "/metrics")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of this name."""
    return host in _LOOPBACK or host.startswith("127.")


class Guard:
    """An ASGI middleware.

    Args:
        app: what is guarded.
        key: what ``Authorization: Bearer`` must say to reach the API; None: nothing.
        metrics: requests are counted by path and status.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self._key = None if key is None else key.encode()
        self.is_draining = False
        self.answering = 0  # requests to the API under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.answering += 1
        try:
            try:
                body = await self._admit(scope, receive)
            except ApiError as error:
                return await error.response()(scope, receive, watched)
            await self.app(scope, _replay(body, receive), watched)
        except Exception:
            if status == 0:
                await internal().response()(scope, receive, watched)
            raise
        finally:
            self.answering -= 1
            self.metrics.requests.labels(_path(scope), str(status or 499)).inc()
        return None

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"].startswith(_GUARDED):
            self._require_key(headers)
        if self._key is None:
            _require_local_name(headers.get(b"host", b"").decode("latin-1"))
        if self.is_draining and scope["method"] == "POST":
            raise shutting_down()
        return await _read(headers, receive)

    def _require_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(given.strip(), self._key) or scheme.lower() != b"bearer":
            raise ApiError(
                401,
                "wrong or missing API key: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
            )


def _require_local_name(host: str) -> None:
    """A page on the web may have its own name lead here; without a key, only this machine's names are answered."""
    name = host.rsplit("]", 1)[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if host and not is_loopback(name.lower()):
        raise ApiError(
            403,
            "without --api-key, the server answers to localhost only",
            code="host_not_allowed",
            headers={"Connection": "close"},
        )


async def _read(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, it is too large (what is over is read and dropped, so that the sender gets to see the answer);
            408, it takes too long.
    """
    declared = headers.get(b"content-length", b"0")
    length = int(declared) if declared.isdigit() else 0
    too_large = ApiError(
        413, f"the body exceeds {limits.BODY_BYTES} bytes", code="body_too_large", headers={"Connection": "close"}
    )
    if length > limits.BODY_BYTES and (length > limits.DISCARD_BYTES or b"expect" in headers):
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went away", code="disconnected")
                size += len(message.get("body", b""))
                if size <= limits.BODY_BYTES:
                    parts.append(message.get("body", b""))
                else:
                    parts.clear()
                if not message.get("more_body", False) or size > limits.DISCARD_BYTES:
                    break
    except TimeoutError:
        if size <= limits.BODY_BYTES:
            late = f"the body did not arrive within {limits.BODY_SECONDS:g} s"
            raise ApiError(408, late, code="body_too_slow", headers={"Connection": "close"}) from None
    if size > limits.BODY_BYTES:
        raise too_large
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: Iterable[Message] = iter(({"type": "http.request", "body": body, "more_body": False},))

    async def replayed() -> Message:
        for message in messages:
            return message
        return await receive()

    return replayed


_KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


def _path(scope: Scope) -> str:
    """A label of few values, whatever strangers ask for."""
    path = str(scope["path"])
    return path if path in _KNOWN else "/v1/models/…" if path.startswith("/v1/models/") else "other"
